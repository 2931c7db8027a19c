"""What a checkpoint is and how this runtime would run it, from its config and tensor headers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deinfer._C import AttentionDescription, ModelDescription

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_Tensors = dict[str, tuple[list[int], str]]


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Collect what config and headers say; no weight is read.

    Args:
        path: Checkpoint directory, with or without weights, or a config.json.

    Returns:
        A JSON-ready report. `supported` says whether this runtime runs it, `problems` why not,
        `notes` what to know if it does, `features` what the model consists of, `runs_as` the type
        that its weights have in memory by default. Without weights the sizes are those that
        config.json implies.

    Raises:
        ValueError: A file is missing or malformed.
    """
    from deinfer import _C

    file = path if path.is_file() else path / "config.json"
    config = _read_object(file)
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    problems: list[str] = []
    model: ModelDescription | None = None
    try:
        model = _C.describe_config(str(file))
    except (ValueError, NotImplementedError) as error:
        problems.append(str(error).removeprefix("config.json: "))
    if config.get("quantization_config"):
        problems.append("the weights are quantized")
    tensors = _text_model(_read_headers(file.parent), model)
    dtypes = sorted({dtype for _, dtype in tensors.values()})
    ranks = _ranks(model, tensors)
    if tensors:
        problems += _tensor_problems(model, ranks, tensors, dtypes)
        parameters = sum(math.prod(shape) for shape, _ in tensors.values())
    else:
        pickles = sorted(p.name for p in file.parent.glob("*.bin"))
        if pickles:
            problems.append(f"{pickles[0]} is no safetensors file; see `deinfer convert`")
        parameters = model.parameters if model else 0
    dtype = _runs_as(model, tensors)
    low_rank = config.get("low_rank") or {}
    return {
        "model": str(path),
        "architecture": config.get("model_type"),
        "supported": not problems,
        "problems": problems,
        "notes": _notes(config, model, tensors, dtypes, dtype) if not problems else [],
        "features": _features(model) if model else [],
        "dtypes": dtypes,
        "runs_as": dtype,
        "parameters": parameters,
        "dense_parameters": parameters + _saved_parameters(model, ranks),
        "bytes": sum(math.prod(shape) * _BYTES.get(d, 1) for shape, d in tensors.values()),
        "weights_found": bool(tensors),
        "memory_bytes": parameters * (2 if dtype == "bfloat16" else 4),
        "layers": model.num_layers if model else text.get("num_hidden_layers"),
        "hidden_size": model.hidden_size if model else text.get("hidden_size"),
        "vocab_size": model.vocab_size if model else text.get("vocab_size"),
        "max_model_len": model.max_model_len if model else text.get("max_position_embeddings"),
        "kv_bytes_per_token": (
            model.kv_elements_per_token * (2 if dtype == "bfloat16" else 4) if model else None
        ),
        "latent_kv_bytes_per_token": (
            model.latent_kv_elements_per_token * (2 if dtype == "bfloat16" else 4)
            + model.latent_kv_factor_bytes_per_token
            if model
            else None
        ),
        "kv_width": model.num_kv_heads * model.head_dim if model else None,
        "decomposed_matrices": sum(rank is not None for rank in ranks.values()),
        "dense_matrices": sum(rank is None for rank in ranks.values()),
        "low_rank": {key: value for key, value in low_rank.items() if key != "ranks"} or None,
        "ranks": ranks,
    }


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} is not a JSON object")
    return value


def _read_headers(directory: Path) -> _Tensors:
    """Shape and dtype by tensor name, from the files that the runtime would read, if any."""
    from safetensors import SafetensorError, safe_open

    index = directory / "model.safetensors.index.json"
    files: set[str] = set()
    if (directory / "model.safetensors").is_file():
        files = {"model.safetensors"}
    elif index.is_file():
        files = set(_read_object(index).get("weight_map", {}).values())
    tensors = {}
    for file in sorted(files):
        if not (directory / file).is_file():
            raise ValueError(f"{str(directory / file)!r} is missing")
        try:
            with safe_open(directory / file, framework="numpy") as reader:
                for name in reader.keys():  # noqa: SIM118 - not a mapping
                    view = reader.get_slice(name)
                    tensors[name] = list(view.get_shape()), str(view.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{str(directory / file)!r} is malformed: {error}") from error
    return tensors


def _text_model(tensors: _Tensors, model: ModelDescription | None) -> _Tensors:
    """Name tensors as a text model does, and drop those of other parts."""
    for rule in model.tensor_prefixes if model else ():
        renamed = {}
        for name, tensor in tensors.items():
            if not name.startswith(rule.prefix):
                renamed[name] = tensor
            elif rule.replacement is not None:
                renamed[rule.replacement + name.removeprefix(rule.prefix)] = tensor
        tensors = renamed
    return tensors


def _ranks(model: ModelDescription | None, tensors: _Tensors) -> dict[str, int | None]:
    """Rank of each linear that there is, None for a dense one; of config.json without weights."""
    ranks: dict[str, int | None] = {}
    for linear in model.linears if model else ():
        name = linear.name
        if not tensors:
            ranks[name] = linear.rank or None
        elif f"{name}.weight" in tensors:
            ranks[name] = None
        elif f"{name}.u.weight" in tensors and f"{name}.v.weight" in tensors:
            ranks[name] = tensors[f"{name}.u.weight"][0][-1]
    return ranks


def _saved_parameters(model: ModelDescription | None, ranks: dict[str, int | None]) -> int:
    saved = 0
    for linear in model.linears if model else ():
        n, k = linear.out_features, linear.in_features
        if rank := ranks.get(linear.name):
            saved += n * k - rank * (n + k)
    return saved


def _tensor_problems(
    model: ModelDescription | None,
    ranks: dict[str, int | None],
    tensors: _Tensors,
    dtypes: list[str],
) -> list[str]:
    """Say what is wrong with the tensors; empty if nothing is."""
    problems = []
    if unknown := [dtype for dtype in dtypes if dtype not in ("F32", "BF16", "F16")]:
        problems.append(f"tensors are {', '.join(unknown)}")
    if model is None:
        return problems
    if len(ranks) != len(model.linears):
        missing = len(model.linears) - len(ranks)
        problems.append(f"{missing} of {len(model.linears)} linear layers are missing")
    if model.embedding not in tensors:
        problems.append(f"the tensor {model.embedding} is missing")
    for linear in model.linears:
        if linear.name not in ranks:
            continue
        n, k, rank = linear.out_features, linear.in_features, ranks[linear.name]
        stated = linear.rank or None
        if rank != stated:
            problems.append(f"low_rank.ranks of {linear.name} is {stated}, its tensors have {rank}")
            break
        expected = (
            {"weight": [n, k]} if rank is None else {"v.weight": [rank, k], "u.weight": [n, rank]}
        )
        wrong = [
            leaf for leaf, shape in expected.items() if tensors[f"{linear.name}.{leaf}"][0] != shape
        ]
        if wrong:
            found = tensors[f"{linear.name}.{wrong[0]}"][0]
            problems.append(
                f"{linear.name}.{wrong[0]} is {found}, config.json says {expected[wrong[0]]}"
            )
            break
    return problems


def _runs_as(model: ModelDescription | None, tensors: _Tensors) -> str | None:
    """The type that `dtype="auto"` stands for; None without weights."""
    if model is None or model.embedding not in tensors:
        return None
    return "bfloat16" if tensors[model.embedding][1] == "BF16" else "float32"


def _notes(
    config: dict[str, Any],
    model: ModelDescription | None,
    tensors: _Tensors,
    dtypes: list[str],
    dtype: str | None,
) -> list[str]:
    """What is supported, but not as one might expect."""
    notes = []
    if not tensors:
        notes.append("no weights here: sizes are what config.json implies, in float32")
    if dtype == "float32" and "F16" in dtypes:
        notes.append("float16 weights run as float32 unless --dtype says bfloat16 or int8")
    if model and model.tensor_prefixes:
        notes.append("only its text model runs; images are not read")
    if model and any(kind.window for kind in model.attention):
        notes.append("windows save time, not memory: the KV cache keeps all positions")
    if model and any(kind.rope_type == "dynamic" for kind in model.attention):
        notes.append("contexts end at max_position_embeddings, so dynamic rope changes nothing")
    if config.get("_remove_final_layer_norm"):
        notes.append("there is no final norm")
    return notes


def _features(model: ModelDescription) -> list[str]:
    """What the model has, in words."""
    sharing = "" if model.num_kv_heads == model.num_heads else f" on {model.num_kv_heads} KV heads"
    features = [f"{model.num_heads} heads{sharing} of {model.head_dim}"]
    norm = "LayerNorm" if model.norm == "layer" else "RMSNorm"
    where = [
        text
        for present, text in (
            (model.norms_inputs, "what blocks read"),
            (model.norms_outputs, "what blocks add"),
            (model.qk_norm == "per_head", "each head of q and k"),
            (model.qk_norm == "full", "all heads of q and of k"),
        )
        if present
    ]
    features.append(f"{norm} of {', '.join(where)}")
    gated = "" if model.activation == "relu" else "gated by "
    features.append(f"MLP {gated}{model.activation}")
    features += [_attention(kind, model.num_layers) for kind in model.attention]
    if model.attention_soft_cap:
        features.append(f"attention scores capped at {model.attention_soft_cap:g}")
    if model.logit_soft_cap:
        features.append(f"logits capped at {model.logit_soft_cap:g}")
    features.append("tied embeddings" if model.tied_embeddings else "untied embeddings")
    return features


def _attention(kind: AttentionDescription, num_layers: int) -> str:
    window = f"window of {kind.window} tokens" if kind.window else "full attention"
    where = "all layers" if kind.num_layers == num_layers else f"{kind.num_layers} of {num_layers}"
    if not kind.rope_type:
        return f"{where}: {window}, learned positions"
    rope = f"{kind.rope_type} rope, theta {kind.rope_theta:g}"
    factor = f", factor {kind.rope_factor:g}" if kind.rope_factor != 1 else ""
    return f"{where}: {window}, {rope}{factor}"

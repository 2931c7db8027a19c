"""Read a Hugging Face checkpoint directory and write the canonical decomposed one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deinfer.architectures import ARCHITECTURES
from deinfer.decompose.directory import atomic_directory

FORMAT_VERSION = 1
_SIDE_FILES = (
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_MODELING_FILE = Path(__file__).parents[1] / "modeling_lowrank.py"
_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Factors:
    """One decomposed layer: `u` [n, r] and `v` [r, k]; y = u (v x)."""

    u: Tensor
    v: Tensor


def read_config(path: Path) -> dict[str, Any]:
    """Read the config.json of a dense checkpoint that can be decomposed.

    Args:
        path: Checkpoint directory.

    Returns:
        The JSON object as it stands in the file.

    Raises:
        ValueError: There is no config.json, the architecture is not supported, or the checkpoint
            is quantized or already decomposed.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{str(path)!r} has no config.json")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model_type = config.get("model_type")
    if "low_rank" in config:
        raise ValueError(f"{str(path)!r} is already decomposed (model_type {model_type!r})")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"architecture {model_type!r} is not supported, only {sorted(ARCHITECTURES)}"
        )
    if config.get("quantization_config"):
        raise ValueError(f"{str(path)!r} is quantized; dequantize it first")
    return config


def linear_names(config: Mapping[str, Any]) -> list[str]:
    """Name the modules that are decomposed, in the order in which they run.

    Embeddings and lm_head are never among them.

    Args:
        config: Config of a supported architecture.

    Returns:
        Names such as `model.layers.0.self_attn.q_proj`.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    return architecture.linear_names(int(config["num_hidden_layers"]))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a directory's `model*.safetensors` in their stored dtype.

    Args:
        path: Checkpoint directory.

    Returns:
        Tensors by name.

    Raises:
        ValueError: There is no such file, a name occurs twice, or a value is not finite.
    """
    files = sorted(Path(path).glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{str(path)!r} has no model*.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a mapping
                if name in tensors:
                    raise ValueError(f"tensor {name!r} is in two files of {str(path)!r}")
                tensors[name] = reader.get_tensor(name)
                if not bool(torch.isfinite(tensors[name]).all()):
                    raise ValueError(f"tensor {name!r} of {str(path)!r} has a non-finite value")
    return tensors


def write_checkpoint(
    source: Path,
    destination: Path,
    factors: Mapping[str, Factors],
    low_rank: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write the canonical directory, atomically.

    `X.weight` becomes `X.v.weight` [r, k] and `X.u.weight` [n, r] in the dtype of the weight, and
    `X.bias` becomes `X.u.bias`. All else is copied: dense tensors, tokenizer, chat template, and
    config.json's own fields as they stand.

    Args:
        source: Dense checkpoint.
        destination: Directory to create.
        factors: Decomposed layers by module name; the others stay dense.
        low_rank: What the config says besides version, base_model_type and ranks.
        overwrite: Replace an existing directory.

    Raises:
        ValueError: The source is not supported, or a factor does not fit its layer or is not
            finite.
        FileExistsError: The destination exists and `overwrite` is false.
    """
    source = Path(source)
    config = read_config(source)
    tensors = read_tensors(source)
    for name, pair in factors.items():
        _replace(tensors, name, pair)
    ranks = {name: pair.u.shape[1] for name, pair in factors.items()}
    config = low_rank_config(config, ranks, low_rank)
    write_like(source, Path(destination), config, tensors, overwrite=overwrite)


def low_rank_config(
    config: Mapping[str, Any], ranks: Mapping[str, int], low_rank: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the config.json of the decomposed copy of a dense checkpoint.

    Args:
        config: Of the dense checkpoint.
        ranks: Rank by module name; what is absent stays dense.
        low_rank: What the `low_rank` object says besides version, base_model_type and ranks.

    Returns:
        A new config with a `model_type` of its own, and the classes of the modelling file that
        `copy_side_files` puts beside it.
    """
    base_type = config["model_type"]
    name = f"LowRank{ARCHITECTURES[base_type].name}"
    module = _MODELING_FILE.stem
    return {
        **config,
        "model_type": f"lowrank_{base_type}",
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.{name}Config",
            "AutoModelForCausalLM": f"{module}.{name}ForCausalLM",
        },
        "low_rank": {
            "version": FORMAT_VERSION,
            "base_model_type": base_type,
            **low_rank,
            "ranks": dict(ranks),
        },
    }


def copy_side_files(source: Path, destination: Path, *, low_rank: bool = True) -> None:
    """Put what belongs to a checkpoint besides config and tensors into its directory.

    Args:
        source: Checkpoint directory with tokenizer and chat template.
        destination: Directory that exists.
        low_rank: Whether the destination is decomposed, so that transformers needs a modelling file
            for it.
    """
    for file in _SIDE_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, destination / file)
    if low_rank:
        copy_modeling_file(destination)


def copy_modeling_file(destination: Path) -> None:
    """Put the modelling file that auto_map names into a decomposed directory.

    Args:
        destination: Directory that exists.
    """
    shutil.copyfile(_MODELING_FILE, destination / _MODELING_FILE.name)


def write_like(
    source: Path,
    destination: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint with another's tokenizer and side files, atomically.

    Args:
        source: The other checkpoint.
        destination: Directory to create.
        config: Of config.json.
        tensors: By name.
        overwrite: Replace an existing directory.

    Raises:
        FileExistsError: The destination exists and `overwrite` is false.
    """
    with atomic_directory(destination, overwrite=overwrite) as temporary:
        text = json.dumps(config, indent=2) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        copy_side_files(source, temporary, low_rank="low_rank" in config)
        _write_tensors(temporary, tensors)


def _replace(tensors: dict[str, Tensor], name: str, pair: Factors) -> None:
    """Exchange one dense weight (and bias) for its factors, in place."""
    if f"{name}.weight" not in tensors:
        raise ValueError(f"{name!r} is no layer of the source checkpoint")
    weight = tensors.pop(f"{name}.weight")
    rank = pair.u.shape[1]
    if pair.u.shape != (len(weight), rank) or pair.v.shape != (rank, weight.shape[1]):
        raise ValueError(
            f"{name}: factors {tuple(pair.u.shape)}, {tuple(pair.v.shape)} do not fit "
            f"a weight {tuple(weight.shape)}"
        )
    for key, factor in (("v", pair.v), ("u", pair.u)):
        stored = factor.to(weight.dtype).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(f"{name}.{key} is not finite in {weight.dtype}")
        tensors[f"{name}.{key}.weight"] = stored
    if f"{name}.bias" in tensors:
        tensors[f"{name}.u.bias"] = tensors.pop(f"{name}.bias")


def _write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, or shards with Hugging Face's index when it would be large."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        if size and size + tensors[name].nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += tensors[name].nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")

"""`deinfer info`: describe a checkpoint from its config and tensor headers alone."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from deinfer.architectures import ARCHITECTURES, find_architecture
from deinfer.cli.options import Commands, add_model, print_json, require_model

_EPILOG = """\
Reads config.json and the headers of the safetensors files; no weight is loaded.

examples:
  deinfer info MODEL
  deinfer info MODEL --json
"""
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def add_parser(commands: Commands) -> None:
    """Add the subcommand.

    Args:
        commands: The main parser's subcommands.
    """
    parser = commands.add_parser(
        "info",
        help="describe a checkpoint without loading it",
        description="Describe a checkpoint: architecture, ranks, sizes, whether deinfer runs it.",
        epilog=_EPILOG,
    )
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Describe the checkpoint.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: MODEL is no checkpoint.
        ValueError: Its files are malformed.
    """
    require_model(options.model)
    report = describe(options.model)
    if options.json:
        print_json(report)
    else:
        _print(report)


def describe(path: Path) -> dict[str, Any]:
    """Collect what config and headers say.

    Args:
        path: Checkpoint directory.

    Returns:
        A JSON-ready report.

    Raises:
        ValueError: A file is missing or malformed.
    """
    config = _read_object(path / "config.json")
    tensors = _read_headers(path)
    parameters = sum(math.prod(shape) for shape, _ in tensors.values())
    size = sum(math.prod(shape) * _BYTES.get(dtype, 1) for shape, dtype in tensors.values())
    ranks: dict[str, int | None] = {}
    dense_parameters = parameters
    for name in _linear_names(config):
        if f"{name}.weight" in tensors:
            ranks[name] = None
        elif f"{name}.u.weight" in tensors and f"{name}.v.weight" in tensors:
            (n, rank), (_, k) = tensors[f"{name}.u.weight"][0], tensors[f"{name}.v.weight"][0]
            ranks[name] = rank
            dense_parameters += n * k - rank * (n + k)
    dtypes = sorted({dtype for _, dtype in tensors.values()})
    problems = _problems(config, ranks, tensors, dtypes)
    low_rank = config.get("low_rank") or {}
    return {
        "model": str(path),
        "architecture": config.get("model_type"),
        "supported": not problems,
        "problems": problems,
        "dtypes": dtypes,
        "parameters": parameters,
        "dense_parameters": dense_parameters,
        "bytes": size,
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "vocab_size": config.get("vocab_size"),
        "max_model_len": config.get("max_position_embeddings"),
        "kv_bytes_per_token": _kv_bytes(config, dtypes),
        "decomposed_matrices": sum(rank is not None for rank in ranks.values()),
        "dense_matrices": sum(rank is None for rank in ranks.values()),
        "low_rank": {key: value for key, value in low_rank.items() if key != "ranks"} or None,
        "ranks": ranks,
    }


def _linear_names(config: dict[str, Any]) -> list[str]:
    architecture = find_architecture(config.get("model_type")) or ARCHITECTURES["llama"]
    return architecture.linear_names(int(config.get("num_hidden_layers", 0)))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} is not a JSON object")
    return value


def _read_headers(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype by tensor name, from the files that the runtime would read."""
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if not (path / "model.safetensors").is_file() and index.is_file():
        files = set(_read_object(index).get("weight_map", {}).values())
    tensors = {}
    for file in sorted(files):
        if not (path / file).is_file():
            raise ValueError(f"{str(path / file)!r} is missing")
        try:
            with safe_open(path / file, framework="numpy") as reader:
                for name in reader.keys():  # noqa: SIM118 - not a mapping
                    view = reader.get_slice(name)
                    tensors[name] = list(view.get_shape()), str(view.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{str(path / file)!r} is malformed: {error}") from error
    return tensors


def _problems(
    config: dict[str, Any],
    ranks: dict[str, int | None],
    tensors: dict[str, tuple[list[int], str]],
    dtypes: list[str],
) -> list[str]:
    """Say why deinfer would not run the checkpoint; empty if it would."""
    problems = []
    architecture = find_architecture(config.get("model_type"))
    if architecture is None:
        problems.append(
            f"architecture {config.get('model_type')!r} is not one of {', '.join(ARCHITECTURES)}"
        )
    elif (act := config.get(architecture.activation, "")) not in (*architecture.activations, ""):
        problems.append(f"{architecture.activation} {act!r} is not {architecture.activations[0]}")
    if config.get("quantization_config"):
        problems.append("the weights are quantized")
    if unknown := [dtype for dtype in dtypes if dtype not in ("F32", "BF16", "F16")]:
        problems.append(f"tensors are {', '.join(unknown)}")
    expected = len(_linear_names(config))
    if not problems and len(ranks) != expected:
        problems.append(f"{expected - len(ranks)} of {expected} linear layers are missing")
    stated = (config.get("low_rank") or {}).get("ranks", {})
    found = {name: rank for name, rank in ranks.items() if rank is not None}
    if wrong := sorted(name for name in {**stated, **found} if stated.get(name) != found.get(name)):
        name = wrong[0]
        problems.append(
            f"low_rank.ranks of {name} is {stated.get(name)}, its tensors have {found.get(name)}"
        )
    return problems


def _kv_bytes(config: dict[str, Any], dtypes: list[str]) -> int | None:
    """Bytes of K and V of one token over all layers, in the dtype that `auto` runs in."""
    heads = config.get("num_attention_heads")
    if not heads or not config.get("num_hidden_layers"):
        return None
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // heads
    kv_heads = config.get("num_key_value_heads") or heads
    element = 2 if dtypes == ["BF16"] else 4
    return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * element)


def _print(report: dict[str, Any]) -> None:
    kept = report["parameters"] / max(1, report["dense_parameters"])
    rows = [
        ("model", report["model"]),
        ("architecture", report["architecture"]),
        ("supported", "yes" if report["supported"] else "no"),
        *(("", problem) for problem in report["problems"]),
        ("parameters", f"{report['parameters']:,} ({kept:.1%} of the dense model)"),
        ("weights", f"{report['bytes'] / 1e6:,.1f} MB, {', '.join(report['dtypes'])}"),
        ("layers", f"{report['layers']}, hidden size {report['hidden_size']}"),
        ("vocabulary", f"{report['vocab_size']}"),
        ("context", f"{report['max_model_len']} tokens"),
        ("KV cache", f"{report['kv_bytes_per_token']} bytes per token"),
    ]
    if low_rank := report["low_rank"]:
        shown = {key: value for key, value in low_rank.items() if not isinstance(value, dict)}
        rows.append(("decomposition", ", ".join(f"{k} {v}" for k, v in shown.items())))
    for name, value in rows:
        print(f"{name:14}{value}")
    print(f"\n{'matrix':22}{'decomposed':>12}{'rank min':>10}{'mean':>8}{'max':>8}")
    architecture = find_architecture(report["architecture"]) or ARCHITECTURES["llama"]
    for leaf in architecture.linears:
        all_ranks = [rank for name, rank in report["ranks"].items() if name.endswith(f".{leaf}")]
        some = [rank for rank in all_ranks if rank is not None]
        numbers = (
            f"{min(some):>10}{sum(some) / len(some):>8.0f}{max(some):>8}"
            if some
            else f"{'-':>10}{'-':>8}{'-':>8}"
        )
        print(f"{leaf:22}{f'{len(some)} of {len(all_ranks)}':>12}{numbers}")

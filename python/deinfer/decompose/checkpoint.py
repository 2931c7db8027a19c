"""Read a Hugging Face checkpoint directory and write the canonical decomposed one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deinfer.architectures import ARCHITECTURES
from deinfer.decompose.directory import atomic_directory, writing
from deinfer.decompose.source import SourceCheckpoint
from deinfer.decompose.writer import (
    Layout,
    plan_shards,
    shard_index,
    write_safetensors,
)

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


def linear_shapes(source: SourceCheckpoint) -> dict[str, tuple[int, int]]:
    """Say what can be decomposed in a checkpoint.

    Args:
        source: Dense checkpoint.

    Returns:
        Outputs and inputs [n, k] of the linears by module name, in the order in which they run.

    Raises:
        ValueError: The checkpoint is not supported, or lacks one.
    """
    shapes = {}
    for name in linear_names(read_config(source.path)):
        n, k = source.entry(f"{name}.weight").shape
        shapes[name] = (n, k)
    return shapes


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
    """Write the canonical directory, atomically; see `fill_checkpoint`.

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
    ranks = {name: pair.u.shape[1] for name, pair in factors.items()}
    with atomic_directory(destination, overwrite=overwrite) as temporary:
        fill_checkpoint(SourceCheckpoint(Path(source)), temporary, ranks, factors, low_rank)


def fill_checkpoint(
    source: SourceCheckpoint,
    directory: Path,
    ranks: Mapping[str, int],
    factors: Mapping[str, Factors],
    low_rank: Mapping[str, Any],
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the files of a canonical checkpoint; shards that are there already are left alone.

    `X.weight` becomes `X.v.weight` [r, k] and `X.u.weight` [n, r] in the dtype of the weight, and
    `X.bias` becomes `X.u.bias`. All else is copied: dense tensors, tokenizer, chat template, and
    config.json's own fields as they stand. One tensor is in memory at a time.

    Args:
        source: Dense checkpoint.
        directory: That exists.
        ranks: Rank by module name; what is absent stays dense.
        factors: Factors of the same modules; looked up one by one.
        low_rank: What the config says besides version, base_model_type and ranks.
        others: New values of tensors that are not decomposed, by name.

    Raises:
        ValueError: The source is not supported, or a factor does not fit its layer or is not
            finite.
    """
    config = read_config(source.path)
    shards = plan_shards(checkpoint_layout(source, ranks))
    for file, layout in shards:
        if not (directory / file).is_file():
            with writing(directory / file) as temporary:
                write_safetensors(
                    temporary, layout, _values(source, layout, ranks, factors, others or {})
                )
    if len(shards) > 1:
        with writing(directory / "model.safetensors.index.json") as temporary:
            temporary.write_text(shard_index(shards), encoding="utf-8")
    text = json.dumps(low_rank_config(config, ranks, low_rank), indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    copy_side_files(source.path, directory)


def checkpoint_layout(source: SourceCheckpoint, ranks: Mapping[str, int]) -> Layout:
    """Say what the decomposed copy of a checkpoint will hold.

    Args:
        source: Dense checkpoint.
        ranks: Rank by module name; what is absent stays dense.

    Returns:
        Dtype and shape by tensor name.

    Raises:
        ValueError: A rank's module is no layer of the source.
    """
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in ranks:
        if f"{name}.weight" not in source.entries:
            raise ValueError(f"{name!r} is no layer of the source checkpoint")
    for name, entry in source.entries.items():
        module, _, kind = name.rpartition(".")
        rank = ranks.get(module)
        if rank is None:
            layout[name] = (entry.dtype, entry.shape)
        elif kind == "weight":
            n, k = entry.shape
            layout[f"{module}.u.weight"] = (entry.dtype, (n, rank))
            layout[f"{module}.v.weight"] = (entry.dtype, (rank, k))
        else:
            layout[f"{module}.u.{kind}"] = (entry.dtype, entry.shape)
    return dict(sorted(layout.items()))


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


def _values(
    source: SourceCheckpoint,
    layout: Layout,
    ranks: Mapping[str, int],
    factors: Mapping[str, Factors],
    others: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a layout, one by one."""
    for name, (dtype, shape) in layout.items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if module in ranks and name.endswith(".weight"):
            value: Tensor = getattr(factors[module], kind)
        elif name in others:
            value = others[name]
        elif module.removesuffix(".u") in ranks:
            old = f"{module.removesuffix('.u')}.{kind}"
            value = source.read([old])[old]
        else:
            value = source.read([name])[name]
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: a tensor {tuple(value.shape)} does not fit {shape}")
        stored = value.to(dtype).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(f"{name} is not finite in {dtype}")
        yield name, stored


def _write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, or shards with Hugging Face's index when it would be large."""
    shards = plan_shards({n: (tensors[n].dtype, tuple(tensors[n].shape)) for n in sorted(tensors)})
    for file, layout in shards:
        write_safetensors(directory / file, layout, ((name, tensors[name]) for name in layout))
    if len(shards) > 1:
        text = shard_index(shards)
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")

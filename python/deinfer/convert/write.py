"""Write checkpoint directories shard by shard, atomically."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deinfer.convert.tensors import LazyTensor
from deinfer.decompose.directory import atomic_directory

_SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Export:
    """A directory to be written.

    Attributes:
        config: Its config.json.
        tensors: By the names of its format.
        save_side_files: Writes all that is neither config nor weights.
        notes: What a user should know about it.
    """

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    save_side_files: Callable[[Path], None]
    notes: list[str] = field(default_factory=list)


def write_directory(
    destination: Path, export: Export, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> None:
    """Write a Hugging Face directory; a shard of 1 GiB is in memory, twice while it is saved.

    Args:
        destination: Directory to create.
        export: What to write.
        dtype: Of the weights; by default each stays as it is.
        overwrite: Replace an existing directory.

    Raises:
        ValueError: A tensor cannot be read, or has a value that is not finite (in `dtype`).
        FileExistsError: The destination exists and `overwrite` is false.
    """
    tensors, config = export.tensors, dict(export.config)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    with atomic_directory(destination, overwrite=overwrite) as temporary:
        export.save_side_files(temporary)
        _write_json(temporary / "config.json", config)
        _write_tensors(temporary, tensors)


def _write_tensors(directory: Path, tensors: Mapping[str, LazyTensor]) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        if size and size + tensors[name].nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].nbytes
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        shard = {name: _finite(name, tensors[name]) for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _finite(name: str, tensor: LazyTensor) -> torch.Tensor:
    # A copy: tensors that share memory, as bases of Basis Sharing do, cannot be saved together.
    value = tensor.load().contiguous().clone()
    if tuple(value.shape) != tensor.shape:
        raise ValueError(f"tensor {name!r} has shape {list(value.shape)}, not {list(tensor.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"tensor {name!r} has a value that is not finite in {value.dtype}")
    return value


def _write_json(path: Path, entry: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")

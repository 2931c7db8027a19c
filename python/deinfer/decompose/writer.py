"""Write safetensors files tensor by tensor, and a checkpoint of them shard by shard.

safetensors' own writer wants all tensors of a file in memory at once; a shard has gigabytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 2 << 30
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors by name, in the order in which they are stored."""


def header(layout: Layout) -> bytes:
    """Make the header of a safetensors file, with its length in front.

    Args:
        layout: What the file holds.

    Returns:
        The bytes that precede the values; their number is a multiple of 8.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + tensor_bytes(dtype, shape)
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Count the bytes of a tensor's values."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def write_safetensors(file: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file, with one tensor in memory at a time.

    Args:
        file: To be written.
        layout: What it will hold.
        tensors: The same names in the same order, with their values.

    Raises:
        ValueError: The tensors are not those of the layout.
        OSError: The file cannot be written.
    """
    expected = iter(layout.items())
    with open(file, "wb") as out:
        out.write(header(layout))
        for name, tensor in tensors:
            want = next(expected, None)
            if want != (name, (tensor.dtype, tuple(tensor.shape))):
                raise ValueError(
                    f"tensor {name!r} {tensor.dtype} {tuple(tensor.shape)} is not the next of the "
                    f"layout: {want}"
                )
            flat = tensor.detach().contiguous().flatten().view(torch.uint8)
            out.write(flat.numpy().data)
        if (left := next(expected, None)) is not None:
            raise ValueError(f"tensor {left[0]!r} of the layout is not given")


def plan_shards(layout: Layout, shard_bytes: int = SHARD_BYTES) -> list[tuple[str, Layout]]:
    """Divide a checkpoint into files as Hugging Face names them.

    Args:
        layout: Of the whole checkpoint.
        shard_bytes: Most bytes in a file, unless a single tensor has more.

    Returns:
        (file name, its layout) of every shard.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in layout.items():
        more = tensor_bytes(dtype, shape)
        if size and size + more > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += more
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    count = len(shards)
    return [(f"model-{i:05d}-of-{count:05d}.safetensors", s) for i, s in enumerate(shards, 1)]


def shard_index(shards: Iterable[tuple[str, Layout]]) -> str:
    """Make the text of model.safetensors.index.json.

    Args:
        shards: As `plan_shards` returns them.

    Returns:
        JSON.
    """
    weight_map = {name: file for file, layout in shards for name in layout}
    total = sum(tensor_bytes(*entry) for _, layout in shards for entry in layout.values())
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    )


def stored_bytes(layout: Layout, shard_bytes: int = SHARD_BYTES) -> int:
    """Count the bytes of all safetensors files of a checkpoint, headers included."""
    return sum(
        len(header(part)) + sum(tensor_bytes(*entry) for entry in part.values())
        for _, part in plan_shards(layout, shard_bytes)
    )

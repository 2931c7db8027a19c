"""Tensors of a checkpoint, known by shape and read one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deinfer.convert.pickles import load_tensors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory yet.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        load: Reads it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """Wrap a tensor that is in memory or mapped."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def transposed(self) -> LazyTensor:
        """The transpose of a matrix [a, b] as [b, a]."""
        load = self.load
        return LazyTensor(self.shape[::-1], self.dtype, lambda: load().t())

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same in another dtype."""
        load = self.load
        return LazyTensor(self.shape, dtype, lambda: load().to(dtype))


def product(u: LazyTensor, v: LazyTensor) -> LazyTensor:
    """The weight u v [n, k] of factors u [n, r] and v [r, k], summed in float32.

    Args:
        u: Second factor.
        v: First factor.

    Returns:
        The weight in the dtype of u.
    """
    return LazyTensor(
        (u.shape[0], v.shape[1]),
        u.dtype,
        lambda: (u.load().float() @ v.load().float()).to(u.dtype),
    )


def open_directory(path: Path) -> dict[str, LazyTensor]:
    """Open the weights of a Hugging Face directory, in safetensors or torch's format.

    Args:
        path: Directory.

    Returns:
        Tensors by name; empty if the directory has no weights. Those of the old, non-zip torch
        format are in memory.

    Raises:
        ValueError: A file is missing or cannot be read, or a name occurs twice.
    """
    for pattern, index, opener in (
        ("model*.safetensors", "model.safetensors.index.json", _open_safetensors),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json", _open_torch),
    ):
        files = _indexed(path, index)
        if not files:
            files = sorted(path.glob(pattern))
        if files:
            tensors: dict[str, LazyTensor] = {}
            for file in files:
                for name, tensor in opener(file).items():
                    if name in tensors:
                        raise ValueError(f"tensor {name!r} is in two files of {str(path)!r}")
                    tensors[name] = tensor
            return tensors
    return {}


def _indexed(path: Path, index: str) -> list[Path]:
    """The files that an index names."""
    if not (path / index).is_file():
        return []
    weight_map = read_object(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{str(path / index)!r} has no weight_map")
    files = [path / str(name) for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{index} names {file.name!r}, which is missing in {str(path)!r}")
        if file.parent != path:
            raise ValueError(f"{index} names {file.name!r} outside of {str(path)!r}")
    return files


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    try:
        reader: Any = safe_open(file, framework="pt")
        names = list(reader.keys())
        tensors = {}
        for name in names:
            view = reader.get_slice(name)
            dtype = _DTYPES.get(str(view.get_dtype()))
            if dtype is None:
                raise ValueError(f"{str(file)!r}: {name} has dtype {view.get_dtype()}")
            shape = tuple(view.get_shape())
            tensors[name] = LazyTensor(shape, dtype, _safetensors_reader(reader, name))
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    return tensors


def _safetensors_reader(reader: Any, name: str) -> Callable[[], Tensor]:
    return lambda: reader.get_tensor(name)


def _open_torch(file: Path) -> dict[str, LazyTensor]:
    return lazy_tensors(load_tensors(file), str(file))


def lazy_tensors(entry: Mapping[Any, Any], where: str) -> dict[str, LazyTensor]:
    """Wrap a dictionary of tensors.

    Args:
        entry: Tensors by name.
        where: What the dictionary is, for errors.

    Returns:
        The same, lazily.

    Raises:
        ValueError: A value is no tensor.
    """
    for name, value in entry.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {name!r} is no tensor but a {type(value).__name__}")
    return {str(name): LazyTensor.of(value) for name, value in entry.items()}


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: File.

    Returns:
        The object.

    Raises:
        ValueError: The file is missing, no JSON, or no object.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{str(path)!r} is not a JSON object")
    return entry

"""Read a checkpoint tensor by tensor, so that no more of it is in memory than is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor stands and what it is.

    Attributes:
        file: safetensors file.
        dtype: As stored.
        shape: As stored.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class SourceCheckpoint:
    """The tensors of a Hugging Face directory.

    Args:
        path: The directory.

    Attributes:
        path: The same.
        entries: Every tensor by name, in the order of names.

    Raises:
        ValueError: A shard is missing or truncated, a tensor is in two shards, or its dtype is none
            of those that weights have.
    """

    def __init__(self, path: Path) -> None:
        """Read the headers of all shards."""
        self.path = Path(path)
        self.entries: dict[str, TensorEntry] = {}
        self._headers: dict[str, str] = {}
        for file in self._files():
            self._read_header(file)
        self.entries = dict(sorted(self.entries.items()))

    def _files(self) -> list[Path]:
        index = self.path / _INDEX
        if not index.is_file():
            files = sorted(self.path.glob("model*.safetensors"))
            if not files:
                raise ValueError(f"{str(self.path)!r} has no model*.safetensors")
            return files
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{str(index)!r} is no index of safetensors files: {error}") from error
        for name in names:
            if not (self.path / name).is_file():
                raise ValueError(f"shard {name!r} that {_INDEX} names is not in {str(self.path)!r}")
        return [self.path / name for name in names]

    def _read_header(self, file: Path) -> None:
        digest = hashlib.sha256()
        with _opened(file) as reader:
            for name in sorted(reader.keys()):
                if name in self.entries:
                    raise ValueError(f"tensor {name!r} is in two files of {str(self.path)!r}")
                part = reader.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in _DTYPES:
                    raise ValueError(f"tensor {name!r} of {str(file)!r} has dtype {dtype}")
                self.entries[name] = TensorEntry(file, _DTYPES[dtype], shape)
                digest.update(f"{name} {dtype} {shape}\n".encode())
        stat = file.stat()
        self._headers[file.name] = f"{digest.hexdigest()[:16]} {stat.st_size} {stat.st_mtime_ns}"

    def identity(self) -> dict[str, str]:
        """Say which checkpoint this is, without reading its values: config, headers, sizes, times.

        Returns:
            A text by file name, for a comparison of two runs.
        """
        text = (self.path / "config.json").read_bytes()
        return {"config.json": hashlib.sha256(text).hexdigest()[:16], **self._headers}

    def entry(self, name: str) -> TensorEntry:
        """Look a tensor up.

        Raises:
            ValueError: The checkpoint has no such tensor.
        """
        if name not in self.entries:
            raise ValueError(f"{str(self.path)!r} has no tensor {name!r}")
        return self.entries[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors into memory of their own.

        Args:
            names: Of tensors.

        Returns:
            Tensors by name in their stored dtype, in the order of `names`.

        Raises:
            ValueError: One is missing, or a value is not finite.
        """
        found: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            found[name] = torch.empty(0)
            by_file.setdefault(self.entry(name).file, []).append(name)
        for file, wanted in by_file.items():
            with _opened(file) as reader:
                for name in wanted:
                    tensor = reader.get_tensor(name).clone()  # what is read stays mapped otherwise
                    if not bool(torch.isfinite(tensor).all()):
                        raise ValueError(
                            f"tensor {name!r} of {str(self.path)!r} has a non-finite value"
                        )
                    found[name] = tensor
        return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is truncated or no safetensors file: {error}") from error

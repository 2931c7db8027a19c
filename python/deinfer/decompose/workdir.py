"""The state of a run on disk: complete files only, so that a killed run can go on from them.

A run that writes `DESTINATION` keeps in `DESTINATION.partial`:

    state.json        the arguments and the source, to refuse a resumption with others
    *.json            results of whole stages: calibration, ranks, seconds
    inputs/NNN        the residual stream before block NNN [tokens, hidden], raw values
    gradients/NNN     the gradient of the loss at the same place
    spectra/NNN       factors of block NNN for all ranks, safetensors
    low/NNN           as inputs/NNN, of the decomposed model
    factors/NNN       the factors of block NNN at the ranks chosen, safetensors
    recovered/NNN     the same after training; weights/000: other weights after it
    checkpoint/       shards of the result

A file appears under its name by a rename once it is complete, so its existence says that the work
for it is done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from deinfer.decompose.checkpoint import Factors
from deinfer.decompose.directory import writing
from deinfer.decompose.writer import write_safetensors


class WorkDirectory:
    """Files of a run by stage and index.

    Attributes:
        path: The directory; it need not exist before something is written.
    """

    def __init__(self, path: Path) -> None:
        """Bind to a directory."""
        self.path = Path(path)

    def file(self, stage: str, index: int | None = None) -> Path:
        """Name a file: of a stage, or of one block in a stage."""
        return self.path / stage if index is None else self.path / stage / f"{index:03d}"

    def has(self, stage: str, index: int | None = None) -> bool:
        """Whether that file is complete."""
        return self.file(stage, index).is_file()

    @contextmanager
    def writing(self, stage: str, index: int | None = None) -> Iterator[Path]:
        """Yield a temporary file; it gets its name at the end, or is removed on an exception."""
        file = self.file(stage, index)
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file) as temporary:
            yield temporary

    def write_json(self, stage: str, value: Any) -> None:
        """Write `stage`.json."""
        with self.writing(f"{stage}.json") as file:
            file.write_text(json.dumps(value), encoding="utf-8")

    def read_json(self, stage: str) -> Any:
        """Read `stage`.json, or None if it is not there."""
        file = self.file(f"{stage}.json")
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write_tensors(self, stage: str, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a block."""
        with self.writing(stage, index) as file:
            entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
            write_safetensors(file, entries, tensors.items())

    def read_tensors(self, stage: str, index: int) -> dict[str, Tensor]:
        """Read the tensors of a block."""
        tensors: dict[str, Tensor] = load_file(self.file(stage, index))
        return tensors

    def remove(self, stage: str, index: int | None = None) -> None:
        """Remove a file, or a stage with all of its files, if it exists."""
        file = self.file(stage, index)
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


def open_state(path: Path, identity: Mapping[str, Any], *, resume: bool) -> WorkDirectory:
    """Begin a run, or go on with one.

    Args:
        path: The work directory.
        identity: Arguments and source of the run, as JSON values.
        resume: Go on with what is there, if there is anything.

    Returns:
        The work directory, with its state.json.

    Raises:
        FileExistsError: There is something and `resume` is false.
        ValueError: It is of a run with other arguments or another source.
    """
    work = WorkDirectory(path)
    if path.exists() and not resume:
        raise FileExistsError(
            f"{str(path)!r} is left from an unfinished run: go on with it (--resume), or remove it"
        )
    before = work.read_json("state")
    if before is None:
        work.write_json("state", identity)
        return work
    for name in sorted({*before, *identity}):
        then, now = before.get(name), identity.get(name)
        if then != now:
            raise ValueError(
                f"{str(path)!r} is of another run, with {name} {_brief(then, now)}, not "
                f"{_brief(now, then)}: resume with the same arguments and source, or remove it"
            )
    return work


def _brief(value: Any, other: Any) -> str:
    """Name a value; of objects only what differs from another."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {k: v for k, v in value.items() if other.get(k) != v}
    return repr(value)


class RowWriter:
    """Appends rows to an open file as raw values."""

    def __init__(self, file: BinaryIO) -> None:
        """Write to `file` from where it stands."""
        self._file = file

    def write(self, rows: Tensor) -> None:
        """Append rows [any, width]."""
        self._file.write(rows.detach().contiguous().view(torch.uint8).numpy().data)


class RowReader:
    """Reads rows in the order in which they were written.

    Args:
        file: Open file with raw values.
        width: Values of a row.
        dtype: Of the values.
    """

    def __init__(self, file: BinaryIO, width: int, dtype: torch.dtype) -> None:
        """Read from where the file stands."""
        self._file, self._width, self._dtype = file, width, dtype

    def read(self, count: int) -> Tensor:
        """Return the next rows [count, width].

        Raises:
            RuntimeError: The file ends before them.
        """
        data = bytearray(count * self._width * self._dtype.itemsize)
        if self._file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise RuntimeError(f"a file of the partial state ends before row {count}")
        return torch.frombuffer(data, dtype=self._dtype).view(count, self._width)


def write_factors(
    work: WorkDirectory, stage: str, index: int, factors: Mapping[str, Factors]
) -> None:
    """Write the factors of a block in float32.

    Args:
        work: Where to.
        stage: Name for such files.
        index: 0 is the first block.
        factors: By name within the block.
    """
    tensors = {}
    for leaf, pair in factors.items():
        tensors[f"{leaf}.u"] = pair.u.float().contiguous()
        tensors[f"{leaf}.v"] = pair.v.float().contiguous()
    work.write_tensors(stage, index, tensors)


def read_factors(work: WorkDirectory, stage: str, index: int) -> dict[str, Factors]:
    """Read what `write_factors` has written."""
    tensors = work.read_tensors(stage, index)
    leaves = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {leaf: Factors(tensors[f"{leaf}.u"], tensors[f"{leaf}.v"]) for leaf in leaves}


class SpooledFactors(Mapping[str, Factors]):
    """Factors of all blocks by module name, read when they are asked for.

    Args:
        work: Where `write_factors` has put them.
        stage: The name that they have there.
        prefixes: Module name of each block, with a dot at the end.
        names: Modules that have factors.
    """

    def __init__(
        self, work: WorkDirectory, stage: str, prefixes: Sequence[str], names: Sequence[str]
    ) -> None:
        """Bind to a work directory."""
        self._work, self._stage, self._names = work, stage, list(names)
        self._places = {
            name: (index, name.removeprefix(prefix))
            for index, prefix in enumerate(prefixes)
            for name in names
            if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> Factors:
        """Read the factors of a module."""
        index, leaf = self._places[name]
        with safe_open(self._work.file(self._stage, index), framework="pt") as reader:
            return Factors(*(reader.get_tensor(f"{leaf}.{kind}").clone() for kind in "uv"))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the modules."""
        return iter(self._names)

    def __len__(self) -> int:
        """Count the modules."""
        return len(self._names)

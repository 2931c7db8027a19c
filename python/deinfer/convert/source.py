"""What a user points `deinfer convert` at: a directory or a file, opened as far as is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from deinfer.convert.pickles import Record, load_objects
from deinfer.convert.tensors import LazyTensor, open_directory, read_object
from deinfer.decompose.checkpoint import copy_side_files
from deinfer.tokenizer import has_tokenizer


class Source:
    """A checkpoint to convert.

    Args:
        path: Directory or file.
        base: Directory of the dense model that it was made from, if the user has named one.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        """Look at nothing yet; see the class."""
        self.path = Path(path)
        self.base = base
        if not self.path.exists():
            raise ValueError(f"{str(path)!r} does not exist")
        if base is not None and not (base / "config.json").is_file():
            raise ValueError(f"base model {str(base)!r} has no config.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json; empty if there is none."""
        file = self.path / "config.json"
        return read_object(file) if file.is_file() else {}

    @cached_property
    def tensors(self) -> dict[str, LazyTensor]:
        """The weights of the directory; empty if there are none."""
        return open_directory(self.path) if self.path.is_dir() else {}

    @cached_property
    def module_file(self) -> Path | None:
        """What may hold a pickled module: the file, or the one *.pt of a directory without weights.

        Other directories have such files, too, of an optimizer's state and the like.
        """
        if self.path.is_file():
            return self.path if self.path.suffix in (".pt", ".pth", ".bin", ".pkl") else None
        files = [] if self.tensors else sorted(self.path.glob("*.pt"))
        return files[0] if len(files) == 1 else None

    @cached_property
    def pickled(self) -> dict[str, Any]:
        """The dictionary in `module_file`, if it holds a pickled model; else an empty one."""
        if self.module_file is None:
            return {}
        entry = load_objects(self.module_file)
        return entry if isinstance(entry, dict) and isinstance(entry.get("model"), Record) else {}

    def require_base(self, why: str) -> Path:
        """Give the base model's directory.

        Args:
            why: What it is needed for.

        Returns:
            The directory.

        Raises:
            ValueError: The user named none.
        """
        if self.base is None:
            raise ValueError(f"{why}; name the dense model's directory with --base")
        return self.base

    def side_files(self) -> Callable[[Path], None]:
        """What writes tokenizer and chat template: from the directory itself, else from the base.

        Returns:
            A function that is given the directory to write into.
        """
        home = self.path if self.path.is_dir() else self.path.parent
        if self.base is not None and not has_tokenizer(home):
            home = self.base
        return lambda directory: copy_side_files(home, directory, low_rank=False)

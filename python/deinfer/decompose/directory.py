"""Write a directory in one step, so that a reader never sees half a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_free(destination: Path, *, overwrite: bool = False) -> None:
    """Refuse a destination that exists, before any work is done for it.

    Args:
        destination: Directory that will be written.
        overwrite: Allow an existing *directory* to be replaced.

    Raises:
        FileExistsError: The destination exists and may not be replaced.
    """
    if destination.is_dir() and overwrite:
        return
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"destination {str(destination)!r} already exists")


@contextmanager
def atomic_directory(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling directory and rename it to `destination` on success.

    On an exception the temporary directory is removed and the destination is left as it was.

    Args:
        destination: Final directory; missing parents are created.
        overwrite: Replace an existing directory (the old one goes only after the new one is
            complete).

    Yields:
        The temporary directory to write into.

    Raises:
        FileExistsError: The destination exists and `overwrite` is false, or it is not a directory.
    """
    destination = Path(os.path.abspath(destination))
    require_free(destination, overwrite=overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield temporary
        publish(temporary, destination, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(directory: Path, destination: Path, *, overwrite: bool = False) -> None:
    """Rename a complete directory to its final name.

    Args:
        directory: On the same file system; its modes are set to the umask's.
        destination: Final directory.
        overwrite: Replace an existing directory.

    Raises:
        FileExistsError: The destination exists and `overwrite` is false, or it is not a directory.
    """
    _open_modes(directory)
    require_free(destination, overwrite=overwrite)
    if destination.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        os.replace(destination, old / "old")
        os.replace(directory, destination)
        shutil.rmtree(old)
    else:
        os.replace(directory, destination)


@contextmanager
def writing(file: Path) -> Iterator[Path]:
    """Yield a temporary file; it gets its name at the end, or is removed on an exception.

    Args:
        file: Final name; an existing file is replaced. Its directory must exist.

    Yields:
        The temporary file beside it.
    """
    temporary = file.with_name(f".{file.name}.writing")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _open_modes(root: Path) -> None:
    """Give the tree the umask's modes: mkdtemp and safetensors both create owner-only ones."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(root, 0o777 & ~mask)
    for path in root.rglob("*"):
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)

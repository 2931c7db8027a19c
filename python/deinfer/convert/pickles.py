"""Read files of torch.save and pickle without executing anything that they ask for.

A pickle is a program: it names functions and calls them. `load_tensors` leaves it to torch's
weights-only unpickler, which knows tensors and containers. Pickled *modules* need more:
`load_objects` answers every name itself, with one of three things: a function of this file that
rebuilds a tensor or container, an inert `Record` class for the classes of torch.nn, transformers
and the research code that wrote the checkpoint, or an error. No name is ever imported, so that no
`__reduce__`, `__setstate__` or constructor of a stranger can run.
"""

from __future__ import annotations

import pickle
import tarfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Packages whose classes become records: torch's modules, Hugging Face's models, configs and
# tokenizers, and the repositories of SVD-LLM (component, utils), Dobi-SVD and ASVD (modules).
_RECORD_PACKAGES = (
    "torch.nn.",
    "torch._C._nn.",
    "transformers.",
    "transformers_modules.",
    "tokenizers.",
    "accelerate.",
    "component.",
    "modules.",
    "models.",
    "utils.",
)
_DEPTH = 32  # of modules in modules
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of the old format
_ZIP_MAGIC = b"PK\x03\x04"


class Record:
    """An object of a class that was not imported; it holds what the pickle says and does nothing.

    Attributes:
        class_name: Dotted name of the class, of the type itself.
        arguments: What the pickle passes to the constructor.
        state: What it would pass to `__setstate__`; None if it has none.
        items: What it would append to a list or set in a dict subclass.
    """

    __slots__ = ("arguments", "items", "state")
    class_name = ""
    dump_patches = False  # torch asks a module's class whether to write its source's changes
    arguments: tuple[Any, ...]
    items: list[Any]
    state: Any

    def __new__(cls, *arguments: Any, **_: Any) -> Record:
        """Create the record; see the class."""
        record = super().__new__(cls)
        record.arguments = arguments
        record.state = None
        record.items = []
        return record

    def __init__(self, *_: Any, **__: Any) -> None:
        """Do nothing; `__new__` has kept the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep an item of a dict."""
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Keep an item of a list."""
        self.items.append(value)

    def get(self, name: str, default: Any = None) -> Any:
        """Look up an attribute of the object.

        Args:
            name: Of the attribute.
            default: What to return if the state does not have it.

        Returns:
            Its value.
        """
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class _Function:
    """A function that a pickle may call; unlike a real one it cannot be changed by it."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"sets {name!r} of a function")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("sets the state of a function")


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    tensor: Tensor = torch._utils._rebuild_tensor_v2(  # type: ignore[no-untyped-call]
        storage, offset, tuple(size), tuple(stride), False, {}
    )
    return tensor


def _rebuild_from_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes, without the attributes."""
    if not isinstance(function, _Function):
        raise pickle.UnpicklingError(f"rebuilds a tensor by {function!r}")
    return function(*arguments)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encodes bytes as {encoding!r}")
    return text.encode("latin1")


class _Dict(dict[Any, Any]):
    """A dict that ignores attributes, such as the _metadata of a state_dict."""

    def __setstate__(self, state: Any) -> None:
        """Do nothing."""


class _NumpyType:
    """A numpy dtype by name, e.g. "i8"; its state holds the byte order."""

    __slots__ = ("name", "order")

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def read(self, data: bytes) -> Any:
        if self.name[:1] not in "iufb" or self.order not in "<>=|":
            raise pickle.UnpicklingError(f"numpy type {self.order}{self.name} is no number")
        return np.frombuffer(data, np.dtype(f"{self.order}{self.name}"))[0].item()


_CONTAINERS = (bool, int, float, str, tuple, list, dict, set, frozenset)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": lambda *sizes: tuple(*sizes),
    "torch.device": lambda *names: ":".join(map(str, names)),
    "torch.serialization._get_layout": str,
    "collections.OrderedDict": lambda *items: _Dict(*items),
    "collections.defaultdict": lambda *_: _Dict(),
    **{f"builtins.{kind.__name__}": kind for kind in _CONTAINERS},
    "_codecs.encode": _encode,
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": lambda kind, data: kind.read(data),
    "numpy._core.multiarray.scalar": lambda kind, data: kind.read(data),
    "re._compile": lambda pattern, *_: pattern,
}
_CONSTANTS: dict[str, Any] = {
    "torch.Tensor": "torch.Tensor",  # an argument of _rebuild_from_type
    **{f"torch.{name}": value for name, value in vars(torch).items() if type(value) is torch.dtype},
}


class _Unpickler(pickle.Unpickler):
    """Answers names as the module's docstring says."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._records: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Protocols 0 to 2 write the names of Python 2.
        module = IMPORT_MAPPING.get(module, module)
        module, name = NAME_MAPPING.get((module, name), (module, name))
        dotted = f"{module}.{name}"
        if dotted in _FUNCTIONS:
            return _Function(_FUNCTIONS[dotted])
        if dotted in _CONSTANTS:
            return _CONSTANTS[dotted]
        if not dotted.startswith(_RECORD_PACKAGES):
            raise pickle.UnpicklingError(
                f"asks for {dotted}, which is neither a tensor nor a class of a known model"
            )
        if dotted not in self._records:
            self._records[dotted] = type("Record", (Record,), {"class_name": dotted})
        return self._records[dotted]


class _PickleModule:
    """What torch.load needs of a pickle module."""

    __name__ = "deinfer.convert.pickles"
    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()


def load_objects(path: Path) -> Any:
    """Read a file of torch.save or pickle.dump, in which classes become `Record`.

    Args:
        path: File; tensors of the zip format are mapped, not read.

    Returns:
        The object: tensors (without gradients), numbers, strings, containers and records.

    Raises:
        ValueError: It cannot be read, or asks for anything else; the message names it.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(len(_TORCH_MAGIC))
    try:
        if start.startswith(_ZIP_MAGIC):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise ValueError("it is a TorchScript archive, a program")
        elif start != _TORCH_MAGIC:
            with path.open("rb") as file:
                return _Unpickler(file).load()
        elif tarfile.is_tarfile(path):  # torch would look for its first format and unpack it
            raise ValueError("it is a tar archive")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a record's source is not that of its class
            return torch.load(
                path,
                map_location="cpu",
                pickle_module=_PickleModule,
                weights_only=False,
                mmap=start.startswith(_ZIP_MAGIC),
            )
    except Exception as error:  # a malformed pickle can fail in any way
        raise _refusal(path, error) from error


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a file of torch.save that holds a dictionary of tensors.

    Args:
        path: File; tensors of the zip format are mapped, not read.

    Returns:
        The dictionary, also of containers of tensors, as torch's weights-only unpickler reads it.

    Raises:
        ValueError: It cannot be read so, or is no dictionary.
    """
    path = Path(path)
    with path.open("rb") as file:
        mapped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    try:
        entry = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # as above
        raise _refusal(path, error) from error
    if isinstance(entry, Tensor):
        entry = {"": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"{str(path)!r} holds no tensors but a {type(entry).__name__}")
    return entry


def _refusal(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{str(path)!r} cannot be read: {reason[:400]}")


def module_tensors(module: Record) -> dict[str, Tensor]:
    """Collect the tensors of a pickled nn.Module as `state_dict` would.

    Args:
        module: Record of the module.

    Returns:
        Tensors by name.

    Raises:
        ValueError: It is no module.
    """
    return dict(_walk(module, "", frozenset()))


def _walk(module: Any, prefix: str, parents: frozenset[int]) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, Record) or not isinstance(module.get("_modules"), dict):
        raise ValueError(f"{prefix or 'the pickled object'!r} is no torch module")
    if id(module) in parents or len(parents) > _DEPTH:
        raise ValueError(f"module {prefix[:80]!r} contains itself, or too many others")
    transient = module.get("_non_persistent_buffers_set") or ()
    own = {**(module.get("_parameters") or {})}
    buffers = module.get("_buffers") or {}
    own.update({name: tensor for name, tensor in buffers.items() if name not in transient})
    for name, tensor in own.items():
        if isinstance(tensor, Tensor):
            yield f"{prefix}{name}", tensor
    for name, child in module.get("_modules").items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.", parents | {id(module)})

"""What foreign checkpoints are made of in tests: random factors, modules, ways to store them."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import write_model
from deinfer.architectures import ARCHITECTURES
from deinfer.convert.dynamic_map import dynamic_map
from deinfer.decompose import load_reference
from torch import Tensor, nn


@dataclass
class Foreign:
    """A foreign checkpoint."""

    path: Path  # what a user would give to `deinfer convert`
    model: nn.Module  # in float32
    ranks: dict[str, int]
    base: Path | None = None


def dense_model(path: Path, family: str, **fields: Any) -> Any:
    return load_reference(write_model(path / "dense", family=family, **fields))


def linear_shapes(model: Any, family: str) -> dict[str, tuple[int, int]]:
    names = ARCHITECTURES[family].linear_names(model.config.num_hidden_layers)
    return {name: tuple(model.get_submodule(name).weight.shape) for name in names}


def choose_ranks(model: Any, family: str) -> dict[str, int]:
    """Odd ranks; the output of the first layer's attention and a part of its MLP stay dense."""
    shapes = linear_shapes(model, family)
    leaves = ARCHITECTURES[family].linears
    dense = [name for name in shapes if ".0." in name and name.endswith((leaves[3], leaves[-1]))]
    return {name: 5 + 2 * (i % 5) for i, name in enumerate(shapes) if name not in dense}


def factors(n: int, k: int, rank: int) -> tuple[Tensor, Tensor]:
    """u [n, r] and v [r, k]."""
    return torch.randn(n, rank) / rank**0.5, torch.randn(rank, k) / k**0.5


def replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


def write_json(path: Path, entry: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry))


def foreign_config(model: Any, **fields: Any) -> dict[str, Any]:
    entry = json.loads(model.config.to_json_string(use_diff=False))
    entry.pop("auto_map", None)
    return {**entry, **fields}


def stored(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's state in a dtype; its own values are rounded likewise."""
    state = {name: t.detach().to(dtype).contiguous() for name, t in model.state_dict().items()}
    model.load_state_dict({name: t.float() for name, t in state.items()})
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def halve(model: Any) -> None:
    """Store parameters in float16; buffers such as rotary frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half()


@contextlib.contextmanager
def importable(*classes: type) -> Iterator[None]:
    """While pickling, the modules that the classes claim to be of exist; never when unpickling."""
    names = set()
    for cls in classes:
        parts = cls.__module__.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            names.add(name)
            sys.modules.setdefault(name, types.ModuleType(name))
        setattr(sys.modules[cls.__module__], cls.__name__, cls)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def of_module(module: str) -> Callable[[type], type]:
    def rename(cls: type) -> type:
        cls.__module__, cls.__qualname__ = module, cls.__name__
        return cls

    return rename


@of_module("modules.svd_linear")
class SVDLinear(nn.Module):
    """ASVD's."""

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.ALinear, self.BLinear = linear(u, bias), linear(v)

    def forward(self, x: Tensor) -> Tensor:
        return self.ALinear(self.BLinear(x))


class VU(nn.Module):
    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.v, self.u = linear(v), linear(u, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.u(self.v(x))


def byte_values() -> np.ndarray:
    """The dynamic map from its description, one value at a time."""
    values = [0.0, 1.0]
    for exponent in range(-6, 1):
        count = 2 ** (exponent + 6)
        for j in range(count):
            fraction = 0.1 + 0.9 * (j + 0.5) / count
            values += [fraction * 10.0**exponent, -fraction * 10.0**exponent]
    return np.array(sorted(values))


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, float16 scales, and what they stand for in float16."""
    scales = rows.abs().amax(1)
    values = dynamic_map()  # which a test compares with byte_values; its last bits matter here
    codes = (rows[..., None] / scales[:, None, None] - values).abs().argmin(-1)
    scales = scales.half()
    return codes.to(torch.uint8), scales, (values[codes] * scales.float()[:, None]).half()

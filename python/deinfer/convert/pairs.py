"""Factors whose names are those of the linear with an ending each, as most formats have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deinfer.convert.checkpoint import CheckpointBuilder
from deinfer.convert.tensors import LazyTensor


def add_pairs(
    builder: CheckpointBuilder, tensors: Mapping[str, LazyTensor], *, first: str, second: str
) -> None:
    """Add `X.<first>.weight` and `X.<second>.weight` as factors of X, all else as it is.

    Biases of a pair are `X.<first>.bias`, `X.<second>.bias` or `X.bias`.

    Args:
        builder: Where to add them.
        tensors: Of the checkpoint.
        first: Ending of the factor that is applied first, e.g. "v".
        second: Ending of the other, e.g. "u".

    Raises:
        ValueError: A factor has no partner, or does not fit.
    """
    modules = pair_modules(tensors, first, second)
    taken: set[str] = set()
    for module in modules:
        names = [f"{module}.{first}.weight", f"{module}.{second}.weight"]
        biases = [f"{module}.{second}.bias", f"{module}.bias", f"{module}.{first}.bias"]
        outer = [tensors[name] for name in biases[:2] if name in tensors]
        if len(outer) > 1:
            raise ValueError(f"{module} has two biases, {biases[0]!r} and {biases[1]!r}")
        builder.pair(
            module,
            tensors[names[0]],
            tensors[names[1]],
            bias=outer[0] if outer else None,
            first_bias=tensors.get(biases[2]),
        )
        taken.update(names, biases)
    for name, tensor in tensors.items():
        if name not in taken:
            builder.dense(name, tensor)


def pair_modules(tensors: Iterable[str], first: str, second: str) -> list[str]:
    """Name the modules X that have both factors.

    Args:
        tensors: Names of tensors.
        first: As of `add_pairs`.
        second: Likewise.

    Returns:
        Names, in order.

    Raises:
        ValueError: One factor is there alone.
    """
    names = set(tensors)
    one = {n.removesuffix(f".{first}.weight") for n in names if n.endswith(f".{first}.weight")}
    two = {n.removesuffix(f".{second}.weight") for n in names if n.endswith(f".{second}.weight")}
    if alone := sorted(one ^ two):
        there, lacking = (first, second) if alone[0] in one else (second, first)
        raise ValueError(f"{alone[0]} has {there}.weight but no {lacking}.weight")
    return sorted(one)

"""Canonical tensors under another format's names."""

from __future__ import annotations

from deinfer.convert.checkpoint import LowRankCheckpoint
from deinfer.convert.tensors import LazyTensor


def renamed_factors(
    checkpoint: LowRankCheckpoint,
    *,
    first: str,
    second: str,
    bias: str | None = None,
    prefix: str = "",
) -> dict[str, LazyTensor]:
    """Name the factors of every decomposed linear X anew.

    Args:
        checkpoint: Whose tensors.
        first: `X.v` becomes `X.<first>`.
        second: `X.u` becomes `X.<second>`.
        bias: `X.u.bias` becomes `X.<bias>`; by default `X.<second>.bias`.
        prefix: Of all names.

    Returns:
        All tensors of the checkpoint.
    """
    names = {}
    for module in checkpoint.ranks:
        names[f"{module}.v.weight"] = f"{module}.{first}.weight"
        names[f"{module}.u.weight"] = f"{module}.{second}.weight"
        names[f"{module}.u.bias"] = f"{module}.{bias or f'{second}.bias'}"
    return {
        f"{prefix}{names.get(name, name)}": tensor for name, tensor in checkpoint.tensors.items()
    }

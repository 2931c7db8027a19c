"""Basis Sharing (arXiv 2410.03765): layers of a group share one first factor.

`model.<x>_basis.<layer>.weight` [r, k] is the basis, and the linear itself has become the
coefficients [n, r]: `model.layers.<layer>.self_attn.q_proj.weight`. config.json has `num_basis_<x>`
and `<x>_groups`, lists of layers, for each kind x of linear. The canonical format keeps a basis per
layer, so that what is shared here is there several times.
"""

from __future__ import annotations

import re
from typing import Any

from deinfer.architectures import ARCHITECTURES
from deinfer.convert.checkpoint import CheckpointBuilder, LowRankCheckpoint, dense_config
from deinfer.convert.source import Source

_BASIS = re.compile(r".*\.(\w+)_basis\.\d+\.weight")
_LEAVES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_OPT_LEAVES = {**_LEAVES, "o": "self_attn.out_proj", "up": "fc1", "down": "fc2"}


def detect(source: Source) -> bool:
    """Whether config.json has a number of bases, and groups of layers."""
    return any(
        f"num_basis_{x}" in source.config and f"{x}_groups" in source.config for x in _LEAVES
    )


def read(source: Source) -> LowRankCheckpoint:
    """Read a directory of Basis Sharing."""
    fields = [field for x in _LEAVES for field in (f"num_basis_{x}", f"{x}_groups")]
    config = dense_config(source.config, drop=fields)
    builder = CheckpointBuilder(config, {"method": "basis-sharing"}, source.side_files())
    layers = ARCHITECTURES[config["model_type"]].layers
    leaves = _OPT_LEAVES if config["model_type"] == "opt" else _LEAVES
    tensors = dict(source.tensors)
    bases = {name: tensors.pop(name) for name in list(tensors) if _BASIS.fullmatch(name)}
    stated: dict[str, Any] = {}
    used: set[str] = set()
    for x, leaf in leaves.items():
        for group in source.config.get(f"{x}_groups") or []:
            # Where shared tensors are saved once, only one layer of the group names the basis.
            prefix = layers.rpartition(".")[0]
            names = [f"{prefix}.{x}_basis.{layer}.weight" for layer in group]
            found = [name for name in names if name in bases]
            if not found:
                raise ValueError(f"the basis of {x} of layers {group} is missing")
            used.update(found)
            for layer in group:
                module = f"{layers}.{layer}.{leaf}"
                own = f"{prefix}.{x}_basis.{layer}.weight"
                second = tensors.pop(f"{module}.weight", None)
                if second is None:
                    raise ValueError(f"tensor '{module}.weight' is missing")
                builder.pair(
                    module,
                    bases[own if own in bases else found[0]],
                    second,
                    bias=tensors.pop(f"{module}.bias", None),
                )
                stated[module] = source.config.get(f"num_basis_{x}")
    if unused := sorted(set(bases) - used):
        raise ValueError(f"tensor {unused[0]!r} is of no group of layers")
    for name, tensor in tensors.items():
        builder.dense(name, tensor)
    return builder.build(stated, "num_basis")

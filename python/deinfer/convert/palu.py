"""Palu (arXiv 2407.21118): `X.VT` [sum of ranks, k], then `X.U.<g>` [n / groups, r_g] per group.

config.json has model_type palullama or palumistral, and `head_wise_ranks` {X: [r_0, r_1, ...]}. As
one factor, u is block-diagonal.
"""

from __future__ import annotations

import re

import torch

from deinfer.convert.checkpoint import CheckpointBuilder, LowRankCheckpoint, dense_config
from deinfer.convert.source import Source
from deinfer.convert.tensors import LazyTensor

_PREFIX = "palu"
_GROUP = re.compile(r"(.+)\.U\.(\d+)\.(weight|bias)")
_DROPPED = ("head_wise_ranks", "original_model_name_or_path", "palu_attn_linear_only")


def detect(source: Source) -> bool:
    """Whether config.json has `head_wise_ranks`."""
    return isinstance(source.config.get("head_wise_ranks"), dict)


def read(source: Source) -> LowRankCheckpoint:
    """Read Palu's directory."""
    kind = str(source.config.get("model_type")).removeprefix(_PREFIX)
    config = dense_config(source.config, kind, drop=_DROPPED)
    builder = CheckpointBuilder(config, {"method": "palu"}, source.side_files())
    stated = source.config["head_wise_ranks"]
    groups: dict[str, dict[str, dict[int, LazyTensor]]] = {}
    for name, tensor in source.tensors.items():
        if match := _GROUP.fullmatch(name):
            module, group, leaf = match.groups()
            groups.setdefault(module, {}).setdefault(leaf, {})[int(group)] = tensor
        elif not name.endswith(".VT.weight"):
            builder.dense(name, tensor)
    for name in source.tensors:
        module = name.removesuffix(".VT.weight")
        if module != name and module not in groups:
            raise ValueError(f"{module} has VT.weight but no U.0.weight")
    for module, leaves in groups.items():
        first = source.tensors.get(f"{module}.VT.weight")
        if first is None:
            raise ValueError(f"{module} has U.0.weight but no VT.weight")
        blocks = _ordered(module, leaves.get("weight", {}))
        found = [block.shape[1] for block in blocks]
        if stated.get(module) != found:
            raise ValueError(
                f"head_wise_ranks says {stated.get(module)} for {module}, its tensors have {found}"
            )
        biases = _ordered(module, leaves["bias"]) if "bias" in leaves else []
        builder.pair(
            module,
            first,
            _stacked(blocks, diagonal=True),
            bias=_stacked(biases, diagonal=False) if biases else None,
        )
    if unused := sorted(set(stated) - set(groups)):
        raise ValueError(f"head_wise_ranks names {unused[0]!r}, which has no factors")
    return builder.build()


def _ordered(module: str, groups: dict[int, LazyTensor]) -> list[LazyTensor]:
    if sorted(groups) != list(range(len(groups))) or not groups:
        raise ValueError(f"{module} has U of groups {sorted(groups)}, some are missing")
    return [groups[i] for i in range(len(groups))]


def _stacked(blocks: list[LazyTensor], *, diagonal: bool) -> LazyTensor:
    """Blocks along the diagonal, or one after the other."""
    shape: tuple[int, ...] = tuple(
        sum(block.shape[axis] for block in blocks) for axis in range(2 if diagonal else 1)
    )
    join = torch.block_diag if diagonal else lambda *parts: torch.cat(parts)
    return LazyTensor(shape, blocks[0].dtype, lambda: join(*(block.load() for block in blocks)))

"""SVD-LLM (arXiv 2403.07378): a pickled module with siblings `X_v_proj` [r, k], `X_u_proj` [n, r].

X is q, k, v, o, gate, up, down, and in OPT out, fc1, fc2. OPT's first factors have a bias, too.
"""

from __future__ import annotations

import re

from deinfer.convert.checkpoint import LowRankCheckpoint
from deinfer.convert.modules import open_module, pickled_names
from deinfer.convert.pairs import add_pairs
from deinfer.convert.source import Source

_FACTOR = re.compile(r"(.*\.)(q|k|v|o|out|gate|up|down|fc1|fc2)_([uv])_proj\.(weight|bias)")
_WHOLE = ("fc1", "fc2")  # linears whose names do not end in _proj


def detect(source: Source) -> bool:
    """Whether it is a pickled module with such siblings."""
    return any(_FACTOR.fullmatch(name) for name in pickled_names(source))


def read(source: Source) -> LowRankCheckpoint:
    """Read SVD-LLM's file."""
    builder, tensors = open_module(source, {"method": "svd-llm"})
    add_pairs(builder, {_rename(n): t for n, t in tensors.items()}, first="v", second="u")
    return builder.build()


def _rename(name: str) -> str:
    """`self_attn.q_v_proj.weight` as `self_attn.q_proj.v.weight`."""
    match = _FACTOR.fullmatch(name)
    if not match:
        return name
    prefix, leaf, factor, kind = match.groups()
    return f"{prefix}{leaf if leaf in _WHOLE else f'{leaf}_proj'}.{factor}.{kind}"

"""Dobi-SVD (arXiv 2502.02723), in both of its forms.

Without remapping: a pickled module with `X.ALinear` [r, k] then `X.BLinear` [n, r] (ASVD's names
swapped). Of a linear with a bias, the bias [n] stands on ALinear, and BLinear's was never set.

Remapped: remapping_weight.pt holds of each linear the first min(n, k) entries of each column of u
and row of v as bytes with a scale each, and the rest of the longer side in float16; all that is not
a linear is in pytorch_model.bin. Where r (n + k) >= n k its loader multiplies the factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deinfer.convert.checkpoint import CheckpointBuilder, LowRankCheckpoint, dense_config
from deinfer.convert.dynamic_map import dequantize
from deinfer.convert.modules import open_module, pickled_names
from deinfer.convert.pairs import add_pairs
from deinfer.convert.pickles import load_tensors
from deinfer.convert.source import Source
from deinfer.convert.tensors import LazyTensor, product

_FILE = "remapping_weight.pt"
_FIELDS = ("us_quan", "vt_quan", "us_absmax", "vt_absmax")


def detect_module(source: Source) -> bool:
    """Whether it is a pickled module with pairs of ALinear and BLinear."""
    return any(name.endswith(".BLinear.weight") for name in pickled_names(source))


def read_module(source: Source) -> LowRankCheckpoint:
    """Read DobiSVD_Model.pt."""
    builder, tensors = open_module(source, {"method": "dobi-svd"})
    add_pairs(builder, tensors, first="ALinear", second="BLinear")
    return builder.build()


def detect_remapped(source: Source) -> bool:
    """Whether the directory has remapping_weight.pt."""
    return (source.path / _FILE).is_file()


def read_remapped(source: Source) -> LowRankCheckpoint:
    """Read the directory of a remapped model."""
    config = dense_config(source.config)
    builder = CheckpointBuilder(config, {"method": "dobi-svd"}, source.side_files())
    remapped = load_tensors(source.path / _FILE)
    for name, entry in remapped.items():
        v, u = _factors(str(name), entry)
        n, k = u.shape[0], v.shape[1]
        bias = source.tensors.get(f"{name}.bias")
        if v.shape[0] * (n + k) >= n * k:
            builder.dense(f"{name}.weight", product(u, v))
            if bias is not None:
                builder.dense(f"{name}.bias", bias)
        else:
            builder.pair(str(name), v, u, bias=bias)
    for name, tensor in source.tensors.items():
        if name.rpartition(".")[0] not in remapped:
            builder.dense(name, tensor)
    return builder.build()


def _factors(name: str, entry: Any) -> tuple[LazyTensor, LazyTensor]:
    """V [r, k] and u [n, r] of one linear, dequantized when they are read."""
    if not isinstance(entry, dict) or any(
        not isinstance(entry.get(field), Tensor) for field in _FIELDS
    ):
        raise ValueError(f"{_FILE}: {name} lacks one of {', '.join(_FIELDS)}")
    u, v = (_rows(name, entry[f"{side}_quan"], entry[f"{side}_absmax"]) for side in ("us", "vt"))
    if (info := entry.get("tuple_info")) is not None:
        side, tail = info if isinstance(info, tuple | list) and len(info) == 2 else ("", None)
        if side not in ("us", "vt") or not isinstance(tail, Tensor) or tail.dim() != 2:
            raise ValueError(f"{_FILE}: {name} has a malformed tuple_info")
        if side == "us":
            u = _extended(name, u, tail.t())
        else:
            v = _extended(name, v, tail)
    return v, u.transposed()


def _rows(name: str, codes: Tensor, scales: Tensor) -> LazyTensor:
    """Rows [r, min(n, k)] of a factor, in float16 as Dobi-SVD computes with them."""
    if codes.dim() != 2 or codes.dtype != torch.uint8 or scales.numel() != len(codes):
        raise ValueError(
            f"{_FILE}: {name} has codes {list(codes.shape)} ({codes.dtype}) and "
            f"{scales.numel()} scales"
        )
    return LazyTensor(
        (codes.shape[0], codes.shape[1]),
        torch.float16,
        lambda: dequantize(codes, scales).to(torch.float16),
    )


def _extended(name: str, rows: LazyTensor, tail: Tensor) -> LazyTensor:
    if len(tail) != rows.shape[0]:
        raise ValueError(f"{_FILE}: {name} has a tail {list(tail.shape)} for {rows.shape[0]} ranks")
    return LazyTensor(
        (rows.shape[0], rows.shape[1] + tail.shape[1]),
        rows.dtype,
        lambda: torch.cat([rows.load(), tail.to(rows.dtype)], dim=1),
    )

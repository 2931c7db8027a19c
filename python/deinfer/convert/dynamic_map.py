"""The 8-bit dynamic data type of arXiv 1511.04561, as bitsandbytes numbers its values."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_EXPONENTS = 7


@functools.cache
def dynamic_map() -> Tensor:
    """Compute the 256 values in ascending order.

    One bit is the sign; i of the others hold a fraction, the rest the exponent i - 6 in unary. The
    fractions are the midpoints of 2^i equal parts of [0.1, 1]; 0 and 1 stand for themselves.

    Returns:
        float32 [256].
    """
    values = [0.0, 1.0]
    for i in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        scaled = 10.0 ** (i - _EXPONENTS + 1) * ((edges[:-1] + edges[1:]) / 2)
        values += scaled.tolist() + (-scaled).tolist()
    return torch.tensor(sorted(values))


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Look up the values of rows.

    Args:
        codes: uint8 [rows, columns].
        scales: Largest magnitude of each row, [rows].

    Returns:
        float32 [rows, columns].
    """
    return dynamic_map()[codes.int()] * scales.float()[:, None]

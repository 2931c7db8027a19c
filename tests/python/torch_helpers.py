"""What the tests of torch ops share: float64 references and a paged cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("deinfer.torch_ops", reason="built without torch ops", exc_type=ImportError)

from deinfer import torch_ops  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
# Of results that are sums of some hundred products of about 1: rounding of z and of the output.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float64: 1e-12}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def factors(n: int, k: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(r, k, dtype=dtype, scale=k**-0.5), randn(n, r, dtype=dtype, scale=r**-0.5)


def exact(x: Tensor, v: Tensor | None, u: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() if v is None else x.double() @ v.double().T
    y = y @ u.double().T
    return y if bias is None else y + bias.double()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected).abs() / (1 + expected.abs())
    assert error.max() < TOLERANCE[actual.dtype]


class Paged:
    """Sequences with random K and V, scattered over a cache."""

    def __init__(
        self,
        lengths: list[int],
        queries: list[int],
        *,
        heads: int = 6,
        kv_heads: int = 2,
        head_dim: int = 20,
        block_size: int = 32,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        blocks = [-(-length // block_size) for length in lengths]
        self.caches = torch_ops.new_kv_cache(
            sum(blocks) + 3, kv_heads, head_dim, block_size=block_size, dtype=dtype, device=device
        )
        order = torch.randperm(sum(blocks) + 3, dtype=torch.int32)
        self.table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        self.k, self.v = [], []
        for s, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
            self.table[s, :count], order = order[:count], order[count:]
            k, v = (randn(length, kv_heads, head_dim, dtype=dtype) for _ in range(2))
            places = torch.arange(length)
            slots = self.table[s].long()[places // block_size] * block_size + places % block_size
            torch_ops.kv_cache_write(k.to(device), v.to(device), *self.caches, slots.to(device))
            self.k.append(k)
            self.v.append(v)
        self.table = self.table.to(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.starts = starts.to(device)
        self.q = randn(sum(queries), heads, head_dim, dtype=dtype).to(device)
        self.scale = head_dim**-0.5

    def arguments(self, window: int = 0) -> tuple[Any, ...]:
        return (
            self.q, *self.caches, self.table, self.starts, self.lengths, self.scale, window
        )  # fmt: skip

    def exact(self, window: int = 0) -> Tensor:
        outs = []
        group = self.q.shape[1] // self.k[0].shape[1]
        for s, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            q = self.q[self.starts[s] : self.starts[s + 1]].cpu().double()
            k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
            position = torch.arange(len(k))
            row = position[len(k) - len(q) :, None]
            visible = position <= row
            if window:
                visible &= position > row - window
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(outs)

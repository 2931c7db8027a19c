"""DeInfer's way with a cache of latents, in torch as its implementation is.

In every decode step (arXiv 2604.17709; its `experimental.py`): copy the sequence's latents from
their blocks into one piece, make all K and V of them by products, rotate K, attend.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

BLOCK = 16  # tokens
THETA = 10000.0


class TorchRebuild:
    """Attention of one decoded token over one layer's latents of a sequence.

    Args:
        rotary: Rotate keys.
        heads: Heads, each with K and V of its own.
        head_dim: Elements of a head.
        rank: Of K's and of V's projection.
        context: Tokens of the sequence.
        dtype: Of latents and factors.
    """

    def __init__(
        self,
        *,
        rotary: bool,
        heads: int,
        head_dim: int,
        rank: int,
        context: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Draw latents, factors and the query; the same for all types."""
        numbers = torch.Generator().manual_seed(5)
        blocks, width = -(-context // BLOCK), heads * head_dim
        self.heads, self.head_dim, self.context = heads, head_dim, context

        def normal(*size: int, deviation: float = 1.0) -> Tensor:
            drawn = torch.randn(size, generator=numbers) * deviation
            return drawn.bfloat16().to(dtype)

        self.latents = [normal(blocks, BLOCK, rank) for _ in "kv"]
        self.factors = [normal(width, rank, deviation=rank**-0.5) for _ in "kv"]
        self.query = normal(1, heads, 1, head_dim)
        self.table = torch.randperm(blocks, generator=numbers)
        self.angles: tuple[Tensor, Tensor] | None = None
        if rotary:
            rates = THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
            turns = torch.outer(torch.arange(context, dtype=torch.float64), rates)[:, None]
            self.angles = turns.cos().to(dtype), turns.sin().to(dtype)

    def step(self) -> Tensor:
        """Output [heads * head_dim] of the token."""
        key, value = (
            linear(z[self.table].flatten(0, 1)[: self.context], u).view(
                self.context, self.heads, self.head_dim
            )
            for z, u in zip(self.latents, self.factors, strict=True)
        )
        if self.angles is not None:
            cos, sin = self.angles
            first, second = key.chunk(2, dim=-1)
            key = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        out = scaled_dot_product_attention(
            self.query, key.transpose(0, 1)[None], value.transpose(0, 1)[None]
        )
        return out.flatten()

    @torch.inference_mode()
    def run(self, calls: int) -> list[float]:
        """Seconds of each of `calls` steps."""
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        return times


def checked_rebuild(**sizes: int) -> TorchRebuild:
    """A `TorchRebuild` in bf16 whose output is that of the same steps in float64.

    Raises:
        RuntimeError: It is not, rounding aside.
    """
    made = TorchRebuild(**sizes)  # type: ignore[arg-type]
    with torch.inference_mode():
        want = TorchRebuild(**sizes, dtype=torch.float64).step()  # type: ignore[arg-type]
        error = float((made.step().double() - want).norm() / want.norm())
    if not error < 3e-2:
        raise RuntimeError(f"rebuilding in torch with {sizes} is off by {error:.3g}")
    return made

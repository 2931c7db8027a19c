"""How much perplexity ranks cost, measured on sequences that the factors are not fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from deinfer.decompose.checkpoint import Factors
from deinfer.decompose.reference import install_factors
from deinfer.decompose.streaming import Change, StreamedModel

Cut = Callable[[int], dict[str, Factors]]
"""Gives the factors of a block by name within it."""


def installer(model: StreamedModel, cut: Cut | None) -> Change | None:
    """Make of factors what puts them into blocks."""
    if cut is None:
        return None
    return lambda index, block: install_factors(block, cut(index), model.dtype)


def loss(model: StreamedModel, sequences: Sequence[Sequence[int]], cut: Cut | None = None) -> float:
    """Measure the loss on sequences, block by block.

    Args:
        model: Dense model.
        sequences: Token ids, at least two each; their residual streams are held in memory.
        cut: Factors that replace linears; None measures the dense model.

    Returns:
        Mean negative log-likelihood of a token after the first, in nats.
    """
    streams = model.run(model.embed_all(sequences), installer(model, cut))
    with torch.no_grad():
        total = 0.0
        with model.ends():
            for x, sequence in zip(streams, sequences, strict=True):
                logits = model.logits(x)[:-1].float()
                targets = torch.tensor(list(sequence[1:]))
                total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total / sum(len(s) - 1 for s in sequences)


def search_keep(
    ratio: Callable[[float], float], limit: float, least: float, tolerance: float = 0.005
) -> tuple[float, float]:
    """Find the smallest keep whose perplexity stays within a limit, by bisection.

    Args:
        ratio: Measures the perplexity at a keep / the dense model's.
        limit: Largest ratio allowed, > 1.
        least: Smallest possible keep.
        tolerance: Of the keep that is found.

    Returns:
        The keep, below 1, and its ratio.

    Raises:
        ValueError: No keep that decomposes anything stays within the limit.
    """
    low, high = least, 1.0
    if (reached := ratio(least)) <= limit:
        return least, reached
    best = (1.0, 1.0)
    closest = reached
    while high - low > tolerance:
        middle = (low + high) / 2
        reached = ratio(middle)
        if reached <= limit:
            high, best = middle, (middle, reached)
        else:
            low, closest = middle, reached
    if best[0] == 1.0:
        raise ValueError(
            f"target_ppl_increase {limit} cannot be reached: even keep {low:.4f} has "
            f"{closest if math.isfinite(closest) else math.inf:.4f} times the dense perplexity"
        )
    return best

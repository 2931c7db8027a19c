"""How good predictions of lengths are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def kendall_tau(
    predicted: ArrayLike, actual: ArrayLike, groups: Sequence[str] | None = None
) -> float:
    """Rank correlation tau-b, which corrects for ties.

    Args:
        predicted: [n].
        actual: [n].
        groups: Count only pairs of the same group [n].

    Returns:
        In [-1, 1]; 0 where one side is constant.

    Note:
        O(n^2) memory; collections have thousands of prompts at most.
    """
    x = np.asarray(predicted, np.float64)
    y = np.asarray(actual, np.float64)
    a = np.sign(x[:, None] - x[None, :])
    b = np.sign(y[:, None] - y[None, :])
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        same = group[:, None] == group[None, :]
        a, b = a * same, b * same
    norm = np.sqrt(np.abs(a).sum() * np.abs(b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def pinball(predicted: Floats, actual: Floats, q: float) -> float:
    """Mean quantile loss of predictions of the q-quantile, in tokens."""
    error = actual - predicted
    return float(np.mean(np.maximum(q * error, (q - 1) * error)))


def long_as_short(predicted: Floats, actual: Floats) -> float:
    """Share of the longest fifth of the answers that is ranked in the shorter half.

    Such errors cost a scheduler most: what seems short runs early and stays long.
    """
    longest = actual >= np.quantile(actual, 0.8)
    return float(np.mean(predicted[longest] < np.median(predicted)))


def point_metrics(predicted: Floats, actual: Floats, groups: Sequence[str]) -> dict[str, float]:
    """Judge one number per prompt.

    Args:
        predicted: Tokens [n].
        actual: Tokens [n].
        groups: Source of each [n].

    Returns:
        mae (tokens), acc50 and acc100 (shares within so many tokens), tau, tau_within (pairs of the
        same source only), long_as_short.
    """
    error = np.abs(predicted - actual)
    return {
        "mae": float(error.mean()),
        "acc50": float(np.mean(error <= 50)),
        "acc100": float(np.mean(error <= 100)),
        "tau": kendall_tau(predicted, actual),
        "tau_within": kendall_tau(predicted, actual, groups),
        "long_as_short": long_as_short(predicted, actual),
    }

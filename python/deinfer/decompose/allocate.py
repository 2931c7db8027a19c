"""Choose the rank of every matrix for one global parameter budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RANKS = ("allocated", "uniform")
"""How ranks can be distributed: by what they cost the loss, or the same share for every matrix."""


@dataclass(frozen=True)
class Candidate:
    """One matrix W[n, k] to be given a rank.

    Attributes:
        n: Outputs.
        k: Inputs.
        energies: Loss that each further rank removes [min(n, k)], descending; the matrix loses
            `sum(energies[r:])` at rank r and nothing when it stays dense. One unit for all
            matrices (here: nats per token, see `factorize`).
    """

    n: int
    k: int
    energies: Sequence[float] | NDArray[np.float64]


def candidate_ranks(n: int, k: int, multiple: int) -> list[int]:
    """List the ranks worth storing: r(n + k) < n k, multiples of `multiple`.

    A matrix too small for any multiple below break-even gets every integer rank below it.

    Args:
        n: Outputs.
        k: Inputs.
        multiple: Rank granularity that the kernels like, >= 1.

    Returns:
        Ascending ranks; empty when the matrix can only stay dense.

    Raises:
        ValueError: `multiple` is not positive.
    """
    if multiple < 1:
        raise ValueError(f"rank_multiple {multiple} is not positive")
    last = (n * k - 1) // (n + k)
    return list(range(multiple, last + 1, multiple)) or list(range(1, last + 1))


def least_keep(shapes: Iterable[tuple[int, int]], multiple: int) -> float:
    """Say how little can be kept.

    Args:
        shapes: [n, k] of the matrices.
        multiple: Rank granularity.

    Returns:
        Parameters at the smallest ranks / dense parameters.
    """
    least = total = 0
    for n, k in shapes:
        least += min([r * (n + k) for r in candidate_ranks(n, k, multiple)], default=n * k)
        total += n * k
    return least / total


def choose_ranks(
    candidates: Mapping[str, Candidate], keep: float, multiple: int, ranks: str
) -> dict[str, int | None]:
    """Distribute ranks in one of the ways of `RANKS`; see `allocate_ranks` and `uniform_ranks`."""
    choose = {"allocated": allocate_ranks, "uniform": uniform_ranks}[ranks]
    return choose(candidates, keep, multiple)


def tail_loss(candidate: Candidate, rank: int | None) -> float:
    """Sum up what a matrix loses at a rank (None: dense, nothing), in the unit of its energies."""
    return 0.0 if rank is None else float(np.sum(np.asarray(candidate.energies)[rank:]))


def allocate_ranks(
    candidates: Mapping[str, Candidate], keep: float, multiple: int
) -> dict[str, int | None]:
    """Minimize the total loss under a budget of parameters.

    Lagrangian relaxation: for a price p per parameter each matrix picks the cheapest of its ranks
    and of staying dense on its own, and p is bisected until the budget holds. What the convex
    hull leaves of the budget is then spent on the best single upgrades.

    Args:
        candidates: Matrices by name.
        keep: Parameters of the result / dense parameters, in (0, 1].
        multiple: Rank granularity.

    Returns:
        Rank of each matrix; None means dense.

    Raises:
        ValueError: `keep` is out of range, or below what the smallest ranks need.
    """
    _require_keep(keep)
    options = {name: _options(c, multiple) for name, c in candidates.items()}
    # The last digits of a keep that stands for a whole number of parameters must not cost one.
    budget = int(keep * sum(c.n * c.k for c in candidates.values()) * (1 + 1e-12))
    smallest = sum(int(cost[0]) for _, cost, _ in options.values())
    if budget < smallest:
        total = sum(c.n * c.k for c in candidates.values())
        raise ValueError(
            f"keep {keep} is below {smallest / total:.4f}, the least that "
            f"rank_multiple {multiple} allows"
        )
    scale = max((float(loss[0]) for _, _, loss in options.values()), default=0.0) or 1.0

    def pick(price: float) -> dict[str, int]:
        return {
            name: int(np.argmin(loss / scale + price * cost))
            for name, (_, cost, loss) in options.items()
        }

    def spent(choice: Mapping[str, int]) -> int:
        return sum(int(options[name][1][i]) for name, i in choice.items())

    low, high = 0.0, 1.0
    while spent(pick(high)) > budget:
        high *= 4
    for _ in range(100):
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-3
        if spent(pick(middle)) > budget:
            low = middle
        else:
            high = middle
        if middle < 1e-30 or (low > 0 and high / low < 1 + 1e-9):
            break
    choice = pick(high)
    _spend_rest(options, choice, budget - spent(choice))
    return {name: options[name][0][i] for name, i in choice.items()}


def uniform_ranks(
    candidates: Mapping[str, Candidate], keep: float, multiple: int
) -> dict[str, int | None]:
    """Give every matrix the same share of its parameters (the baseline of the literature).

    Args:
        candidates: Matrices by name; their energies are not read.
        keep: Parameters of the result / dense parameters, in (0, 1].
        multiple: Rank granularity.

    Returns:
        Rank of each matrix, rounded to the nearest allowed one; None means dense.

    Raises:
        ValueError: `keep` is out of range.
    """
    _require_keep(keep)
    ranks: dict[str, int | None] = {}
    for name, c in candidates.items():
        allowed = candidate_ranks(c.n, c.k, multiple)
        target = keep * c.n * c.k / (c.n + c.k)
        ranks[name] = min(allowed, key=lambda r: abs(r - target)) if allowed else None
        if keep == 1.0:
            ranks[name] = None
    return ranks


def parameters(candidate: Candidate, rank: int | None) -> int:
    """Count the stored parameters of a matrix at a rank (None: dense)."""
    c = candidate
    return c.n * c.k if rank is None else rank * (c.n + c.k)


_Options = tuple[list[int | None], NDArray[np.int64], NDArray[np.float64]]


def _options(candidate: Candidate, multiple: int) -> _Options:
    """Ranks with their cost and loss, from the cheapest to dense."""
    energies = np.asarray(candidate.energies, dtype=np.float64)
    if len(energies) != min(candidate.n, candidate.k):
        raise ValueError(f"{len(energies)} energies for a matrix {(candidate.n, candidate.k)}")
    if not np.isfinite(energies).all() or (energies < 0).any():
        raise ValueError("energies must be finite and not negative")
    tail = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    ranks = candidate_ranks(candidate.n, candidate.k, multiple)
    cost = [r * (candidate.n + candidate.k) for r in ranks] + [candidate.n * candidate.k]
    loss = [float(tail[r]) for r in ranks] + [0.0]
    return [*ranks, None], np.array(cost, dtype=np.int64), np.array(loss)


def _spend_rest(options: Mapping[str, _Options], choice: dict[str, int], rest: int) -> None:
    """Upgrade the matrix with the best gain per parameter until nothing fits."""
    while True:
        best: tuple[float, str, int] | None = None
        for name, i in choice.items():
            _, cost, loss = options[name]
            extra, gain = cost[i + 1 :] - cost[i], loss[i] - loss[i + 1 :]
            rate = np.where((extra <= rest) & (gain > 0), gain / np.maximum(extra, 1), 0.0)
            if len(rate) and rate.max() > (best[0] if best else 0.0):
                best = (float(rate.max()), name, i + 1 + int(rate.argmax()))
        if best is None:
            return
        _, name, i = best
        rest -= int(options[name][1][i] - options[name][1][choice[name]])
        choice[name] = i


def _require_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep {keep} is not in (0, 1]")

"""Ranks for all matrices under a budget."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from deinfer.decompose.allocate import (  # noqa: E402
    Candidate,
    allocate_ranks,
    candidate_ranks,
    parameters,
    uniform_ranks,
)
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def random_candidates(seed: int, count: int) -> dict[str, Candidate]:
    """Matrices of mixed shapes with exponential spectra of mixed steepness and scale."""
    rng = np.random.default_rng(seed)
    made = {}
    for i in range(count):
        n, k = (int(d) for d in rng.integers(3, 97, 2))
        decay = np.exp(-np.arange(min(n, k)) * rng.uniform(0.01, 0.5))
        made[f"m{i}"] = Candidate(n, k, 10 ** rng.uniform(-3, 3) * decay)
    return made


def loss(candidates: dict[str, Candidate], ranks: dict[str, int | None]) -> float:
    """Total loss of an allocation."""
    return sum(
        float(np.sum(c.energies[r:])) for name, c in candidates.items() if (r := ranks[name])
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 12),
    keep=st.floats(0.2, 1.0),
    multiple=st.sampled_from([1, 4, 8, 16]),
)
@settings(max_examples=60, deadline=None)
def test_allocation_holds_the_budget(seed: int, count: int, keep: float, multiple: int) -> None:
    candidates = random_candidates(seed, count)
    total = sum(c.n * c.k for c in candidates.values())
    try:
        ranks = allocate_ranks(candidates, keep, multiple)
    except ValueError as error:
        assert "is below" in str(error)
        return
    assert set(ranks) == set(candidates)
    spent = 0
    for name, rank in ranks.items():
        c = candidates[name]
        allowed = candidate_ranks(c.n, c.k, multiple)
        assert rank is None or (rank in allowed and rank * (c.n + c.k) < c.n * c.k)
        spent += parameters(c, rank)
    assert spent <= keep * total * (1 + 1e-12)  # as the last digits of a keep must cost nothing
    uniform = uniform_ranks(candidates, keep, multiple)
    if sum(parameters(c, uniform[name]) for name, c in candidates.items()) <= spent:
        assert loss(candidates, ranks) <= loss(candidates, uniform) * (1 + 1e-9)


def test_allocation_is_monotone_and_dense_at_one() -> None:
    candidates = random_candidates(3, 20)
    losses = [loss(candidates, allocate_ranks(candidates, k, 4)) for k in (0.4, 0.6, 0.8, 0.95)]
    assert losses == sorted(losses, reverse=True)
    assert set(allocate_ranks(candidates, 1.0, 4).values()) == {None}
    assert set(uniform_ranks(candidates, 1.0, 4).values()) == {None}


def test_allocation_prefers_the_steep_spectrum() -> None:
    steep = Candidate(64, 64, np.exp(-np.arange(64.0)))
    flat = Candidate(64, 64, np.ones(64))
    ranks = allocate_ranks({"steep": steep, "flat": flat}, 0.75, 8)
    assert ranks["flat"] is None and ranks["steep"] is not None


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_allocation_refuses_a_bad_keep(keep: float) -> None:
    with pytest.raises(ValueError, match="keep"):
        allocate_ranks(random_candidates(0, 2), keep, 8)


def test_candidate_ranks() -> None:
    assert candidate_ranks(64, 64, 16) == [16]
    assert candidate_ranks(64, 96, 16) == [16, 32]
    assert candidate_ranks(16, 16, 16) == [1, 2, 3, 4, 5, 6, 7]
    assert candidate_ranks(1, 50, 8) == []

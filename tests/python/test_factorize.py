"""The closed form of one matrix: optimal, balanced, and clear about bad input."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from deinfer.decompose import METHODS  # noqa: E402
from deinfer.decompose.factorize import compact_moments, factorize, shrink  # noqa: E402
from deinfer.decompose.method import INPUT_SHRINKAGE, OUTPUT_SHRINKAGE  # noqa: E402
from deinfer.decompose.statistics import LayerStatistics  # noqa: E402
from torch import Tensor  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


SHAPES = [(24, 40), (40, 24), (32, 32)]


def root(moment: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def problem(n: int, k: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random weight and second moments of correlated vectors; singular for few tokens."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = draw(tokens, k) @ (torch.logspace(0, -2, k, dtype=torch.float64)[:, None] * draw(k, k))
    grad = draw(tokens, n) @ draw(n, n)
    return draw(n, k), x.T @ x / tokens, grad.T @ grad / tokens


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("tokens", [400, 7])
@pytest.mark.parametrize("sides", ["both", "inputs", "outputs", "none"])
def test_factors_reach_the_eckart_young_optimum(n: int, k: int, tokens: int, sides: str) -> None:
    weight, inputs, outputs = problem(n, k, tokens)
    a = inputs if sides in ("both", "inputs") else None
    b = outputs if sides in ("both", "outputs") else None
    spectrum = factorize(weight, compact_moments(weight, a, b))
    left = root(b) if b is not None else torch.eye(n, dtype=torch.float64)
    right = root(a) if a is not None else torch.eye(k, dtype=torch.float64)
    singular = torch.linalg.svdvals(left @ weight @ right)
    for rank in (1, 5, 17, min(n, k)):
        u, v = spectrum.factors(rank)
        assert u.shape == (n, rank) and v.shape == (rank, k)
        loss = (left @ (weight - u @ v) @ right).square().sum().item()
        best = singular[rank:].square().sum().item()
        scale = singular.square().sum().item()
        assert abs(loss - best) <= 1e-9 * scale
        assert abs(spectrum.energies[rank:].sum().item() - best) <= 1e-9 * scale


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_full_rank_reproduces_the_weight(n: int, k: int) -> None:
    weight, inputs, outputs = problem(n, k, 400)
    u, v = factorize(weight, compact_moments(weight, inputs, outputs)).factors(min(n, k))
    torch.testing.assert_close(u @ v, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_factors_are_balanced_and_truncation_keeps_them(n: int, k: int) -> None:
    weight, inputs, outputs = problem(n, k, 400)
    spectrum = factorize(weight, compact_moments(weight, inputs, 1e8 * outputs))
    u, v = spectrum.factors(9)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))
    short = spectrum.truncated(9)
    assert torch.equal(short.factors(9)[0], u) and torch.equal(short.energies, spectrum.energies)
    with pytest.raises(ValueError, match="rank 10"):
        short.factors(10)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_zero_moments_are_survived(n: int, k: int) -> None:
    weight, inputs, outputs = problem(n, k, 40)
    for a, b in ((0 * inputs, outputs), (inputs, 0 * outputs)):
        u, v = factorize(weight, compact_moments(weight, a, b)).factors(4)
        assert bool(torch.isfinite(u).all()) and bool(torch.isfinite(v).all())


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_shrinkage_equals_shrinking_the_full_moments(n: int, k: int) -> None:
    weight, a, b = problem(n, k, 30)
    got = shrink(weight, compact_moments(weight, a, b), 0.1, 0.3)
    full_a = 0.9 * a + 0.1 * a.trace() / k * torch.eye(k, dtype=torch.float64)
    full_b = 0.7 * b + 0.3 * b.trace() / n * torch.eye(n, dtype=torch.float64)
    want = compact_moments(weight, full_a, full_b)
    torch.testing.assert_close(got.own, want.own)
    torch.testing.assert_close(got.seen, want.seen)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("tokens", [400, 7])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_reach_the_optimum_of_their_objective(
    n: int, k: int, tokens: int, name: str
) -> None:
    """The objectives as the methods' modules state them, with their shrinkage."""
    weight, a, b = problem(n, k, tokens)
    a_power, b_power = a.trace().item() / k, b.trace().item() / n
    eye_a, eye_b = torch.eye(k, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    shrunk_a = (1 - INPUT_SHRINKAGE) * a + INPUT_SHRINKAGE * a_power * eye_a
    shrunk_b = (1 - OUTPUT_SHRINKAGE) * b + OUTPUT_SHRINKAGE * b_power * eye_b
    full_a, full_b = {
        "svd": (a_power * eye_a, b_power * eye_b),
        "whitened": (shrunk_a, b_power * eye_b),
        "two_sided": (shrunk_a, shrunk_b),
    }[name]
    statistics = LayerStatistics(
        inputs=a if n > k else weight @ a @ weight.T,
        outputs=weight.T @ b @ weight if n > k else b,
        input_power=a_power,
        output_power=b_power,
    )
    spectrum = factorize(weight, METHODS[name].moments(weight, statistics))
    left, right = root(full_b), root(full_a)
    singular = torch.linalg.svdvals(left @ weight @ right)
    scale = singular.square().sum().item()
    for rank in (1, 5, 17, min(n, k)):
        u, v = spectrum.factors(rank)
        loss = (left @ (weight - u @ v) @ right).square().sum().item()
        assert abs(loss - singular[rank:].square().sum().item()) <= 1e-9 * scale
        assert abs(spectrum.energies[rank:].sum().item() - loss) <= 1e-9 * scale


def test_factorize_names_what_is_wrong() -> None:
    weight, inputs, outputs = problem(8, 12, 40)
    moments = compact_moments(weight, inputs, outputs)
    with pytest.raises(ValueError, match="weight has a non-finite"):
        factorize(weight * float("nan"), moments)
    with pytest.raises(ValueError, match=r"\(8, 8\).*\(12, 12\)"):
        factorize(torch.ones(12, 12), moments)
    with pytest.raises(ValueError, match="do not fit"):
        compact_moments(weight, outputs, inputs)

"""Which linears are timed, and what they must reach; nothing here runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common import Check, summary

GEMV_TARGET = 0.95  # of stream-read bandwidth, m = 1
GEMM_TARGET = 0.92  # of the dot instruction's peak, m >= 128
RAGGED_TARGET = 1.05  # time per parameter, against the next multiple of 32
INT8_TARGET = 1.7  # time of bf16 / time of int8
COMPRESSED_TARGET = 1.2  # time of bf16 / time of the same in 12 bits, m = 1
MAX_LIMIT_RATIO = 1.2  # beyond this, the limit was not measured under the same conditions


@dataclass(frozen=True)
class Shape:
    """A linear y[n] = W[n, k] x, or U[n, r] V[r, k] x."""

    n: int
    k: int
    r: int = 0

    @property
    def parameters(self) -> int:
        return self.r * (self.n + self.k) if self.r else self.n * self.k

    def flops(self, m: int) -> float:
        """Floating point operations for m tokens."""
        return 2.0 * m * self.parameters

    def __str__(self) -> str:
        """E.g. 4096x4096 r=1024."""
        return f"{self.n}x{self.k}" + (f" r={self.r}" if self.r else "")


def half_rank(n: int, k: int) -> int:
    """The largest rank whose factors have at most half the parameters of W[n, k]."""
    return n * k // (2 * (n + k))


def next_multiple(value: int, multiple: int) -> int:
    """The lowest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


# Time against two torch linears, by m.
TORCH_SHAPE = Shape(4096, 4096, 1024)
TORCH_TARGETS = {1: 0.38, 8: 0.36, 32: 0.67, 128: 0.91, 512: 0.97}
# Projections of models of 1B to 7B parameters, dense and at half the parameters (1492 is ragged),
# and one ragged rank more; every matrix has at least 8 MB in bf16.
SHAPES = [
    Shape(2048, 5632),
    Shape(4096, 4096),
    Shape(11008, 4096),
    Shape(4096, 11008),
    TORCH_SHAPE,
    Shape(4096, 4096, 1228),
    Shape(11008, 4096, half_rank(11008, 4096)),
    Shape(4096, 11008, half_rank(4096, 11008)),
]
QUICK_SHAPES = [Shape(2048, 2048), TORCH_SHAPE]
RAGGED_SHAPES = [Shape(4096, 4096, r) for r in (751, 114, 1228)]
RAGGED_TOKENS = [1, 128]
INT8_SHAPES = [Shape(4096, 4096), TORCH_SHAPE]
COMPRESSED_TOKENS = list(TORCH_TARGETS)


def tokens_of(shape: Shape, quick: bool) -> list[int]:
    """The m that a shape is timed with."""
    tokens = list(TORCH_TARGETS) if shape == TORCH_SHAPE else [1, 128, 512]
    return [m for m in tokens if m <= 128] if quick else tokens


def round_ratios(above: list[float], below: list[float]) -> dict[str, Any]:
    """Quotients above / below, round by round: median with spread."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def where(shape: Shape, m: int, threads: int) -> str:
    """A case in words, for tables."""
    return f"{shape} m={m}, {threads} thread{'s' if threads > 1 else ''}"


def linear_checks(case: dict[str, Any]) -> list[Check]:
    """The targets of a case, which has shape [n, k, r], m, threads and ratios by name."""
    shape, m = Shape(*case["shape"]), case["m"]
    at = where(shape, m, case["threads"])
    ratios = {name: ratio["median"] for name, ratio in case["ratios"].items()}
    checks = []
    if m == 1:
        checks.append(Check(f"of stream read: {at}", ratios["stream"], GEMV_TARGET))
    if m >= 128:
        checks.append(Check(f"of dot peak: {at}", ratios["peak"], GEMM_TARGET))
    if shape == TORCH_SHAPE:
        checks.append(Check(f"time / torch: {at}", ratios["torch"], TORCH_TARGETS[m], False))
    return checks


def ragged_checks(case: dict[str, Any]) -> list[Check]:
    """The target of a ragged rank's case, whose ratio "per_parameter" is to the even rank."""
    at = where(Shape(*case["shape"]), case["m"], case["threads"])
    value = case["ratios"]["per_parameter"]["median"]
    return [Check(f"ragged / even: {at}", value, RAGGED_TARGET, at_least=False)]


def int8_checks(case: dict[str, Any]) -> list[Check]:
    """The target of int8 against bf16, which only dense weights have."""
    shape = Shape(*case["shape"])
    if shape.r:
        return []
    at = where(shape, case["m"], case["threads"])
    return [Check(f"bf16 / int8 time: {at}", case["ratios"]["bf16"]["median"], INT8_TARGET)]


def compressed_checks(case: dict[str, Any]) -> list[Check]:
    """The targets of bf16 in 12 bits: against 16, where memory limits, and against torch."""
    shape, m = Shape(*case["shape"]), case["m"]
    at = where(shape, m, case["threads"])
    ratios = {name: ratio["median"] for name, ratio in case["ratios"].items()}
    checks = []
    if m == 1:
        checks.append(Check(f"16 / 12 bits, time: {at}", ratios["bf16"], COMPRESSED_TARGET))
    if shape == TORCH_SHAPE:
        target = TORCH_TARGETS[m]
        checks.append(Check(f"12 bits, time / torch: {at}", ratios["torch"], target, False))
    return checks


def limit_check(cases: list[dict[str, Any]]) -> Check:
    """That no case seems faster than the machine, as when something else slowed a limit down."""
    largest = max(case["ratios"][limit]["median"] for case in cases for limit in ("stream", "peak"))
    return Check("largest ratio to a limit", largest, MAX_LIMIT_RATIO, at_least=False)

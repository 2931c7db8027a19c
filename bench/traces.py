"""Workloads for the scheduler: answer lengths, arrivals, and what a predictor would say of them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_TOKENS = 512  # answers are cut there
MAX_BINS = 16  # LengthDistribution::kMaxBins
BUCKET = 50  # tokens; the paper's buckets


@dataclass(frozen=True)
class Lengths:
    """Answer lengths of n queries in tokens, [n] each."""

    served: Ints  # greedy: what the simulated model answers
    longest: Ints  # over several temperatures: what the paper's predictor is trained on

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.served)

    def take(self, index: Ints) -> Lengths:
        """The queries of these numbers."""
        return Lengths(self.served[index], self.longest[index])

    def halves(self) -> tuple[Lengths, Lengths]:
        """Past answers, of which predictors may know, and those to serve."""
        middle = len(self) // 2
        return self.take(np.arange(middle)), self.take(np.arange(middle, len(self)))


def read_lengths(path: Path) -> Lengths:
    """A CSV file with a column per temperature, t0.0 the first: "t0.0,t0.3,..."."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or [] if name.startswith("t")]
        if "t0.0" not in names:
            raise ValueError(f"{path}: no column t0.0 among {reader.fieldnames}")
        rows = np.array([[int(row[name]) for name in names] for row in reader], dtype=np.int64)
    rows = rows.clip(1, MAX_TOKENS)
    return Lengths(rows[:, names.index("t0.0")], rows.max(axis=1))


def synthetic_lengths(n: int, seed: int = 0) -> Lengths:
    """Like an instruction-following model's answers: median about 95 tokens, mean about 120."""
    numbers = np.random.default_rng(seed)
    centre = numbers.normal(4.45, 0.75, n)  # of the logarithm, of a query
    draws = np.exp(centre[:, None] + numbers.normal(0.0, 0.33, (n, 4)))
    tokens = np.rint(draws).astype(np.int64).clip(1, MAX_TOKENS)
    return Lengths(tokens[:, 0], tokens.max(axis=1))


def prompt_tokens(n: int, seed: int) -> Ints:
    """A chat template around short instructions: mean about 62 tokens."""
    numbers = np.random.default_rng(seed)
    return 42 + np.rint(np.exp(numbers.normal(2.75, 0.7, n))).astype(np.int64).clip(1, 400)


def arrivals(n: int, rate: float, seed: int, cv: float = 1.0) -> Floats:
    """Times in s at `rate` per s; gaps are gamma with coefficient of variation cv, 1 is Poisson."""
    gaps = np.random.default_rng(seed).gamma(1 / cv**2, cv**2 / rate, n)
    return np.cumsum(gaps)


@dataclass(frozen=True)
class Refinement:
    """What is expected after every `every` tokens: lengths, probabilities [n, stages, bins]."""

    every: int
    lengths: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Belief:
    """What is expected of each query: lengths and probabilities [n, bins]; NaN is unknown."""

    lengths: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    refined: Refinement | None = None

    @property
    def mean(self) -> Floats:
        """Expected tokens, [n]."""
        return (self.lengths.astype(np.float64) * self.probabilities).sum(axis=1)


def certain(tokens: npt.ArrayLike) -> Belief:
    """Exactly so many tokens."""
    lengths = np.asarray(tokens, dtype=np.float32)[:, None]
    return Belief(lengths, np.ones_like(lengths))


def bins_of(samples: Ints) -> npt.NDArray[np.float32]:
    """Means of equally likely bins of `samples`: MAX_BINS of them."""
    ordered = np.sort(samples)
    if len(ordered) < MAX_BINS:
        ordered = np.repeat(ordered, MAX_BINS)
    return np.array([part.mean() for part in np.array_split(ordered, MAX_BINS)], dtype=np.float32)


def same_for_all(past: Lengths, n: int) -> Belief:
    """The distribution of past answers, for every query."""
    lengths = np.tile(bins_of(past.served), (n, 1))
    return Belief(lengths, np.full_like(lengths, 1 / MAX_BINS))


def up_to_bucket(tokens: npt.ArrayLike) -> Ints:
    """The upper bound of the bucket of BUCKET tokens."""
    return (np.ceil(np.maximum(tokens, 1) / BUCKET) * BUCKET).astype(np.int64)


def told_buckets(longest: Ints, noise: Floats) -> Ints:
    """Buckets that a predictor answers; in the logarithm it shrinks and has this `noise`."""
    logarithm = 4.8 + 0.75 * (np.log(longest) - 4.8) + noise
    return up_to_bucket(np.exp(logarithm).clip(5, MAX_TOKENS))


def noisy_buckets(longest: Ints, seed: int) -> Ints:
    """What a predictor as accurate as the paper's would answer, in buckets.

    In the logarithm it shrinks towards a typical length and adds noise, so that its errors grow
    with the length; on the paper's data it is right within 50 tokens for 56 % and within 100 for
    81 % (paper: 59 % and 81 %), Kendall's tau to what is served is 0.55.
    """
    return told_buckets(longest, np.random.default_rng(seed).normal(0.0, 0.45, len(longest)))


def noisy(past: Lengths, now: Lengths, seed: int) -> Belief:
    """The noisy predictor, its buckets mapped to what past queries in them were served."""
    told = noisy_buckets(past.longest, seed)
    asked = noisy_buckets(now.longest, seed + 1)
    rows = {int(b): bins_of(past.served[told == b]) for b in np.unique(told)}
    lengths = np.array(
        [rows[int(b)] if int(b) in rows else np.full(MAX_BINS, b, np.float32) for b in asked],
        dtype=np.float32,
    )
    return Belief(lengths, np.full_like(lengths, 1 / MAX_BINS))


REFINE_EVERY = 16  # tokens, as the hidden_state head
# Standard deviations of the predictor's error in the logarithm, by generated tokens. The first is
# the paper's predictor, before the answer; with the others the error of the remaining length, over
# that of survival alone, is no smaller than the hidden_state head's on SmolLM2's own answers
# (bench/results/perception.json, "remaining"): see `refined_accuracy`.
REFINED_NOISE = ((0, 0.45), (32, 0.33), (64, 0.27), (128, 0.235), (256, 0.15), (MAX_TOKENS, 0.1))
# Of the error with that of REFINE_EVERY tokens before: an assumption. With 0.97 and 1.0 the gain in
# the drain differed by less than 0.01.
REFINED_CORRELATION = 0.9


def refined_buckets(longest: Ints, seed: int, scale: float = 1.0) -> Ints:
    """What the predictor answers at first and after every REFINE_EVERY tokens, [n, 1 + stages].

    `scale` of the errors, but for the first.
    """
    numbers = np.random.default_rng(seed)
    generated = np.arange(0, MAX_TOKENS, REFINE_EVERY)
    tokens, deviations = np.array(REFINED_NOISE).T
    error = numbers.normal(size=len(longest))
    told = []
    for at, deviation in zip(generated, np.interp(generated, tokens, deviations), strict=True):
        told.append(told_buckets(longest, deviation * (scale if at else 1.0) * error))
        fresh = numbers.normal(size=len(longest))
        error = REFINED_CORRELATION * error + (1 - REFINED_CORRELATION**2) ** 0.5 * fresh
    return np.stack(told, axis=1)


def refining(past: Lengths, now: Lengths, seed: int, scale: float = 1.0) -> Belief:
    """The noisy predictor, which looks again every REFINE_EVERY tokens.

    Its buckets are mapped to what past queries in them were served that were not over by then.
    `scale` of its errors once it has seen a part of the answer.
    """
    told = refined_buckets(past.longest, seed, scale)
    asked = refined_buckets(now.longest, seed + 1, scale)
    lengths = np.empty((*asked.shape, MAX_BINS), np.float32)
    for stage in range(asked.shape[1]):
        alive = past.served > stage * REFINE_EVERY
        anyone = bins_of(past.served[alive]) if alive.any() else np.full(MAX_BINS, MAX_TOKENS)
        for bucket in np.unique(asked[:, stage]):
            same = past.served[alive & (told[:, stage] == bucket)]
            lengths[asked[:, stage] == bucket, stage] = bins_of(same) if len(same) > 4 else anyone
    chances = np.full_like(lengths, 1 / MAX_BINS)
    return Belief(
        lengths[:, 0], chances[:, 0], Refinement(REFINE_EVERY, lengths[:, 1:], chances[:, 1:])
    )


def longest_of_bucket(told: Ints, served: Ints) -> Belief:
    """The longest answer of all that a predictor tells the same of, `told` [n, 1 + stages].

    No policy can know more of a query, as long as what was told is all that it knows: what a policy
    gains with this belief bounds what the predictor can be worth to it.
    """
    lengths = np.ones((*told.shape, 1), np.float32)
    for stage in range(told.shape[1]):
        alive = served > stage * REFINE_EVERY
        for bucket in np.unique(told[alive, stage]):
            same = alive & (told[:, stage] == bucket)
            lengths[same, stage] = served[same].max()
    chances = np.ones_like(lengths)
    refined = Refinement(REFINE_EVERY, lengths[:, 1:], chances[:, 1:])
    return Belief(lengths[:, 0], chances[:, 0], refined if told.shape[1] > 1 else None)


def refined_accuracy(belief: Belief, past: Lengths, now: Lengths) -> dict[str, dict[str, float]]:
    """Of the remaining length by generated tokens: errors over those of survival alone, tau."""
    assert belief.refined is not None
    result = {}
    for generated in (32, 64, 128, 256):
        alive = now.served > generated
        left = now.served[alive] - generated
        survival = np.median(past.served[past.served > generated]) - generated
        stage = generated // belief.refined.every - 1
        expected = np.median(belief.refined.lengths[alive, stage], axis=1) - generated
        error = np.abs(expected - left).mean() / np.abs(survival - left).mean()
        result[str(generated)] = {"mae_over_survival": float(error), "tau": kendall(expected, left)}
    return result


def kendall(a: npt.ArrayLike, b: npt.ArrayLike, most: int = 1500) -> float:
    """Kendall's tau-b of (at most the first `most`) pairs."""
    x, y = np.asarray(a, float)[:most], np.asarray(b, float)[:most]
    signs_x, signs_y = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    ties = np.sqrt(float((signs_x != 0).sum()) * float((signs_y != 0).sum()))
    return float((signs_x * signs_y).sum() / ties) if ties else float("nan")


def accuracy(expected: npt.ArrayLike, served: Ints) -> dict[str, float]:
    """Mean absolute error, shares within 50 and 100 tokens, Kendall's tau."""
    error = np.abs(np.asarray(expected, float) - served)
    return {
        "mae": float(error.mean()),
        "within_50": float((error <= 50).mean()),
        "within_100": float((error <= 100).mean()),
        "tau": kendall(expected, served),
    }

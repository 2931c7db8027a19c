"""What bench/peers.py makes of tokens and seconds: agreement, rates, checks. No input or output."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from common import Check

# Targets of deinfer against the best peer, by batch.
DECODE_TARGETS = {1: 1.5, 8: 1.8, 32: 1.4, 64: 1.3}
PREFILL_TARGET = 1.05
# What a program must share with the reference to be the same model. SmolLM2-135M: 16 bit gives at
# least 0.97 and at most 0.1 logits, int8 0.87 and 1.8; unrotated q and k 0.57 and 16.
MIN_SAME = 0.75
MAX_GAP = 4.0


@dataclass(frozen=True)
class Agreement:
    """How greedy answers compare with the reference's choices."""

    same: float  # share of tokens that the reference would choose too after the same beginning
    gap: float  # largest distance, in logits, of a token below the reference's choice
    prefix: float  # mean share of the reference's own answer before the first difference

    @property
    def ok(self) -> bool:
        """Whether this is the same model.

        `prefix` does not count: where two tokens are about equally likely, rounding to 16 or 8 bit
        takes the other, even the first, and all after it differs. Garbage is many logits away.
        """
        return self.same >= MIN_SAME and self.gap <= MAX_GAP


def agreement(
    expected: list[list[int]],
    answers: list[list[int]],
    choices: list[list[int]],
    gaps: list[list[float]],
    eos: int,
) -> Agreement:
    """Judge answers.

    Args:
        expected: The reference's own answer to each prompt.
        answers: The answers to judge, of the same number and lengths.
        choices: What the reference would choose at each token of `answers`. From where that is
            `eos` on nothing counts: programs differ in how they ignore it.
        gaps: How far below that choice the answer's token is there, in logits.
        eos: End-of-sequence token.

    Raises:
        ValueError: There is nothing to compare, or numbers or lengths differ.
    """
    shapes = [[len(row) for row in rows] for rows in (expected, answers, choices, gaps)]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"lengths differ: {shapes}")
    same, distances, prefixes = [], [], []
    for own, answer, choice, gap in zip(expected, answers, choices, gaps, strict=True):
        length = choice.index(eos) if eos in choice else len(choice)
        same += [a == b for a, b in zip(answer[:length], choice[:length], strict=True)]
        distances += gap[:length]
        length = own.index(eos) if eos in own else len(own)
        equal = [a == b for a, b in zip(own[:length], answer[:length], strict=True)] + [False]
        prefixes.append(equal.index(False) / max(length, 1))
    if not same:
        raise ValueError("nothing to compare: the reference has no answer")
    return Agreement(statistics.mean(same), max(distances), statistics.mean(prefixes))


def prefill_rate(batch: int, prompt: int, first: float) -> float:
    """Prompt tokens/s: all of them over the seconds until each sequence has its first token."""
    return batch * prompt / first


def decode_rate(batch: int, new: int, first: float, last: float) -> float | None:
    """Tokens/s after the first ones, from the seconds for 1 and for `new` tokens each.

    None where `last` does not exceed `first`: noise larger than what was measured.
    """
    return batch * (new - 1) / (last - first) if last > first else None


def best_peer(medians: dict[str, dict[str, float]], key: str) -> tuple[str, float]:
    """The peer with the highest median of `key`, and that median; ("none", NaN) without any."""
    rates = {name: rate[key] for name, rate in medians.items() if key in rate}
    name = max(rates, key=rates.__getitem__, default="none")
    return name, rates.get(name, math.nan)


def speed_checks(
    own: dict[str, float], peers: dict[str, dict[str, float]], batches: list[int]
) -> list[Check]:
    """Ratios of our medians to the best peer's, against the targets.

    Args:
        own: Our median by key, "decode_b8" and "prefill_b8"; a missing one fails its check.
        peers: The same of each peer.
        batches: Batches measured; those without a target get no decode check.
    """
    checks = []
    targets = {f"decode_b{b}": DECODE_TARGETS[b] for b in batches if b in DECODE_TARGETS}
    targets |= {f"prefill_b{b}": PREFILL_TARGET for b in batches}
    for key, target in targets.items():
        name, rate = best_peer(peers, key)
        label = key.replace("_b", ", batch ")
        checks.append(Check(f"{label}, against {name}", own.get(key, math.nan) / rate, target))
    return checks

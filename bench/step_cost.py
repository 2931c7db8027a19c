"""What a step of the running engine costs, fitted as a + b batch + c kv + p prefill."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from deinfer import _C, SamplingParams
from simulation import StepCost
from traces import Floats

DECODE_STEPS = 10
PROMPTS = (16, 128, 320)  # tokens in the cache before decoding
PREFILLS = (32, 128, 448)  # tokens


@dataclass(frozen=True)
class StepSample:
    """A kind of step and how long it took."""

    sequences: int
    kv: int  # tokens read
    prefill: int  # tokens
    ms: float


def fit(samples: list[StepSample]) -> StepCost:
    """Least squares of relative errors, no coefficient below zero."""
    steps = np.array([[1.0, s.sequences, s.kv, s.prefill] for s in samples])
    weights = 1 / np.array([s.ms for s in samples])
    best, least = np.zeros(4), np.inf
    for used in itertools.product((False, True), repeat=4):
        if not any(used):
            continue
        part = steps[:, used] * weights[:, None]
        solution = np.linalg.lstsq(part, np.ones(len(samples)), rcond=None)[0]
        error = float(((part @ solution - 1) ** 2).sum())
        if (solution >= 0).all() and error < least:
            best, least = np.zeros(4), error
            best[list(used)] = solution
    return StepCost(*(float(value) for value in best))


def relative_errors(cost: StepCost, samples: list[StepSample]) -> Floats:
    """Of the fitted cost against each sample."""
    table = np.array([[s.sequences, s.kv, s.prefill, s.ms] for s in samples])
    return cost.ms(table[:, 0], table[:, 1], table[:, 2]) / table[:, 3] - 1


class Stepper:
    """An engine whose steps are timed one by one."""

    def __init__(self, model: Path, max_batch: int, seed: int = 0) -> None:
        tokens = max_batch * (max(PROMPTS) + DECODE_STEPS + 2)
        config = _C.EngineConfig(
            model=str(model),
            max_model_len=1024,
            max_num_seqs=max_batch,
            max_num_batched_tokens=512,
            num_kv_blocks=max(tokens, 1024) // 16 + max_batch,
            enable_prefix_caching=False,
        )
        self.engine = _C.Engine(config)
        self.numbers = random.Random(seed)

    def submit(self, prompt: int, new: int) -> None:
        """A request of random tokens."""
        most = self.engine.model_info.vocab_size
        ids = [self.numbers.randrange(10, most) for _ in range(prompt)]
        params = SamplingParams(max_tokens=new, temperature=0.7, ignore_eos=True, seed=1)
        self.engine.submit(ids, params)

    def step(self) -> float:
        """Milliseconds of a step."""
        begin = time.perf_counter()
        self.engine.step()
        return (time.perf_counter() - begin) * 1e3

    def drain(self) -> None:
        """Step until nothing is left."""
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def decode(self, batch: int, prompt: int) -> StepSample:
        """Steps of `batch` sequences of about `prompt` tokens."""
        for _ in range(batch):
            self.submit(prompt, DECODE_STEPS + 1)
        before = self.engine.stats.prompt_tokens
        while self.engine.stats.prompt_tokens - before < batch * prompt:
            self.engine.step()
        # Prompts end in different steps: only those with all sequences count.
        times = []
        while self.engine.has_unfinished_requests():
            generated = self.engine.stats.generated_tokens
            ms = self.step()
            if self.engine.stats.generated_tokens - generated == batch:
                times.append(ms)
        if not times:
            raise RuntimeError(f"no step had all {batch} sequences; fewer tokens of prefill?")
        kv = batch * (prompt + DECODE_STEPS // 2)
        return StepSample(batch, kv, 0, statistics.median(times))

    def prefill(self, tokens: int) -> StepSample:
        """A step that prefills one prompt."""
        self.submit(tokens, 2)
        ms = self.step()
        self.drain()
        return StepSample(1, tokens, tokens, ms)


def calibrate(model: Path, max_batch: int, rounds: int) -> dict[str, Any]:
    """Measure steps of up to `max_batch` sequences, fit the cost; samples and errors with it."""
    stepper = Stepper(model, max_batch)
    batches = sorted({1, *(2**k for k in range(1, 10) if 2**k < max_batch), max_batch})
    taken: dict[tuple[int, int, int], list[float]] = {}
    for turn in range(-1, rounds):
        samples = [stepper.prefill(tokens) for tokens in PREFILLS]
        for batch in batches:
            # Prefill in steps of 512 tokens must be over before the first sequence ends.
            fitting = [p for p in PROMPTS if batch * p <= 512 * (DECODE_STEPS - 3)]
            samples += [stepper.decode(batch, p) for p in fitting]
        for sample in samples if turn >= 0 else []:
            key = (sample.sequences, sample.kv, sample.prefill)
            taken.setdefault(key, []).append(sample.ms)
    medians = [StepSample(*key, statistics.median(times)) for key, times in taken.items()]
    cost = fit(medians)
    errors = relative_errors(cost, medians)
    return {
        "cost": {"a": cost.a, "b": cost.b, "c": cost.c, "p": cost.p},
        "max_batch": max_batch,
        "largest_relative_error": float(np.abs(errors).max()),
        "samples": [
            {"sequences": s.sequences, "kv": s.kv, "prefill": s.prefill, "ms": s.ms, "error": e}
            for s, e in zip(medians, errors.tolist(), strict=True)
        ],
    }

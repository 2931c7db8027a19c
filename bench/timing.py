"""Interleaved timing: every contestant in every round, on the same cores."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

# calls -> the seconds of each call
Run = Callable[[int], list[float]]
# Idle threads of the last contestant spin for up to some milliseconds before they sleep.
PAUSE = 0.01


def _bind(cpus: set[int]) -> None:
    """Moves every thread of this process, torch's idle ones too, to these cores."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task), cpus)


@contextlib.contextmanager
def cores(threads: int) -> Iterator[None]:
    """The process on its last `threads` cores, and torch with as many threads."""
    available = os.sched_getaffinity(0)
    before = torch.get_num_threads()
    _bind(set(sorted(available)[-threads:]))
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _bind(available)


def interleave(contestants: dict[str, Run], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each contestant in each round: the median of its calls in that round.

    In a round each takes about `seconds`; the first call of its turn is not counted, nor is the
    first round.
    """
    calls = {}
    for name, run in contestants.items():
        calls[name] = max(1, math.ceil(seconds / run(2)[1]))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-1, rounds):
        for name, run in contestants.items():
            time.sleep(PAUSE)
            median = statistics.median(run(calls[name] + 1)[1:])
            if number >= 0:
                samples[name].append(median)
    return samples

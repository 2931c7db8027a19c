"""Static and continuous batching, straightforwardly: what the native scheduler must agree with.

Nothing here knows of KV blocks, preemption or time other than the cost of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BATCH = 16
TABLE = {50: 256, 100: 128, 150: 64, 200: 32}  # upper bound of a bucket: batch size


@dataclass
class Outcome:
    steps: int = 0
    ms: float = 0.0
    rows: int = 0  # steps of each answer's batch, over the answers that were returned
    failed: list[int] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)

    def run(self, members: list[int], prompts, outputs, cap: int, cost) -> list[int]:
        """A static batch; those that had not ended after `cap` tokens."""
        a, b, c, p = cost
        wide = max(prompts[i] for i in members)
        self.ms += p * wide * len(members)
        step = 0
        while step < cap and any(outputs[i] > step for i in members):
            self.ms += a + b * len(members) + c * len(members) * (wide + step)
            step += 1
        cut = [i for i in members if outputs[i] > cap]
        self.steps += step
        self.rows += step * (len(members) - len(cut))
        self.batches.append(members)
        return cut


def buckets_of(group: list[int], expected) -> list[tuple[list[int], int]]:
    """(members, upper bound) of the batches of a sorted group."""
    filled: dict[int, list[int]] = {}
    for i in group:
        filled.setdefault(-(-expected[i] // 50) * 50, []).append(i)
    bounds = sorted(filled)
    batches = []
    for place, bound in enumerate(bounds):
        size = TABLE.get(bound, BATCH)
        members = filled[bound]
        while members:
            batch, members = members[:size], members[size:]
            if len(batch) < max(size // 2, 16) and place + 1 < len(bounds):
                filled[bounds[place + 1]] += batch
            else:
                batches.append((batch, bound))
    return batches


def static(prompts, outputs, cost, expected=None, variable=False, recompute=False, group=256):
    """The paper's method and its parts; sorted within groups where lengths are expected."""
    outcome = Outcome()
    for begin in range(0, len(outputs), group):
        members = list(range(begin, min(begin + group, len(outputs))))
        if expected is not None:
            members.sort(key=lambda i: expected[i])
        if variable:
            batches = buckets_of(members, expected)
        else:
            parts = [members[i : i + BATCH] for i in range(0, len(members), BATCH)]
            bounds = [
                max(expected[i] for i in part) if expected is not None else 0 for part in parts
            ]
            batches = list(zip(parts, bounds, strict=True))
        failed = []
        for batch, bound in batches:
            cap = bound if recompute else max(outputs)
            failed += outcome.run(batch, prompts, outputs, cap, cost)
        for i in range(0, len(failed), BATCH):
            outcome.run(failed[i : i + BATCH], prompts, outputs, max(outputs), cost)
        outcome.failed += failed
    return outcome


def continuous(arrivals_ms, prompts, outputs, cost, slots):
    """First come, first served, with as much memory as it takes; (steps, end times in ms)."""
    a, b, c, p = cost
    now, steps = 0.0, 0
    waiting = list(range(len(outputs)))
    running: dict[int, int] = {}  # tokens generated
    ends = [0.0] * len(outputs)
    while waiting or running:
        if not running and arrivals_ms[waiting[0]] > now:
            now = arrivals_ms[waiting[0]]
        prefill = 0
        while waiting and arrivals_ms[waiting[0]] <= now and len(running) < slots:
            i = waiting.pop(0)
            running[i] = 0
            prefill += prompts[i]
        kv = sum(prompts[i] + done for i, done in running.items())
        now += a + b * len(running) + c * kv + p * prefill
        steps += 1
        for i in list(running):
            running[i] += 1
            if running[i] == outputs[i]:
                ends[i] = now
                del running[i]
    return steps, ends

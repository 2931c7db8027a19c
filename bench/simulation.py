"""The native scheduler before a model that only takes time (bench/native/scheduler_sim.cc)."""

from __future__ import annotations

import csv
import json
from ctypes import POINTER, c_double, c_float, c_int
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import native_cpu
import numpy as np
import numpy.typing as npt
from traces import MAX_BINS, MAX_TOKENS, Belief, Floats, Ints

UNBOUNDED = 1 << 24  # KV tokens, or tokens of a step, that nothing needs


@dataclass(frozen=True)
class StepCost:
    """A step takes a + b sequences + c KV tokens + p prefilled tokens, in milliseconds."""

    a: float
    b: float
    c: float
    p: float

    def ms(self, sequences: Floats, kv: Floats, prefill: Floats) -> Floats:
        """Milliseconds of steps."""
        return self.a + self.b * sequences + self.c * kv + self.p * prefill


# Hugging Face generate() with a 7B model on an A100: a and c from the two static runs that the
# repository of arXiv 2305.13144 reports.
HUGGING_FACE = StepCost(a=27.5, b=0.0, c=0.88e-3, p=0.10)
# A 7B bf16 model under CUDA graphs there: 13.5 GB of weights at 1.7 TB/s, 0.52 MB of KV per token
# at 1.6 TB/s, 13.5 GFLOP per prefilled token at 225 TFLOP/s, 20 us per sampled sequence.
CUDA_GRAPHS = StepCost(a=8.0, b=0.02, c=3.3e-4, p=0.06)


@dataclass(frozen=True)
class Trace:
    """Requests by arrival, [n] each: seconds, prompt and output tokens; and beliefs about them."""

    arrival: Floats
    prompt: Ints
    output: Ints
    belief: Belief | None = None

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.arrival)


def offline(prompt: Ints, output: Ints, belief: Belief | None = None) -> Trace:
    """All requests at once."""
    return Trace(np.zeros(len(output)), prompt, output, belief)


def read_trace(path: Path) -> Trace:
    """A CSV file with columns arrival, prompt, output, and perhaps mean (expected tokens).

    Besides mean, or in its place, there may be length_0, probability_0, length_1, ...: bins. An
    empty field is unknown.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path}: no requests")
    missing = {"arrival", "prompt", "output"} - set(rows[0])
    if missing:
        raise ValueError(f"{path}: no column {sorted(missing)}")

    def column(name: str) -> Floats:
        return np.array([float(row[name] or "nan") for row in rows])

    order = np.argsort(column("arrival"), kind="stable")
    bins = [i for i in range(MAX_BINS) if f"length_{i}" in rows[0]]
    belief = None
    if bins:
        lengths = np.stack([column(f"length_{i}") for i in bins], axis=1)
        chances = np.stack([column(f"probability_{i}") for i in bins], axis=1)
        belief = Belief(lengths[order].astype(np.float32), chances[order].astype(np.float32))
    elif "mean" in rows[0]:
        lengths = column("mean")[order][:, None].astype(np.float32)
        belief = Belief(lengths, np.ones_like(lengths))
    return Trace(
        column("arrival")[order],
        column("prompt")[order].astype(np.int64),
        column("output")[order].astype(np.int64),
        belief,
    )


def settings(
    *,
    slots: int,
    cost: StepCost,
    kv_tokens: int = UNBOUNDED,
    block_size: int = 16,
    step_tokens: int = 2048,
    max_tokens: int = MAX_TOKENS,
    **rest: Any,
) -> dict[str, Any]:
    """What `simulate` needs; `rest`: policy and the scheduler's other settings by name.

    Static batches (`static`) are the paper's: they have all the step tokens that they want, and
    are padded.
    """
    if "static" in rest:
        step_tokens = UNBOUNDED
        rest = {"policy": "static_bucket", "padded": True, "admission": "prompt", **rest}
    return {
        "max_num_seqs": slots,
        "max_num_batched_tokens": step_tokens,
        "block_size": block_size,
        "num_blocks": kv_tokens // block_size,
        "max_tokens": max_tokens,
        "cost": asdict(cost),
        **rest,
    }


def static(batch_size: int = 16, **changes: Any) -> dict[str, Any]:
    """Static batches by arrival, or as `changes` to StaticBatchConfig say."""
    plain = {"sort": False, "bucket_tokens": 0, "collect_failures": False}
    return {"batch_size": batch_size, **plain, **changes}


# The paper: sorted within 256, variable batch sizes, failures recomputed from the prompt.
PAPER = {"group": 256, "restart_failures": True}


def simulate(trace: Trace, options: dict[str, Any]) -> dict[str, Any]:
    """Serve the trace; times in seconds, lengths in tokens.

    `effective` is the share of generated or regenerated rows that returned a token: padding and
    what is computed again are the rest. `average_length` is the rows per answer.
    """
    n = len(trace)
    arrival = np.ascontiguousarray(trace.arrival, dtype=np.float64)
    prompt = np.ascontiguousarray(trace.prompt, dtype=np.intc)
    output = np.ascontiguousarray(trace.output, dtype=np.intc)
    nothing = np.empty((n, 0), np.float32)
    belief = trace.belief or Belief(nothing, nothing)
    lengths, chances = belief.lengths[:, None], belief.probabilities[:, None]
    stages, every = 0, 1
    if belief.refined is not None:
        lengths = np.concatenate([lengths, belief.refined.lengths], axis=1)
        chances = np.concatenate([chances, belief.refined.probabilities], axis=1)
        stages, every = lengths.shape[1] - 1, belief.refined.every
    lengths = np.ascontiguousarray(lengths, dtype=np.float32)
    chances = np.ascontiguousarray(chances, dtype=np.float32)
    start, first, end = np.empty(n), np.empty(n), np.empty(n)

    def pointer(array: npt.NDArray[Any], kind: Any) -> Any:
        return array.ctypes.data_as(POINTER(kind))

    text = native_cpu.call(
        "schedule",
        json.dumps(options).encode(),
        n,
        pointer(arrival, c_double),
        pointer(prompt, c_int),
        pointer(output, c_int),
        lengths.shape[2],
        stages,
        every,
        pointer(lengths, c_float),
        pointer(chances, c_float),
        *(pointer(times, c_double) for times in (start, first, end)),
    )
    report: dict[str, Any] = json.loads(text)
    generated = int(output.sum())
    if options.get("padded"):
        rows = report.pop("returned_rows")
    else:
        rows = generated + report["recomputed_tokens"]
        report.pop("returned_rows")
    latency, ttft = end - arrival, first - arrival
    return {
        "throughput": n / report["seconds"],
        "tokens_per_s": generated / report["seconds"],
        "effective": generated / rows,
        "average_length": rows / n,
        "latency": spread(latency),
        "ttft": spread(ttft),
        "s_per_token": float((latency / output).mean()),
        "max_wait": float((start - arrival).max()),
        **report,
    }


def spread(values: Floats) -> dict[str, float]:
    """Mean and percentiles."""
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"mean": float(values.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def soak(options: dict[str, Any], requests: int, waiting: int) -> dict[str, Any]:
    """Planning times over `requests` requests with `waiting` in the queue, growth of memory."""
    text = native_cpu.call("schedule_soak", json.dumps(options).encode(), requests, waiting)
    report: dict[str, Any] = json.loads(text)
    return report

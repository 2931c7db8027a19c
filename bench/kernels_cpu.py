"""Our CPU linears against torch and against the machine's limits, in one run.

Every shape is verified first: its error against float64 may not exceed that of torch's bf16 linear
on the same inputs. Then it is timed over copies of its weights that together exceed the caches, in
rounds in which every contestant takes its turn on the same cores: reading a stream of memory, the
dot instruction on registers, ours, torch. Ratios are taken within a round; their median counts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import native_cpu as native
import torch
from common import ROOT, Check, environment, finish, summary
from linear_cases import (
    COMPRESSED_TOKENS,
    INT8_SHAPES,
    QUICK_SHAPES,
    RAGGED_SHAPES,
    RAGGED_TOKENS,
    SHAPES,
    Shape,
    compressed_checks,
    int8_checks,
    limit_check,
    linear_checks,
    next_multiple,
    ragged_checks,
    round_ratios,
    tokens_of,
    where,
)
from timing import Run, cores, interleave
from torch.nn.functional import linear as torch_linear

Weights = tuple[torch.Tensor, ...]  # (W[n, k],) or (U[n, r], V[r, k])
Samples = dict[str, list[float]]  # seconds per call in each round
MAX_ERROR = 0.02  # relative: more is a wrong result, not rounding


def random_weights(shape: Shape) -> Weights:
    """bf16 weights whose outputs are about as large as their inputs."""
    numbers = torch.Generator().manual_seed(1)
    sizes = [(shape.n, shape.r), (shape.r, shape.k)] if shape.r else [(shape.n, shape.k)]
    return tuple(
        (torch.randn(size, generator=numbers) / size[1] ** 0.5).bfloat16() for size in sizes
    )


def random_inputs(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(2)).bfloat16()


def apply(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """One torch linear, or two."""
    for weight in reversed(weights):
        x = torch_linear(x, weight)
    return x


def apply_exactly(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The same in float64."""
    return apply(x.double(), tuple(weight.double() for weight in weights))


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def torch_run(x: torch.Tensor, sets: list[Weights]) -> Run:
    """The torch linears by turns, as native.Rotation runs ours."""
    turn = 0

    def run(calls: int) -> list[float]:
        nonlocal turn
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            apply(x, sets[turn % len(sets)])
            times.append(time.perf_counter() - start)
            turn += 1
        return times

    return run


class Limits:
    """The machine's limits as contestants, beside linears that read and compute so much a call."""

    def __init__(
        self, team: native.Team, stream: native.Stream, weight_bytes: float, flops: float
    ) -> None:
        self.weight_bytes = weight_bytes
        self.flops = flops
        self.slice_bytes = stream.slice_bytes(team)
        self.peak = native.Peak(team, flops)
        self.runs: dict[str, Run] = {
            "stream": lambda calls: stream.run(team, calls),
            "peak": self.peak.run,
        }

    def ratios(self, samples: Samples, name: str) -> dict[str, Any]:
        """Of each limit, which share the contestant `name` reached."""
        streams, peaks = self.weight_bytes / self.slice_bytes, self.flops / self.peak.flops
        return {
            "stream": round_ratios([streams * t for t in samples["stream"]], samples[name]),
            "peak": round_ratios([peaks * t for t in samples["peak"]], samples[name]),
        }


class Bench:
    """The sections of the benchmark, and what they have found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.threads: list[int] = options.threads
        self.rounds: int = options.rounds
        self.quick: bool = options.quick
        self.seconds = 0.02 if self.quick else 0.06
        self.rotated_bytes = (100 if self.quick else 400) * 10**6
        self.packers = native.Team(max(self.threads))
        self.stream = native.Stream(self.packers, (256 if self.quick else 1024) << 20)
        self.checks: list[Check] = []
        self.results: dict[str, Any] = {}

    # --- what the sections share ----------------------------------------------------------------

    def on_each_team(self, body: Callable[[native.Team], None]) -> None:
        """Runs body with each number of threads, on as many cores."""
        for threads in self.threads:
            with cores(threads), torch.inference_mode():
                body(native.Team(threads))

    def pack(self, dtype: str, weights: Weights) -> list[native.Linear]:
        """Copies that together exceed the caches."""
        first = native.Linear(self.packers, dtype, weights)
        copies = max(2, round(self.rotated_bytes / first.bytes))
        return [first, *(native.Linear(self.packers, dtype, weights) for _ in range(copies - 1))]

    def interleave(self, runs: dict[str, Run]) -> Samples:
        """The contestants in this run's rounds."""
        return interleave(runs, self.rounds, self.seconds)

    def keep(
        self,
        section: str,
        checks_of: Callable[[dict[str, Any]], list[Check]],
        case: tuple[Shape, int, int],
        ratios: dict[str, Any],
        samples: Samples,
    ) -> None:
        """Prints a case (shape, m, threads) and keeps it; samples but for those of limits."""
        shape, m, threads = case
        result = {
            "shape": [shape.n, shape.k, shape.r],
            "m": m,
            "threads": threads,
            "ratios": ratios,
            "seconds": {n: summary(t) for n, t in samples.items() if n not in ("stream", "peak")},
        }
        self.results.setdefault(section, []).append(result)
        self.checks += checks_of(result)
        values = {name: ratio["median"] for name, ratio in ratios.items()}
        text = "".join(f"  {name} {value:.3f}" for name, value in values.items())
        times = {name: t["median"] for name, t in result["seconds"].items()}
        text += "".join(f"  {name} {value * 1e3:.3f} ms" for name, value in times.items())
        print(f"{where(*case):38}{text}", flush=True)

    # --- sections -------------------------------------------------------------------------------

    def limits(self) -> None:
        """The limits by themselves; cases are compared with those of their own rounds."""

        def measure(team: native.Team) -> None:
            limits = Limits(team, self.stream, 0, 0)
            samples = self.interleave(limits.runs)
            size, flops = limits.slice_bytes, limits.peak.flops
            found: dict[str, Any] = {
                "threads": team.threads,
                "stream_gb_s": summary([size / t * 1e-9 for t in samples["stream"]]),
                "peak_gflop_s": summary([flops / t * 1e-9 for t in samples["peak"]]),
            }
            self.results.setdefault("limits", []).append(found)
            print(
                f"{team.threads} threads: stream read {found['stream_gb_s']['median']:.1f} GB/s, "
                f"{native.instruction()} {found['peak_gflop_s']['median']:.0f} GFLOP/s"
            )

        self.on_each_team(measure)

    def verify(
        self, shape: Shape, weights: Weights, linear: native.Linear, tokens: list[int]
    ) -> None:
        """Error against float64 beside that of torch's bf16 linears."""
        x = random_inputs(max(tokens), shape.k)
        exact = apply_exactly(x, weights)
        errors = {}
        for m in tokens:
            ours = relative_error(native.Rotation(self.packers, [linear], x[:m]).once(), exact[:m])
            errors[m] = {"ours": ours, "torch": relative_error(apply(x[:m], weights), exact[:m])}
            if not ours <= MAX_ERROR:
                raise SystemExit(f"{shape} m={m}: wrong result, relative error {ours:.3g}")
        self.results.setdefault("errors", {})[str(shape)] = errors
        worst = max(error["ours"] / error["torch"] for error in errors.values())
        self.checks.append(Check(f"error / torch's: {shape}", worst, 1.0, at_least=False))

    def linears(self, shape: Shape) -> None:
        """A shape against stream read, dot peak and torch."""
        weights = random_weights(shape)
        linears = self.pack("bfloat16", weights)
        tokens = tokens_of(shape, self.quick)
        self.verify(shape, weights, linears[0], tokens)
        sets = [tuple(weight.clone() for weight in weights) for _ in linears]

        def measure(team: native.Team) -> None:
            for m in tokens:
                x = random_inputs(m, shape.k)
                limits = Limits(team, self.stream, linears[0].bytes, shape.flops(m))
                ours = native.Rotation(team, linears, x)
                runs = {**limits.runs, "ours": ours.run, "torch": torch_run(x, sets)}
                samples = self.interleave(runs)
                ratios = limits.ratios(samples, "ours")
                ratios["torch"] = round_ratios(samples["ours"], samples["torch"])
                self.keep("linears", linear_checks, (shape, m, team.threads), ratios, samples)

        self.on_each_team(measure)

    def ragged(self, shape: Shape) -> None:
        """A ragged rank against the next multiple of 32, per parameter."""
        even = Shape(shape.n, shape.k, next_multiple(shape.r, 32))
        linears = {}
        for name, each in (("ragged", shape), ("even", even)):
            weights = random_weights(each)
            linears[name] = self.pack("bfloat16", weights)
            self.verify(each, weights, linears[name][0], RAGGED_TOKENS)

        def measure(team: native.Team) -> None:
            for m in RAGGED_TOKENS:
                x = random_inputs(m, shape.k)
                samples = self.interleave(
                    {name: native.Rotation(team, each, x).run for name, each in linears.items()}
                )
                per_parameter = round_ratios(
                    [t / shape.parameters for t in samples["ragged"]],
                    [t / even.parameters for t in samples["even"]],
                )
                self.keep(
                    "ragged",
                    ragged_checks,
                    (shape, m, team.threads),
                    {"per_parameter": per_parameter},
                    samples,
                )

        self.on_each_team(measure)

    def can_be(self, dtype: str) -> bool:
        """Whether weights can have this type here; says why not."""
        try:
            native.Linear(self.packers, dtype, random_weights(Shape(32, 64)))
        except RuntimeError as error:
            print(f"{dtype} is left out: {error}")
            return False
        return True

    def int8(self, shape: Shape) -> None:
        """int8 weights with bf16 activations against our own bf16 weights, m = 1."""
        weights = random_weights(shape)
        linears = {name: self.pack(name, weights) for name in ("bfloat16", "int8")}
        x = random_inputs(1, shape.k)
        exact = apply_exactly(x, weights)
        result = native.Rotation(self.packers, linears["int8"][:1], x).once()
        errors = {
            "kernel": relative_error(result, apply_exactly(x, linears["int8"][0].unpack())),
            "quantization": relative_error(result, exact),
            "torch bf16": relative_error(apply(x, weights), exact),
        }
        self.results.setdefault("int8_errors", {})[str(shape)] = errors
        ratio = errors["kernel"] / errors["torch bf16"]
        self.checks.append(Check(f"int8 error / torch's: {shape}", ratio, 1.0, at_least=False))

        def measure(team: native.Team) -> None:
            limits = Limits(team, self.stream, linears["int8"][0].bytes, shape.flops(1))
            ours = {name: native.Rotation(team, each, x).run for name, each in linears.items()}
            samples = self.interleave({**limits.runs, **ours})
            ratios = limits.ratios(samples, "int8")
            ratios["bf16"] = round_ratios(samples["bfloat16"], samples["int8"])
            self.keep("int8", int8_checks, (shape, 1, team.threads), ratios, samples)

        self.on_each_team(measure)

    def compressed(self, shape: Shape) -> None:
        """bf16 weights in 12 bits against the same in 16; their results must have the same bits."""
        weights = random_weights(shape)
        linears = {name: self.pack(name, weights) for name in ("bfloat16", "compressed")}
        for m in COMPRESSED_TOKENS:
            x = random_inputs(m, shape.k)
            results = [native.Rotation(self.packers, e[:1], x).once() for e in linears.values()]
            if not torch.equal(*results):
                raise SystemExit(f"{shape} m={m}: compressed weights give another result")

        sets = [tuple(weight.clone() for weight in weights) for _ in linears["bfloat16"]]

        def measure(team: native.Team) -> None:
            for m in COMPRESSED_TOKENS:
                x = random_inputs(m, shape.k)
                limits = Limits(team, self.stream, linears["compressed"][0].bytes, shape.flops(m))
                ours = {name: native.Rotation(team, each, x).run for name, each in linears.items()}
                samples = self.interleave({**limits.runs, **ours, "torch": torch_run(x, sets)})
                ratios = limits.ratios(samples, "compressed")
                ratios["bf16"] = round_ratios(samples["bfloat16"], samples["compressed"])
                ratios["torch"] = round_ratios(samples["compressed"], samples["torch"])
                self.keep(
                    "compressed", compressed_checks, (shape, m, team.threads), ratios, samples
                )

        self.on_each_team(measure)

    def run(self) -> None:
        """All sections."""
        self.limits()
        for shape in QUICK_SHAPES if self.quick else SHAPES:
            self.linears(shape)
        for shape in RAGGED_SHAPES[:1] if self.quick else RAGGED_SHAPES:
            self.ragged(shape)
        for dtype, section in (("int8", self.int8), ("compressed", self.compressed)):
            if self.can_be(dtype):
                for shape in INT8_SHAPES:
                    section(shape)
        sections = ("linears", "int8", "compressed")
        cases = [case for section in sections for case in self.results.get(section, [])]
        self.checks.append(limit_check(cases))


def thread_counts(wanted: list[int] | None) -> list[int]:
    """One thread and all cores, or those wanted; more than there are cores are refused."""
    available = len(os.sched_getaffinity(0))
    counts = sorted(set(wanted or [1, available]))
    if counts[0] < 1 or counts[-1] > available:
        raise SystemExit(f"--threads {counts}: this process has {available} cores")
    return counts


def main() -> None:
    """Run the comparison and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all cores")
    parser.add_argument("--rounds", type=int, help="default: 9, or 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="few shapes, to see that it works")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--out", type=Path, help="default: bench/results, build with --quick")
    options = parser.parse_args()
    options.threads = thread_counts(options.threads)
    if options.rounds is None:
        options.rounds = 2 if options.quick else 9
    if options.rounds < 1:
        raise SystemExit(f"--rounds {options.rounds}: there must be at least 1")
    if options.quick and options.out is None:
        options.out = ROOT / "build" / "kernels_cpu-quick.json"

    bench = Bench(options)
    bench.results = {
        "name": "kernels_cpu",
        **environment(),
        "isa": native.isa(),
        "peak_instruction": native.instruction(),
        "torch": torch.__version__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "quick": options.quick,
        "rounds": options.rounds,
    }
    bench.run()
    finish("kernels_cpu", bench.results, bench.checks, options.out, options.check)


if __name__ == "__main__":
    main()

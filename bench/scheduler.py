"""Scheduling policies in simulation: the real scheduler before a model that only takes time.

Reproduces the static batches of arXiv 2305.13144, compares continuous batching with them, and the
policies by expected length with first come, first served at the same load: offline with scarce KV,
offline with a tail to drain, online below, near and above saturation. Costs of a step are those of
a 7B model on an A100 (simulation.CUDA_GRAPHS) unless --cost FILE says otherwise; --calibrate MODEL
fits them on this machine's engine and writes such a file. Without --lengths, lengths are synthetic.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import schedule_experiments as experiments
from common import ROOT, Check, environment, finish
from schedule_plots import plot_all
from simulation import CUDA_GRAPHS, StepCost, read_trace, settings, simulate, soak
from traces import read_lengths, synthetic_lengths

POLICIES = ("fcfs", "hrrn", "sjf", "length_bucket", "longest_tail")
SOAK_WAITING = 10_000
SOAK_RUNNING = 256


def reference_module(path: Path) -> Any:
    """The simulator research/sim.py, or one like it."""
    spec = importlib.util.spec_from_file_location("reference_sim", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def print_rows(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A table of means over seeds; gains are over the first row."""
    print(f"\n{title}")
    print(
        f"{'':34}{'req/s':>8}{'gain':>8}{'mean s':>9}{'gain':>7}{'p99 s':>9}{'TTFT':>8}"
        f"{'wait':>8}{'preempt':>9}{'recomp':>8}"
    )
    base: dict[str, Any] | None = None
    for name, row in rows.items():
        base = base or row
        print(
            f"{name:34}{row['throughput']:8.2f}{row['throughput'] / base['throughput']:8.3f}"
            f"{row['mean']:9.2f}{base['mean'] / row['mean']:7.2f}{row['p99']:9.2f}"
            f"{row['ttft']:8.2f}{row['max_wait']:8.1f}{row['preemptions']:9.0f}"
            f"{row['recomputed_share']:8.1%}",
            flush=True,
        )


def soak_checks(requests: int, results: dict[str, Any]) -> list[Check]:
    """Every policy with 256 running and 10,000 waiting: planning time and memory."""
    checks = []
    results["soak"] = {}
    for policy in POLICIES:
        options = settings(
            slots=SOAK_RUNNING, cost=CUDA_GRAPHS, kv_tokens=SOAK_RUNNING * 400, policy=policy
        )
        report = soak(options, requests // len(POLICIES), SOAK_WAITING)
        grown = (report["late_bytes"] - report["early_bytes"]) / report["early_bytes"]
        results["soak"][policy] = {**report, "grown": grown}
        mean = report["planning"]["mean_us"]
        print(
            f"soak {policy:14} planning mean {mean:6.1f} us, p99 "
            f"{report['planning']['p99_us']:6.1f} us; memory {grown:+.2%}",
            flush=True,
        )
        checks.append(Check(f"soak, {policy}: planning per step, us", mean, 50, False))
        checks.append(Check(f"soak, {policy}: growth of memory", grown, 0.02, False))
    return checks


def main() -> None:
    """Run the experiments and write the results file and the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path, help="CSV with columns t0.0, t0.3, ...")
    parser.add_argument(
        "--trace", type=Path, help="CSV: arrival, prompt, output[, mean]; only that"
    )
    parser.add_argument("--reference", type=Path, help="sim.py, to reproduce its static batches")
    parser.add_argument("--cost", type=Path, help="JSON file of --calibrate")
    parser.add_argument("--calibrate", type=Path, metavar="MODEL", help="fit the cost, then stop")
    parser.add_argument("--slots", type=int, default=16, help="--trace, --calibrate: seats")
    parser.add_argument("--kv-tokens", type=int, default=20_000, help="--trace: KV tokens")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument(
        "--soak",
        type=int,
        metavar="N",
        help="only a soak of N requests: planning times and memory, into scheduler_soak.json",
    )
    parser.add_argument("--quick", action="store_true", help="small loads: a smoke test")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--out", type=Path, help="default: bench/results/scheduler.json")
    options = parser.parse_args()

    if options.calibrate:
        from step_cost import calibrate

        fitted = calibrate(options.calibrate, options.slots, rounds=3)
        file = options.out or ROOT / "build" / "step_cost.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(fitted, indent=2))
        print(f"{fitted['cost']}, largest error {fitted['largest_relative_error']:.1%}: {file}")
        return
    cost = CUDA_GRAPHS
    if options.cost:
        cost = StepCost(**json.loads(options.cost.read_text())["cost"])
    if options.trace:
        trace = read_trace(options.trace)
        common = {"slots": options.slots, "kv_tokens": options.kv_tokens, "cost": cost}
        rows = {
            policy: experiments.summarize([simulate(trace, settings(policy=policy, **common))])
            for policy in POLICIES
        }
        print_rows(f"{options.trace}: {len(trace)} requests", rows)
        return

    results: dict[str, Any]
    if options.soak:
        results = {"name": "scheduler_soak", **environment(), "requests": options.soak}
        found = soak_checks(options.soak, results)
        finish("scheduler_soak", results, found, options.out, options.check)
        return

    lengths = read_lengths(options.lengths) if options.lengths else synthetic_lengths(8000)
    load = experiments.Load(lengths, cost, seeds=options.seeds, quick=options.quick)
    results = {
        "name": "scheduler",
        **environment(),
        "lengths": options.lengths.name if options.lengths else "synthetic",
        "cost": vars(cost),
        "seeds": options.seeds,
        "predictor": load.predictor_accuracy(),
        "experiments": {},
    }
    checks: list[Check] = []
    if options.reference:
        sys.path.insert(0, str(options.reference.parent))
        results["reproduction"], found = experiments.reproduce(
            load, reference_module(options.reference)
        )
        checks += found
    for name, experiment in experiments.EXPERIMENTS.items():
        rows = experiment(load)
        results["experiments"][name] = rows
        print_rows(f"{name}: {experiment.__doc__}", rows)
    checks += experiments.target_checks(results["experiments"])
    file = options.out or ROOT / "bench" / "results" / "scheduler.json"
    plot_all(results["experiments"], file.parent)
    finish("scheduler", results, checks, options.out, options.check)


if __name__ == "__main__":
    main()

"""What every benchmark needs: where it ran, medians with spread, checks, result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def environment() -> dict[str, Any]:
    """Device, commit and date of this run."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "device": f"{model}, {len(os.sched_getaffinity(0))} cores",
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
        "load_before": os.getloadavg()[0],
    }


def summary(samples: list[float]) -> dict[str, Any]:
    """Median with the spread of the samples."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": samples,
    }


@dataclass(frozen=True)
class Check:
    """A measured value against its target: `at_least` it, or else at most."""

    name: str
    value: float
    target: float
    at_least: bool = True

    @property
    def ok(self) -> bool:
        """Whether the value meets its target (NaN does not)."""
        return self.value >= self.target if self.at_least else self.value <= self.target

    def row(self) -> dict[str, Any]:
        """The check as it stands in a results file."""
        return {**asdict(self), "ok": self.ok}


def finish(
    name: str, results: dict[str, Any], checks: list[Check], path: Path | None, strict: bool
) -> None:
    """Print the table of checks and write the results file.

    With `strict` (a script's --check), exits with status 1 when a check falls short.
    """
    width = max([len(check.name) for check in checks] + [5])
    print(f"\n{'check':{width}} | {'value':>9} | {'target':>10} | ok")
    for check in checks:
        target = f"{'>=' if check.at_least else '<='} {check.target:.4g}"
        ok = "yes" if check.ok else "NO"
        print(f"{check.name:{width}} | {check.value:9.4g} | {target:>10} | {ok}")
    results["checks"] = [check.row() for check in checks]
    print(f"wrote {write_results(name, results, path)}")
    if strict and not all(check.ok for check in checks):
        sys.exit(1)


def write_results(name: str, results: dict[str, Any], path: Path | None = None) -> Path:
    """Write `results` to bench/results/NAME.json, or to `path`."""
    file = path or ROOT / "bench" / "results" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    return file

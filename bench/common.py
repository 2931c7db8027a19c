"""What every benchmark needs: where it ran, medians with spread, result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
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


def write_results(name: str, results: dict[str, Any], path: Path | None = None) -> Path:
    """Write `results` to bench/results/NAME.json, or to `path`."""
    file = path or ROOT / "bench" / "results" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    return file

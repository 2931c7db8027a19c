"""Plots of bench/scheduler.py, one PNG per question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

Rows = dict[str, dict[str, Any]]


def _gains(rows: Rows, key: str, inverse: bool = False) -> tuple[list[str], list[float]]:
    base = next(iter(rows.values()))[key]
    values = [base / row[key] if inverse else row[key] / base for row in rows.values()]
    return list(rows), values


def _bars(axes: Any, names: list[str], values: list[float], title: str) -> None:
    places = range(len(names))[::-1]
    axes.barh(places, values, color=["0.6"] + ["tab:blue"] * (len(names) - 1))
    axes.set_yticks(places, names, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    for place, value in zip(places, values, strict=True):
        axes.text(value, place, f" {value:.2f}", va="center", fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.15)


def plot_throughput(tables: dict[str, Rows], path: Path) -> None:
    """Offline: throughput over the first row of each table."""
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4))
    titles = {
        "over_static": "16 seats: over static batches of 16",
        "kv_bound": "KV-bound: over admitting what fits",
        "drain": "1,024 requests, 256 seats: over fcfs",
    }
    for place, (table, title) in zip(axes, titles.items(), strict=True):
        _bars(place, *_gains(tables[table], "throughput"), f"throughput, {title}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_latency(tables: dict[str, Rows], path: Path) -> None:
    """Online: mean latency against the longest wait, over fcfs at the same load."""
    names = ["bursts", "overload", "overload_kv"]  # below saturation all policies are the same
    figure, axes = pyplot.subplots(1, len(names), figsize=(14, 4))
    for place, table in zip(axes, names, strict=True):
        rows = tables[table]
        base = rows["fcfs"]
        for name, row in rows.items():
            if name.startswith("length_bucket"):
                continue  # beside sjf
            gain = base["mean"] / row["mean"]
            wait = max(row["max_wait"], 1e-3) / max(base["max_wait"], 1e-3)
            marker = "o" if "oracle" in name else "s"
            place.scatter(gain, wait, marker=marker, s=30)
            place.annotate(
                name, (gain, wait), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
        place.set_yscale("log")
        place.set_xlabel("mean latency, times better than fcfs")
        place.set_title(table, fontsize=9)
        place.margins(0.2)
    axes[0].set_ylabel("longest wait, times that of fcfs")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_all(tables: dict[str, Rows], folder: Path) -> None:
    """Write scheduler_throughput.png and scheduler_latency.png."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_throughput(tables, folder / "scheduler_throughput.png")
    plot_latency(tables, folder / "scheduler_latency.png")

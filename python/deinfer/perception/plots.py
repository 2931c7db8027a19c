"""Plots of an evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deinfer.perception.evaluate import Evaluation


def plot(evaluation: Evaluation, directory: Path, stem: str = "perception") -> list[Path]:
    """Draw predicted against real lengths, and how reliable the quantiles are.

    Args:
        evaluation: Results.
        directory: Where to write, made if it is missing.
        stem: Beginning of the files' names.

    Returns:
        Paths of the PNG files.

    Raises:
        ImportError: matplotlib is missing; the message names what to install.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'deinfer[perception]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{stem}-predicted.png", directory / f"{stem}-reliability.png"]
    figure, axes = plt.subplots(figsize=(5, 5))
    axes.scatter(evaluation.actual, evaluation.predicted, s=8, alpha=0.5)
    limit = float(max(evaluation.actual.max(), evaluation.predicted.max()))
    axes.plot([0, limit], [0, limit], color="black", linewidth=0.8)
    order = np.array_split(np.argsort(evaluation.predicted), 10)
    axes.plot(
        [evaluation.actual[part].mean() for part in order],
        [evaluation.predicted[part].mean() for part in order],
        "o-",
        color="tab:red",
        label="means of tenths, by prediction",
    )
    axes.set(xlabel="mean of the samples (tokens)", ylabel="predicted, cross-validated (tokens)")
    axes.legend()
    figure.savefig(paths[0], dpi=110, bbox_inches="tight")
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(5, 5))
    levels, shares = zip(*evaluation.reliability, strict=True)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axes.plot(levels, shares, "o-")
    axes.set(xlabel="level of the predicted quantile", ylabel="share of answers at or below it")
    figure.savefig(paths[1], dpi=110, bbox_inches="tight")
    plt.close(figure)
    return paths

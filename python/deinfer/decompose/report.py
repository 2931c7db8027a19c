"""What a decomposition did, as an object, as JSON and as a picture."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JSON_FILE, PLOT_FILE = "decomposition.json", "decomposition.png"


@dataclass(frozen=True)
class MatrixReport:
    """One linear.

    Attributes:
        n: Outputs.
        k: Inputs.
        rank: None means dense.
        loss: What the method expects the rank to cost: nats per token with allocated ranks or
            `two_sided`, else the mean square of the change of the output (`whitened`) or of the
            weight (`svd`), summed over entries.
    """

    n: int
    k: int
    rank: int | None
    loss: float

    @property
    def parameters(self) -> int:
        """Parameters stored for it."""
        return self.n * self.k if self.rank is None else self.rank * (self.n + self.k)


@dataclass(frozen=True)
class DecompositionReport:
    """What `decompose_model` did.

    Attributes:
        destination: The checkpoint that was written.
        method: Name of the method.
        rank_choice: "allocated" or "uniform".
        target: What was asked for, in words.
        matrices: The linears by module name.
        calibration_source: "self-sampled", a file's name, or "none".
        calibration_tokens: Tokens that the statistics are from.
        compensated: Whether factors were fitted to the decomposed model's activations.
        recovery: Steps, tokens and losses of the training, or empty.
        perplexity_ratio: Perplexity / the dense model's on held-out calibration sequences, if the
            target was one.
        seconds: Wall time by stage, over all runs that it took.
        peak_memory_bytes: Largest resident memory of this process.
    """

    destination: Path
    method: str
    rank_choice: str
    target: str
    matrices: dict[str, MatrixReport]
    calibration_source: str
    calibration_tokens: int
    compensated: bool
    recovery: dict[str, float]
    perplexity_ratio: float | None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0

    @property
    def ranks(self) -> dict[str, int | None]:
        """Rank by module name; None means dense."""
        return {name: matrix.rank for name, matrix in self.matrices.items()}

    @property
    def parameters(self) -> int:
        """Parameters of the linears now."""
        return sum(matrix.parameters for matrix in self.matrices.values())

    @property
    def dense_parameters(self) -> int:
        """Parameters of the linears before."""
        return sum(matrix.n * matrix.k for matrix in self.matrices.values())

    @property
    def keep(self) -> float:
        """Share of the parameters that was kept."""
        return self.parameters / self.dense_parameters

    def summary(self) -> str:
        """Describe the result in a few lines for a terminal."""
        by_type: dict[str, list[int | None]] = {}
        for name, rank in self.ranks.items():
            by_type.setdefault(name.rpartition(".")[2], []).append(rank)
        lines = [
            f"{self.method}, {self.rank_choice} ranks: kept {self.keep:.4f} of "
            f"{self.dense_parameters:,} parameters, {self.calibration_tokens:,} calibration tokens"
        ]
        for leaf, ranks in by_type.items():
            some = [r for r in ranks if r is not None]
            mean = f", mean rank {sum(some) / len(some):.0f}" if some else ""
            lines.append(f"  {leaf}: {len(some)} of {len(ranks)} decomposed{mean}")
        if self.perplexity_ratio is not None:
            lines.append(f"  held-out perplexity: {self.perplexity_ratio:.4f} times the dense one")
        if self.recovery:
            lines.append(
                f"  recovery: {self.recovery['steps']:.0f} steps, "
                f"KL {self.recovery['first_loss']:.3f} -> {self.recovery['last_loss']:.3f}"
            )
        times = ", ".join(f"{stage} {value:.1f} s" for stage, value in self.seconds.items())
        lines.append(f"  time: {times}; memory: {self.peak_memory_bytes / 2**30:.2f} GiB at most")
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """The report as it stands in its file."""
        return {
            "method": self.method,
            "rank_choice": self.rank_choice,
            "target": self.target,
            "keep": self.keep,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "calibration": {"source": self.calibration_source, "tokens": self.calibration_tokens},
            "compensated": self.compensated,
            "recovery": self.recovery,
            "perplexity_ratio": self.perplexity_ratio,
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "ranks": self.ranks,
            "loss": {name: matrix.loss for name, matrix in self.matrices.items()},
        }


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_report(report: DecompositionReport, directory: Path) -> bool:
    """Write decomposition.json, and decomposition.png if matplotlib is installed.

    Args:
        report: What to write.
        directory: That exists.

    Returns:
        Whether there is a picture.
    """
    text = json.dumps(report.json(), indent=2) + "\n"
    (directory / JSON_FILE).write_text(text, encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg", force=False)
    _plot(report, directory / PLOT_FILE)
    return True


def _plot(report: DecompositionReport, file: Path) -> None:
    """Draw share of rank and loss over the layers, a row for each kind of linear."""
    from matplotlib.figure import Figure

    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in report.matrices))
    rows: dict[str, list[MatrixReport]] = {leaf: [] for leaf in leaves}
    for name, matrix in report.matrices.items():
        rows[name.rpartition(".")[2]].append(matrix)
    share = [[m.parameters / (m.n * m.k) for m in rows[leaf]] for leaf in leaves]
    loss = [[m.loss if m.rank is not None else float("nan") for m in rows[leaf]] for leaf in leaves]
    figure = Figure(figsize=(max(8.0, 0.32 * len(share[0]) + 3), 6.5), layout="constrained")
    for axes, values, label in zip(
        figure.subplots(2, 1),
        (share, loss),
        ("share of parameters kept (numbers: rank; none: dense)", "expected loss"),
        strict=True,
    ):
        image = axes.imshow(values, aspect="auto", cmap="viridis" if values is share else "magma_r")
        figure.colorbar(image, ax=axes)
        axes.set_title(label, fontsize=10)
        axes.set_yticks(range(len(leaves)), leaves)
        axes.set_xlabel("layer")
        if values is share:
            for y, leaf in enumerate(leaves):
                for x, matrix in enumerate(rows[leaf]):
                    if matrix.rank is not None:
                        axes.text(
                            x, y, str(matrix.rank), ha="center", va="center", fontsize=6, color="w"
                        )
    figure.suptitle(f"{report.method}, {report.rank_choice} ranks, keep {report.keep:.3f}")
    figure.savefig(file, dpi=120)

"""The stages of a decomposition, each of which finds done what an earlier run has done."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from deinfer.decompose.allocate import Candidate, choose_ranks, least_keep, tail_loss
from deinfer.decompose.calibration import (
    Calibration,
    RuntimeSampler,
    Sampler,
    sample_calibration,
)
from deinfer.decompose.checkpoint import fill_checkpoint, linear_shapes
from deinfer.decompose.compensate import compensate
from deinfer.decompose.options import Options
from deinfer.decompose.quality import loss, search_keep
from deinfer.decompose.recovery import Recovery
from deinfer.decompose.report import (
    DecompositionReport,
    MatrixReport,
    peak_memory,
    write_report,
)
from deinfer.decompose.source import SourceCheckpoint
from deinfer.decompose.streaming import StreamedModel, compute_dtype
from deinfer.decompose.sweep import Sweep, cut_factors, read_energies
from deinfer.decompose.targets import Ranks, ranks_for_size
from deinfer.decompose.texts import read_sequences
from deinfer.decompose.workdir import SpooledFactors, WorkDirectory, read_factors, write_factors
from deinfer.progress import progress_bar

_HELD_OUT = 6  # every so many-th sequence, where perplexity is a target


class Run:
    """One decomposition.

    Args:
        options: What is wanted.
        source: Dense checkpoint.
        work: Where the state is.
        sampler: Source of self-sampled sequences; None for the native runtime.
        progress: Show progress bars.

    Attributes:
        work: Where the state is.
    """

    def __init__(
        self,
        options: Options,
        source: SourceCheckpoint,
        work: WorkDirectory,
        sampler: Sampler | None,
        progress: bool,
    ) -> None:
        """Bind to the work directory."""
        self._options, self._source, self._shapes = options, source, linear_shapes(source)
        self.work, self._progress = work, progress
        self._sampler = sampler

    def complete(self, destination: Path, base_model: str) -> DecompositionReport:
        """Go through all stages and leave the result in `checkpoint` of the work directory.

        Args:
            destination: Where it will be, for the report.
            base_model: What its config says it comes from.

        Returns:
            The report.
        """
        options, work = self._options, self.work
        self._check_weights()
        calibration, held_out = self.calibrate()
        model = self.stream()
        with self._timed("statistics"):
            self.sweep(model, calibration)
        candidates = self.candidates(model)
        with self._timed("ranks"):
            ranks = self._choose(model, candidates, held_out)
        with self._timed("factors"):
            self.factor(model, ranks, calibration)
        ratio = self._measure(model, held_out)
        names = [name for name, rank in ranks.items() if rank is not None]
        prefixes = model.prefixes
        stage = "factors"
        recovery: dict[str, float] = {}
        weights: dict[str, Tensor] = {}
        if options.recovers:
            stage = "recovered"
            with self._timed("recovery"):
                recovery, weights = Recovery(
                    self._source, work, model, names, options, self._sampler, self._progress
                ).run(calibration)
        matrices = {
            name: MatrixReport(c.n, c.k, ranks[name], tail_loss(c, ranks[name]))
            for name, c in candidates.items()
        }
        report = DecompositionReport(
            destination=destination,
            method=options.method.name,
            rank_choice=options.ranks,
            target=options.target,
            matrices=matrices,
            calibration_source=calibration.source,
            calibration_tokens=calibration.tokens,
            compensated=options.compensates(self._kept(ranks)),
            recovery=recovery,
            perplexity_ratio=ratio,
        )
        directory = work.path / "checkpoint"
        directory.mkdir(exist_ok=True)
        with self._timed("writing"):
            fill_checkpoint(
                self._source,
                directory,
                {name: rank for name, rank in ranks.items() if rank is not None},
                SpooledFactors(work, stage, prefixes, names),
                self._low_rank(report, base_model),
                weights,
            )
        report.seconds.update(work.read_json("seconds"))
        report = dataclasses.replace(report, peak_memory_bytes=peak_memory())
        write_report(report, directory)
        return report

    def _check_weights(self) -> None:
        """Read every tensor once: a bad one is better found now than after hours."""
        if self.work.read_json("checked"):
            return
        names = list(self._source.entries)
        for name in progress_bar(self._progress, iterable=names, desc="check", unit="tensor"):
            self._source.read([name])
        self.work.write_json("checked", True)

    def stream(self) -> StreamedModel:
        """Open the dense model."""
        return StreamedModel(self._source, compute_dtype(self._source, list(self._shapes)))

    def sweep(self, model: StreamedModel, calibration: Calibration) -> None:
        """Gather statistics and leave the spectra of every block in the work directory."""
        Sweep(
            model,
            self.work,
            calibration.sequences,
            method=self._options.method,
            needs=self._options.needs,
            rank_multiple=self._options.rank_multiple,
            keep_inputs=self._options.may_compensate,
            progress=self._progress,
        ).run()

    def calibrate(self) -> tuple[Calibration, list[list[int]]]:
        """Return the sequences to fit to, and those held out to measure on."""
        options = self._options
        if not options.calibrates:
            return Calibration([], "none"), []
        found = self.work.read_json("calibration")
        if found is None:
            with self._timed("calibration"):
                made = self._sample(options)
            found = {"sequences": made.sequences, "source": made.source}
            self.work.write_json("calibration", found)
        sequences, held_out = found["sequences"], []
        if options.target_ppl_increase is not None:
            held_out = sequences[::_HELD_OUT]
            sequences = [s for i, s in enumerate(sequences) if i % _HELD_OUT]
            if not sequences:
                raise ValueError(
                    f"calibration_tokens {options.calibration_tokens} give one sequence; "
                    "target_ppl_increase needs two, of which one is held out"
                )
        return Calibration(sequences, found["source"]), held_out

    def _sample(self, options: Options) -> Calibration:
        tokens, path = options.calibration_tokens, self._source.path
        if options.calibration is not None:
            sequences = read_sequences(options.calibration, path, tokens, options.seed)
            return Calibration(sequences, options.calibration.name)
        # No name is bound to the default sampler: its model is freed right after.
        return sample_calibration(
            self._sampler or RuntimeSampler(path, seed=options.seed, progress=self._progress),
            tokens,
            options.seed,
        )

    def candidates(self, model: StreamedModel) -> dict[str, Candidate]:
        """Return all linears by name with what each rank saves of the loss."""
        scales = self._options.method.scales if self._options.ranks == "allocated" else {}
        candidates = {}
        for index, prefix in enumerate(model.prefixes):
            for leaf, energies in read_energies(self.work, index).items():
                n, k = self._shapes[prefix + leaf]
                scale = scales.get(leaf.rpartition(".")[2], 1.0)
                candidates[prefix + leaf] = Candidate(n, k, scale * energies.numpy())
        return candidates

    def ranks_at(self, candidates: Mapping[str, Candidate], keep: float) -> Ranks:
        """Choose ranks for a share of the parameters."""
        return choose_ranks(candidates, keep, self._options.rank_multiple, self._options.ranks)

    def _kept(self, ranks: Ranks) -> float:
        """Share of the parameters that is stored at these ranks."""
        stored = 0
        for name, (n, k) in self._shapes.items():
            rank = ranks[name]
            stored += n * k if rank is None else rank * (n + k)
        return stored / sum(n * k for n, k in self._shapes.values())

    def _choose(
        self,
        model: StreamedModel,
        candidates: dict[str, Candidate],
        held_out: list[list[int]],
    ) -> Ranks:
        """Choose the ranks for the target."""
        options = self._options
        found: Ranks | None = self.work.read_json("ranks")
        if found is not None:
            return found
        if options.target_size is not None:
            ranks = ranks_for_size(options, self._source, candidates)
        else:
            keep = options.keep
            if keep is None:
                keep = self._search(model, candidates, held_out)
            ranks = self.ranks_at(candidates, keep)
        self.work.write_json("ranks", ranks)
        return ranks

    def _search(
        self,
        model: StreamedModel,
        candidates: dict[str, Candidate],
        held_out: list[list[int]],
    ) -> float:
        """Find the keep for a perplexity, with factors as they are cut from the spectra."""
        options, work = self._options, self.work
        assert options.target_ppl_increase is not None
        tried: dict[str, float] = work.read_json("search") or {}
        dense = self._dense_loss(model, held_out)

        def ratio(keep: float) -> float:
            if repr(keep) not in tried:
                ranks = self.ranks_at(candidates, keep)
                low = loss(
                    model, held_out, lambda i: cut_factors(work, i, model.prefixes[i], ranks)
                )
                tried[repr(keep)] = math.exp(min(low - dense, 700.0))
                work.write_json("search", tried)
            return tried[repr(keep)]

        least = least_keep(self._shapes.values(), options.rank_multiple)
        return search_keep(ratio, options.target_ppl_increase, least)[0]

    def _dense_loss(self, model: StreamedModel, held_out: list[list[int]]) -> float:
        found: float | None = self.work.read_json("dense_loss")
        if found is None:
            found = loss(model, held_out)
            self.work.write_json("dense_loss", found)
        return found

    def factor(self, model: StreamedModel, ranks: Ranks, calibration: Calibration) -> None:
        """Write the factors of every block at the ranks chosen."""
        work, options = self.work, self._options
        if options.compensates(self._kept(ranks)):
            compensate(model, work, ranks, calibration.sequences, progress=self._progress)
            return
        for index, prefix in enumerate(model.prefixes):
            if not work.has("factors", index):
                write_factors(work, "factors", index, cut_factors(work, index, prefix, ranks))

    def _measure(self, model: StreamedModel, held_out: list[list[int]]) -> float | None:
        """Perplexity of what was made / the dense model's, where it is a target."""
        if not held_out:
            return None
        low = loss(model, held_out, lambda i: read_factors(self.work, "factors", i))
        return math.exp(min(low - self._dense_loss(model, held_out), 700.0))

    def _low_rank(self, report: DecompositionReport, base_model: str) -> dict[str, object]:
        """What the config says about the decomposition."""
        return {
            "method": report.method,
            "base_model": base_model,
            "keep_ratio": round(report.keep, 6),
            "rank_choice": report.rank_choice,
            "rank_multiple": self._options.rank_multiple,
            "calibration": {
                "source": report.calibration_source,
                "tokens": report.calibration_tokens,
                "seed": self._options.seed,
            },
            "recovery_steps": int(report.recovery.get("steps", 0)),
        }

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of a stage to what earlier runs took for it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.work.read_json("seconds") or {}
            seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
            self.work.write_json("seconds", seconds)

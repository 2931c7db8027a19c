"""Recovery as a stage of a run: text to train on, what both models make of it, the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deinfer.decompose.calibration import Calibration, Sampler, sample_calibration
from deinfer.decompose.examples import Example, ExampleSampler, end_examples, run_examples
from deinfer.decompose.options import Options
from deinfer.decompose.recover import recover
from deinfer.decompose.reference import install_factors
from deinfer.decompose.source import SourceCheckpoint
from deinfer.decompose.streaming import StreamedModel
from deinfer.decompose.workdir import (
    RowReader,
    SpooledFactors,
    WorkDirectory,
    write_factors,
)

_ROUND_TOKENS = 16384  # sampled at a time


class Recovery:
    """The training of one run.

    Args:
        source: Dense checkpoint.
        work: Where the factors are and will be.
        model: Dense model.
        names: Modules that are decomposed.
        options: Of the run.
        sampler: Source of self-sampled sequences; None for the native runtime.
        progress: Show progress bars.
    """

    def __init__(
        self,
        source: SourceCheckpoint,
        work: WorkDirectory,
        model: StreamedModel,
        names: Sequence[str],
        options: Options,
        sampler: Sampler | None,
        progress: bool,
    ) -> None:
        """Bind to a run."""
        self._source, self._work, self._model, self._names = source, work, model, names
        self._options, self._sampler, self._progress = options, sampler, progress

    def run(self, calibration: Calibration) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Train, unless that is done, and leave `recovered` factors in the work directory.

        Args:
            calibration: What the factors were fitted to.

        Returns:
            Steps, tokens and losses for the report; new values of what is not factored by
            parameter name.

        Raises:
            RuntimeError: The training diverges.
        """
        found: dict[str, float] | None = self._work.read_json("recovery")
        if found is None:
            found = self._train(calibration)
            self._work.write_json("recovery", found)
        return found, self._work.read_tensors("weights", 0)

    def _train(self, calibration: Calibration) -> dict[str, float]:
        seconds = 60 * self._options.recover_minutes
        start = time.monotonic()
        student = self._student()
        with self._model.ends():
            made = recover(
                student,
                self._model.head,
                self._text(calibration),
                steps=self._options.recover_steps,
                seconds=max(seconds - (time.monotonic() - start), 1.0) if seconds else 0.0,
                seed=self._options.seed,
                progress=self._progress,
            )
        for index, prefix in enumerate(self._model.prefixes):
            block = {
                name.removeprefix(prefix): pair
                for name, pair in made.factors.items()
                if name.startswith(prefix)
            }
            write_factors(self._work, "recovered", index, block)
        self._work.write_tensors("weights", 0, made.weights)
        return {
            "steps": made.steps,
            "tokens": made.tokens,
            "seconds": time.monotonic() - start,
            "first_loss": made.first_loss,
            "last_loss": made.last_loss,
        }

    def _text(self, calibration: Calibration) -> Callable[[int], list[Example]]:
        """What to train on: text that neither calibration nor training saw, or the one given.

        What comes again is learnt by heart: the loss on it falls far more than that on other text.
        """
        options, model = self._options, self._model
        seed = options.seed + 10**6
        if options.calibration is not None:
            given = self._calibration(calibration)
            return lambda tokens: given
        sampler: ExampleSampler | None = None

        def text(tokens: int) -> list[Example]:
            nonlocal sampler, seed
            seed += 1
            tokens = min(tokens, _ROUND_TOKENS)
            if self._sampler is not None:
                sampled = sample_calibration(self._sampler, tokens, seed).sequences
                return run_examples(model, sampled)
            if sampler is None:
                sampler = ExampleSampler(self._source.path, len(model.prefixes), seed=seed)
            return sampler.sample(tokens, seed)

        return text

    def _calibration(self, calibration: Calibration) -> list[Example]:
        """The calibration text with the dense model's states."""
        model, count = self._model, len(self._model.prefixes)
        if not self._work.has("inputs", count):
            return run_examples(model, calibration.sequences)
        with open(self._work.file("inputs", count), "rb") as file:
            rows = RowReader(file, model.hidden_size, model.dtype)
            streams = [rows.read(len(sequence)) for sequence in calibration.sequences]
        return end_examples(model, calibration.sequences, streams)

    def _student(self) -> Any:
        """The decomposed model, float32."""
        from transformers import AutoModelForCausalLM

        # With sequences as short as these, sdpa's backward is the slower.
        student = AutoModelForCausalLM.from_pretrained(
            str(self._source.path), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        factors = SpooledFactors(self._work, "factors", self._model.prefixes, self._names)
        install_factors(student, factors, torch.float32)
        return student

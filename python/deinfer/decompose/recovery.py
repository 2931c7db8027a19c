"""Recovery as a stage of a run: text to train on, what both models make of it, the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deinfer.architectures import attention_implementation
from deinfer.decompose.calibration import (
    Calibration,
    RuntimeSampler,
    Sampler,
    sample_calibration,
)
from deinfer.decompose.options import Options
from deinfer.decompose.recover import STEP_TOKENS, recover
from deinfer.decompose.reference import install_factors
from deinfer.decompose.source import SourceCheckpoint
from deinfer.decompose.streaming import StreamedModel
from deinfer.decompose.workdir import (
    RowReader,
    SpooledFactors,
    WorkDirectory,
    write_factors,
)

_SAMPLING_SHARE = 0.1  # of the minutes; the rest is training
_SAMPLING_ROUND = 8192  # tokens


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
        sampled = self._sampled(calibration, seconds)
        sequences = calibration.sequences + sampled
        streams = self._streams(calibration)
        if sampled:
            streams += self._model.run(self._model.embed_all(sampled))
        student = self._student()
        with self._model.ends():
            made = recover(
                student,
                self._model.logits,
                sequences,
                streams,
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

    def _streams(self, calibration: Calibration) -> list[Tensor]:
        """The dense model's residual streams after the last block, of the calibration text."""
        model, count = self._model, len(self._model.prefixes)
        if not self._work.has("inputs", count):
            return model.run(model.embed_all(calibration.sequences))
        with open(self._work.file("inputs", count), "rb") as file:
            rows = RowReader(file, model.hidden_size, model.dtype)
            return [rows.read(len(sequence)) for sequence in calibration.sequences]

    def _sampled(self, calibration: Calibration, seconds: float) -> list[list[int]]:
        """More text to train on, where the model samples its own."""
        options = self._options
        tokens = options.recover_steps * STEP_TOKENS - calibration.tokens
        if options.calibration is not None or (options.recover_steps and tokens < 2):
            return []
        seed = options.seed + 1
        sampler = self._sampler or RuntimeSampler(
            self._source.path, seed=options.seed + 10**6, progress=self._progress
        )
        if options.recover_steps:
            return sample_calibration(sampler, tokens, seed).sequences
        start, sequences = time.monotonic(), []
        while True:
            sequences += sample_calibration(sampler, _SAMPLING_ROUND, seed).sequences
            seed += 1
            if time.monotonic() - start > _SAMPLING_SHARE * seconds:
                return sequences

    def _student(self) -> Any:
        """The decomposed model, float32."""
        from transformers import AutoConfig, AutoModelForCausalLM

        path = str(self._source.path)
        attention = attention_implementation(AutoConfig.from_pretrained(path))
        student = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention
        ).eval()
        factors = SpooledFactors(self._work, "factors", self._model.prefixes, self._names)
        install_factors(student, factors, torch.float32)
        return student

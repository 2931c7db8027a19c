"""The `prompt` predictor: TF-IDF, counts and a ridge, from the text alone and before prefill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from deinfer.perception import Ask, Belief
from deinfer.perception.bins import NUM_BINS
from deinfer.perception.features import TfIdf, lexical
from deinfer.perception.ridge import Ridge, fit_ridge

Floats = NDArray[np.float64]
_FORMAT = "deinfer.length_prompt"
_VERSION = 1
# All counts together weigh about as much as a third of a text's terms, whose row has length 1.
_LEXICAL_WEIGHT = 0.3


@dataclass(frozen=True, slots=True)
class PromptModel:
    """Ridge on the logarithm of the length, and how far off it is.

    Attributes:
        tfidf: Features of the words.
        lexical_mean: Of the counts [11]; empty: they are not used.
        lexical_scale: Their deviations [11].
        weights: [terms + 11].
        intercept: A number.
        residuals: Quantiles of the leave-one-out errors of the logarithm [16], equally likely.
        cap: Tokens that no prediction exceeds.
    """

    tfidf: TfIdf
    lexical_mean: Floats
    lexical_scale: Floats
    weights: Floats
    intercept: float
    residuals: Floats
    cap: int

    @classmethod
    def fit(
        cls, texts: Sequence[str], lengths: NDArray[np.int64], cap: int, *, counts: bool = True
    ) -> PromptModel:
        """Train.

        Args:
            texts: Prompts [n].
            lengths: Tokens [n, samples].
            cap: Tokens at which they were cut.
            counts: Use lexical counts besides TF-IDF.

        Returns:
            The model.
        """
        tfidf = TfIdf.fit(texts)
        numbers = lexical(texts)
        mean = numbers.mean(axis=0) if counts else np.zeros(0)
        scale = np.maximum(numbers.std(axis=0), 1e-6) if counts else np.zeros(0)
        empty = Ridge(np.zeros(0), 0.0, np.zeros(0))
        model = cls(tfidf, mean, scale, empty.weights, 0.0, np.zeros(NUM_BINS), cap)
        logs = np.log(np.maximum(lengths, 1))
        ridge = fit_ridge(model._features(texts), logs.mean(axis=1))
        errors = (logs - ridge.left_out[:, None]).ravel()
        levels = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
        return cls(
            tfidf, mean, scale, ridge.weights, ridge.intercept, np.quantile(errors, levels), cap
        )

    def _features(self, texts: Sequence[str]) -> Floats:
        words = self.tfidf.transform(texts)
        if not len(self.lexical_mean):
            return words
        counts = (lexical(texts) - self.lexical_mean) / self.lexical_scale
        return np.hstack([words, _LEXICAL_WEIGHT * counts / np.sqrt(counts.shape[1])])

    def predict(self, texts: Sequence[str]) -> Floats:
        """Predict typical lengths (geometric means of samples) in tokens [n]."""
        logs = self._features(texts) @ self.weights + self.intercept
        return np.asarray(np.clip(np.exp(np.minimum(logs, 30.0)), 1, self.cap))

    def distributions(self, texts: Sequence[str]) -> Floats:
        """Lengths [n, 16] that are equally likely."""
        lengths = self.predict(texts)[:, None] * np.exp(self.residuals)
        return np.asarray(np.clip(lengths, 1, self.cap))

    def save(self, directory: Path) -> Path:
        """Write prompt.json and prompt.safetensors into a directory; returns the former's path."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                "idf": self.tfidf.idf,
                "lexical_mean": self.lexical_mean,
                "lexical_scale": self.lexical_scale,
                "weights": np.ascontiguousarray(self.weights),
                "residuals": self.residuals,
            },
            directory / "prompt.safetensors",
        )
        entry = {
            "format": _FORMAT,
            "version": _VERSION,
            "predictor": "prompt",
            "weights": "prompt.safetensors",
            "intercept": self.intercept,
            "cap": self.cap,
            "vocabulary": self.tfidf.vocabulary,
        }
        path = directory / "prompt.json"
        path.write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> PromptModel:
        """Read what `save` has written.

        Raises:
            ValueError: The file is missing or of another format.
        """
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is no prompt model; `deinfer perception train` makes it: {error}"
            ) from None
        if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
            raise ValueError(f"{path} is no prompt model")
        tensors = load_file(path.parent / entry["weights"])
        return cls(
            TfIdf(entry["vocabulary"], tensors["idf"]),
            tensors["lexical_mean"],
            tensors["lexical_scale"],
            tensors["weights"],
            entry["intercept"],
            tensors["residuals"],
            entry["cap"],
        )


class PromptPredictor:
    """Beliefs at submission.

    Args:
        path: prompt.json.

    Raises:
        ValueError: It is missing or malformed.
    """

    engine_head = ""

    def __init__(self, path: Path) -> None:
        """Load; see the class."""
        self._model = PromptModel.load(path)

    def predict(self, texts: Sequence[str], ask: Ask) -> list[Belief | None]:
        """Give equally likely lengths for each text."""
        return [
            (row.tolist(), [1.0 / len(row)] * len(row)) for row in self._model.distributions(texts)
        ]

"""Distributions over length bins, as the engine's LengthDistribution holds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
NUM_BINS = 16  # LengthDistribution::kMaxBins
_SMOOTHING = 1.0  # bins; standard deviation of the soft labels


@dataclass(frozen=True, slots=True)
class Bins:
    """Intervals of lengths up to a cap, and the cap itself.

    Attributes:
        edges: Of all bins but the last, tokens [bins]; bin i is [edges[i], edges[i + 1]). The last
            bin is "the cap or longer": answers that were cut off there are censored, and all that
            is known of them is that they belong to it.
        lengths: Mean of each bin, tokens [bins]; the cap for the last.
    """

    edges: Floats
    lengths: Floats

    @classmethod
    def fit(cls, lengths: ArrayLike, cap: int, count: int = NUM_BINS) -> Bins:
        """Choose bins for observed lengths.

        Args:
            lengths: Tokens, cut at `cap`; any shape.
            cap: Tokens.
            count: Of bins.

        Returns:
            Bins of equal widths over what is usual; where answers rarely come near the cap, one
            wide bin covers what is between.
        """
        values = np.asarray(lengths, np.float64).ravel()
        usual = 1.25 * np.quantile(values, 0.95)
        if usual >= cap:
            edges = np.linspace(0, cap, count)
        else:
            edges = np.append(np.linspace(0, usual, count - 1), cap)
        means = 0.5 * (edges[:-1] + edges[1:])
        index = np.searchsorted(edges, values, side="right") - 1
        for i in range(count - 1):
            if np.any(index == i):
                means[i] = values[index == i].mean()
        return cls(edges, np.append(means, cap))

    def index(self, lengths: ArrayLike) -> NDArray[np.int64]:
        """The bin of each length."""
        found = np.searchsorted(self.edges, np.asarray(lengths), side="right") - 1
        return np.clip(found, 0, len(self.edges) - 1).astype(np.int64)

    def soft_labels(self, lengths: ArrayLike) -> Floats:
        """Label smoothing over neighbouring bins; "the cap or longer" stays what it is.

        Args:
            lengths: Tokens [n].

        Returns:
            Probabilities [n, bins].
        """
        index = self.index(lengths)
        last = len(self.edges) - 1
        distance = (np.arange(last + 1)[None, :] - index[:, None]) / _SMOOTHING
        labels = np.exp(-0.5 * distance**2)
        labels[:, last] = 0.0
        labels[index == last] = np.eye(last + 1)[last]
        return np.asarray(labels / labels.sum(axis=1, keepdims=True))

    def open(self, generated: ArrayLike) -> NDArray[np.bool_]:
        """Bins that an answer may still end in after so many tokens, [n, bins]; never none."""
        mask = self.lengths[None, :] > np.asarray(generated)[:, None]
        mask[:, -1] = True
        return mask

    def median(self, probabilities: Floats, generated: ArrayLike = 0) -> Floats:
        """Median lengths, interpolated within bins.

        Args:
            probabilities: [n, bins].
            generated: Tokens that are there already, one number or [n].

        Returns:
            Tokens [n], of the whole answer.
        """
        below = np.cumsum(probabilities, axis=1)
        first = np.argmax(below >= 0.5 - 1e-9, axis=1)
        rows = np.arange(len(below))
        before = below[rows, first] - probabilities[rows, first]
        share = (0.5 - before) / np.maximum(probabilities[rows, first], 1e-12)
        ends = np.append(self.edges, self.edges[-1])
        low = np.maximum(ends[first], np.broadcast_to(generated, first.shape))
        return np.asarray(low + np.clip(share, 0, 1) * np.maximum(ends[first + 1] - low, 0))

    def quantile(self, probabilities: Floats, q: float) -> Floats:
        """Quantiles [n] as LengthDistribution::quantile_remaining gives them: means of bins."""
        below = np.cumsum(probabilities, axis=1)
        return np.asarray(self.lengths[np.argmax(below >= q - 1e-6, axis=1)])

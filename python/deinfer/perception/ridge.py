"""Ridge regression with the penalty chosen by exact leave-one-out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_PENALTIES = np.logspace(-3, 6, 28)


@dataclass(frozen=True, slots=True)
class Ridge:
    """y = x w + b.

    Attributes:
        weights: [features].
        intercept: A number.
        left_out: What the fit says of each training row without having seen it [n].
    """

    weights: Floats
    intercept: float
    left_out: Floats

    def predict(self, x: Floats) -> Floats:
        """Predict rows [n, features]."""
        return np.asarray(x @ self.weights + self.intercept)


def fit_ridge(x: Floats, y: Floats) -> Ridge:
    """Fit, in the dual: cheap for more features than rows.

    Args:
        x: [n, features], n >= 3.
        y: [n].

    Returns:
        The fit with the penalty whose leave-one-out error is least.
    """
    center, mean = x.mean(axis=0), float(y.mean())
    a, target = x - center, y - mean
    values, vectors = np.linalg.eigh(a @ a.T)
    values = np.maximum(values, 0.0)
    scale = max(float(values.mean()), 1e-12)
    rotated = vectors.T @ target
    best: tuple[float, Floats, Floats] | None = None
    for penalty in _PENALTIES * scale / 1e3:
        shrunk = 1.0 / (values + penalty)
        dual = vectors @ (shrunk * rotated)
        # The inverse's diagonal; the mean is a parameter, too, of which each row has 1/n.
        diagonal = (vectors**2) @ shrunk
        fitted = target - penalty * dual
        leverage = np.minimum(1.0 - penalty * diagonal + 1.0 / len(y), 1.0 - 1e-6)
        error = (target - fitted) / (1.0 - leverage)
        loss = float(np.mean(error**2))
        if best is None or loss < best[0]:
            best = (loss, dual, y - error)
    assert best is not None
    weights = a.T @ best[1]
    return Ridge(weights, mean - float(center @ weights), best[2])

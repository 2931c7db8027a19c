"""A softmax with at most one hidden layer, trained by AdamW in NumPy.

The networks are so small that a framework's overhead per step would cost more than the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train.

    Attributes:
        units: Of the hidden layer with ReLU; 0: none.
        steps: Of the optimizer.
        batch: Rows of a step.
        rate: Learning rate, annealed to 0 by a cosine.
        decay: Decoupled weight decay (Loshchilov, Hutter 2019), of weights but not of biases.
        dropout: Share of the inputs that a step does not see.
    """

    units: int
    steps: int
    batch: int
    rate: float
    decay: float
    dropout: float


def fit_network(
    x: NDArray[Any],
    labels: NDArray[Any],
    open_bins: NDArray[np.bool_] | None,
    recipe: Recipe,
    seed: int,
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Minimize the cross entropy.

    Args:
        x: Standardized inputs [n, inputs].
        labels: Probabilities [n, bins].
        open_bins: Bins that the softmax runs over [n, bins]; None: all.
        recipe: How to train.
        seed: Of initial weights, batches and dropout.

    Returns:
        (weight [outputs, inputs], bias [outputs]) of each layer, in order.
    """
    numbers = np.random.default_rng(seed)
    inputs = np.ascontiguousarray(x, np.float32)
    targets = np.ascontiguousarray(labels, np.float32)
    closed = None if open_bins is None else ~open_bins
    shares = np.log(np.maximum(targets.mean(axis=0), 1e-4))
    sizes = [inputs.shape[1], *([recipe.units] if recipe.units else []), targets.shape[1]]
    parameters: list[Floats] = []
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        last = i == len(sizes) - 2
        weight = numbers.standard_normal((fan_out, fan_in), dtype=np.float32) / fan_in**0.5
        parameters.append(weight * np.float32(0.1 if last else 1.0))
        parameters.append(shares.copy() if last else np.zeros(fan_out, np.float32))
    first = [np.zeros_like(p) for p in parameters]
    second = [np.zeros_like(p) for p in parameters]
    for step in range(recipe.steps):
        rows = numbers.integers(len(inputs), size=recipe.batch)
        batch = inputs[rows]
        if recipe.dropout > 0:
            kept = numbers.random(batch.shape, dtype=np.float32) >= recipe.dropout
            batch = batch * kept * np.float32(1 / (1 - recipe.dropout))
        gradients = _gradients(
            parameters, batch, targets[rows], None if closed is None else closed[rows]
        )
        rate = recipe.rate * 0.5 * (1 + np.cos(np.pi * step / recipe.steps))
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            first[i] += np.float32(0.1) * (g - first[i])
            second[i] += np.float32(0.001) * (g * g - second[i])
            mean = first[i] / np.float32(1 - 0.9 ** (step + 1))
            spread = np.sqrt(second[i] / np.float32(1 - 0.999 ** (step + 1))) + np.float32(1e-8)
            if p.ndim == 2:
                p *= np.float32(1 - rate * recipe.decay)
            p -= np.float32(rate) * mean / spread
    values = [p.astype(np.float64) for p in parameters]
    return list(zip(values[::2], values[1::2], strict=True))


def _gradients(
    parameters: list[Floats], x: Floats, targets: Floats, closed: NDArray[np.bool_] | None
) -> list[Floats]:
    """Of the mean cross entropy of a batch, by parameter."""
    hidden = x
    if len(parameters) == 4:
        hidden = np.maximum(x @ parameters[0].T + parameters[1], 0)
    weight, bias = parameters[-2:]
    logits = hidden @ weight.T + bias
    if closed is not None:
        logits[closed] = -np.inf
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    error = (p - targets) / np.float32(len(x))
    result = [error.T @ hidden, error.sum(axis=0)]
    if len(parameters) == 4:
        back = (error @ weight) * (hidden > 0)
        result = [back.T @ x, back.sum(axis=0), *result]
    return result

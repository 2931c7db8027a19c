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
        dropout: Share of the inputs that a step does not see, in 1/256.
        networks: Trained side by side on the same batches from other initial weights; their logits
            are averaged. 1 without a hidden layer, where all would become the same.
    """

    units: int
    steps: int
    batch: int
    rate: float
    decay: float
    dropout: float
    networks: int = 1


def fit_network(
    x: NDArray[Any],
    labels: NDArray[Any],
    open_bins: NDArray[np.bool_] | None,
    recipe: Recipe,
    seed: int,
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Minimize the cross entropy of each network.

    Args:
        x: Standardized inputs [n, inputs].
        labels: Probabilities [n, bins].
        open_bins: Bins that the softmax runs over [n, bins]; None: all.
        recipe: How to train.
        seed: Of initial weights, batches and dropout.

    Returns:
        (weight [outputs, inputs], bias [outputs]) of each layer, in order: the networks side by
        side, whose averaged outputs are those of one network with networks x units hidden units.
    """
    numbers = np.random.default_rng(seed)
    inputs = np.ascontiguousarray(x, np.float32)
    targets = np.ascontiguousarray(labels, np.float32)
    closed = None if open_bins is None else ~open_bins
    shares = np.log(np.maximum(targets.mean(axis=0), 1e-4))
    parameters = _initial(numbers, inputs.shape[1], shares, recipe)
    first = [np.zeros_like(p) for p in parameters]
    second = [np.zeros_like(p) for p in parameters]
    dropped = round(recipe.dropout * 256)
    for step in range(recipe.steps):
        rows = numbers.integers(len(inputs), size=recipe.batch)
        batch = inputs[rows]
        if dropped:
            # A byte of randomness decides on an input: drawing floats would take longer than the
            # rest of the step.
            drawn = np.frombuffer(numbers.bytes(batch.size), np.uint8).reshape(batch.shape)
            batch *= (drawn >= dropped) * np.float32(256 / (256 - dropped))
        gradients = _gradients(
            parameters, batch, targets[rows], None if closed is None else closed[rows]
        )
        rate = recipe.rate * 0.5 * (1 + np.cos(np.pi * step / recipe.steps))
        # Both bias corrections in two numbers.
        root = np.float32(np.sqrt(1 - 0.999 ** (step + 1)))
        scale = np.float32(rate / (1 - 0.9 ** (step + 1))) * root
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            first[i] += np.float32(0.1) * (g - first[i])
            np.multiply(g, g, out=g)
            second[i] += np.float32(0.001) * (g - second[i])
            if i % 2 == 0:
                p *= np.float32(1 - rate * recipe.decay)
            np.sqrt(second[i], out=g)
            g += np.float32(1e-8) * root
            np.divide(first[i], g, out=g)
            g *= scale
            p -= g
    if recipe.units:
        weight, bias = parameters[2:]  # [networks, bins, units], [networks, 1, bins]
        side_by_side: Floats = np.concatenate(list(weight), axis=1)
        side_by_side /= recipe.networks
        parameters[2:] = [side_by_side, bias.mean(axis=(0, 1))]
    values = [p.astype(np.float64) for p in parameters]
    return list(zip(values[::2], values[1::2], strict=True))


def _initial(
    numbers: np.random.Generator, fan_in: int, shares: NDArray[Any], recipe: Recipe
) -> list[Floats]:
    """Weights and biases by layer; those of several networks' outputs have an axis more."""

    def normal(shape: tuple[int, ...], scale: float) -> Floats:
        return numbers.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    bins = len(shares)
    bias = shares.astype(np.float32)
    if not recipe.units:
        return [normal((bins, fan_in), 0.1 / fan_in**0.5), bias]
    hidden = recipe.networks * recipe.units
    return [
        normal((hidden, fan_in), 1 / fan_in**0.5),
        np.zeros(hidden, np.float32),
        normal((recipe.networks, bins, recipe.units), 0.1 / recipe.units**0.5),
        np.tile(bias, (recipe.networks, 1, 1)),
    ]


def _gradients(
    parameters: list[Floats], x: Floats, targets: Floats, closed: NDArray[np.bool_] | None
) -> list[Floats]:
    """Of the mean cross entropy of a batch, summed over networks, by parameter."""
    if len(parameters) == 2:
        error = _error(x @ parameters[0].T + parameters[1], targets, closed)
        return [error.T @ x, error.sum(axis=0)]
    weight, bias = parameters[2:]
    networks, _, units = weight.shape
    hidden = x @ parameters[0].T
    hidden += parameters[1]
    np.maximum(hidden, 0, out=hidden)
    # [networks, rows, units]
    of_each = np.ascontiguousarray(hidden.reshape(len(x), networks, units).transpose(1, 0, 2))
    error = _error(of_each @ weight.transpose(0, 2, 1) + bias, targets, closed)
    back = (error @ weight).transpose(1, 0, 2).reshape(hidden.shape)
    back = back * (hidden > 0)
    return [
        back.T @ x,
        back.sum(axis=0),
        error.transpose(0, 2, 1) @ of_each,
        error.sum(axis=1, keepdims=True),
    ]


def _error(logits: Floats, targets: Floats, closed: NDArray[np.bool_] | None) -> Floats:
    """Gradient of the mean cross entropy by the logits [..., rows, bins]."""
    if closed is not None:
        logits = np.where(closed, np.float32(-np.inf), logits)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return np.asarray((p - targets) / np.float32(len(targets)))

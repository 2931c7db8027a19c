"""Train heads on hidden states: seconds on a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deinfer.perception.bins import Bins
from deinfer.perception.dataset import Collection
from deinfer.perception.head import LengthHead, Stage, refined_inputs
from deinfer.perception.network import Recipe, fit_network
from deinfer.perception.ridge import fit_ridge

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_COVERAGE = 0.9
_SHARE_ROUNDS = 200
_PROMPT = Recipe(units=0, steps=800, batch=128, rate=1e-3, decay=0.05, dropout=0.3)
_REFINED = Recipe(units=48, steps=500, batch=256, rate=3e-4, decay=0.1, dropout=0.4, networks=3)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How to train.

    Attributes:
        layer: Hidden state to read; None: the one whose ridge has the least leave-one-out error.
        folds: Of the cross-validation that calibrates.
        seed: Of all random numbers.
    """

    layer: int | None = None
    folds: int = 4
    seed: int = 0


def train_head(
    collection: Collection, rows: Ints | None = None, options: TrainOptions | None = None
) -> LengthHead:
    """Train both stages and calibrate them.

    Args:
        collection: Answers and hidden states.
        rows: Prompts to use; None: all.
        options: How to train.

    Returns:
        The head.

    Raises:
        ValueError: There are fewer than 20 prompts, too few of whose answers are long enough to be
            looked at again, or the layer was not collected.
    """
    options = options or TrainOptions()
    rows = np.arange(len(collection.ids)) if rows is None else np.asarray(rows)
    if len(rows) < 20:
        raise ValueError(f"{len(rows)} prompts are too few to train on; 20 are the least")
    start = time.perf_counter()
    layer, errors = _choose_layer(collection, rows, options.layer)
    bins = Bins.fit(collection.lengths[rows], collection.config.cap)
    folds = np.random.default_rng(options.seed).permutation(len(rows)) % options.folds

    prompt_x = collection.prompt_states[rows, layer]
    lengths = collection.lengths[rows]
    labels = np.stack([bins.soft_labels(column) for column in lengths.T], axis=1).mean(axis=1)
    prompt, left_out = _cross_fit(
        lambda train: _fit_prompt(prompt_x[train], labels[train], lengths[train], bins, options),
        prompt_x,
        folds,
        lengths,
        np.ones((len(rows), len(bins.lengths)), np.bool_),
        bins,
    )

    place = np.full(len(collection.ids), -1)
    place[rows] = np.arange(len(rows))
    used = np.flatnonzero(place[collection.refined_rows[:, 0]] >= 0)
    index = collection.refined_rows[used]
    fold_of = folds[place[index[:, 0]]]
    if len(np.unique(fold_of)) < 2:
        raise ValueError(f"too few answers have more than {collection.config.every} tokens")
    states = collection.refined_states[used, :, layer].astype(np.float32)
    # What the first stage says of prompts that it was not trained on: so it will be in use.
    x = refined_inputs(states[:, 0], states[:, 1], index[:, 2], left_out[place[index[:, 0]]])
    final = collection.lengths[index[:, 0], index[:, 1]]
    alive = bins.open(index[:, 2])
    targets = np.where(alive, bins.soft_labels(final), 1e-9)
    targets /= targets.sum(axis=1, keepdims=True)
    refined, _ = _cross_fit(
        lambda train: _fit_refined(x[train], targets[train], alive[train], options),
        x,
        fold_of,
        final[:, None],
        alive,
        bins,
    )
    report: dict[str, Any] = {
        "prompts": len(rows),
        "samples": collection.config.samples,
        "temperature": collection.config.temperature,
        "cap": collection.config.cap,
        "leave_one_out_rmse_of_log_length": errors,
        "train_seconds": time.perf_counter() - start,
    }
    return LengthHead(
        layer=collection.config.layers[layer],
        refine_every=collection.config.every,
        hidden_size=collection.config.hidden_size,
        num_layers=collection.config.num_layers,
        bins=bins,
        prompt=prompt,
        refined=refined,
        report=report,
    )


def log_target(lengths: Ints) -> Floats:
    """Mean logarithm of the samples' lengths [n]: one sample is noisy, their mean less so."""
    return np.asarray(np.log(np.maximum(lengths, 1)).mean(axis=1))


def _choose_layer(
    collection: Collection, rows: Ints, wanted: int | None
) -> tuple[int, dict[str, float]]:
    """Index of the layer, and every layer's leave-one-out error."""
    layers = collection.config.layers
    if wanted is not None and wanted not in layers:
        raise ValueError(f"layer {wanted} was not collected; there are {layers}")
    y = log_target(collection.lengths[rows])
    errors = {}
    for i, layer in enumerate(layers):
        x = collection.prompt_states[rows, i].astype(np.float64)
        x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-6)
        errors[str(layer)] = float(np.sqrt(np.mean((fit_ridge(x, y).left_out - y) ** 2)))
    if wanted is not None:
        return layers.index(wanted), errors
    return int(np.argmin(list(errors.values()))), errors


def _cross_fit(
    fit: Any,
    x: NDArray[Any],
    folds: Ints,
    lengths: Ints,
    alive: NDArray[np.bool_],
    bins: Bins,
) -> tuple[Stage, Floats]:
    """Fit on everything; calibrate by what fits without a fold say of that fold: its logits."""
    logits = np.zeros(alive.shape)
    for fold in np.unique(folds):
        held = folds == fold
        logits[held] = fit(~held).logits(x[held])
    stage: Stage = fit(np.ones(len(x), np.bool_))
    return calibrated(stage, logits, alive, lengths, bins), logits


def calibrated(
    stage: Stage, logits: Floats, alive: NDArray[np.bool_], lengths: Ints, bins: Bins
) -> Stage:
    """Set a stage's temperature and levels.

    The temperature is that of the least log loss. Then the level 0.9 becomes the one at which 90 %
    of the held-out answers lie at or below the quantile that the engine reads off (split-conformal;
    Vovk et al. 2005), with the finite-sample correction (n + 1) q. Levels up to 0.5 stay: the cap,
    a point of much probability, is reached at whatever level lies in it, so that shares at or below
    a lower quantile say little, and the median is good as it is.

    Args:
        stage: To calibrate.
        logits: Of held-out rows [n, bins].
        alive: Bins that are open there [n, bins].
        lengths: Actual lengths [n, samples].
        bins: Of the lengths.

    Returns:
        The calibrated stage.
    """
    index = bins.index(lengths)
    rows = np.arange(len(logits))[:, None]

    def loss(temperature: float) -> float:
        probabilities = replace(stage, temperature=temperature).calibrate(logits, alive)
        return float(-np.log(np.maximum(probabilities[rows, index], 1e-9)).mean())

    temperature = float(min(np.geomspace(0.3, 4.0, 40), key=loss))
    stage = replace(stage, temperature=temperature)
    probabilities = stage.calibrate(logits, alive)
    before = np.cumsum(probabilities, axis=1) - probabilities
    # The quantile reaches a length beyond the level of all bins whose means are below it.
    enough = np.argmax(bins.lengths[None, None, :] >= lengths[:, :, None] - 1e-6, axis=2)
    scores = np.sort(before[rows, enough].ravel())
    rank = min(int(np.ceil((len(scores) + 1) * _COVERAGE)), len(scores)) - 1
    level = float(np.clip(scores[rank] + 1e-6, 0.55, 0.995))
    return replace(
        stage,
        levels_from=np.array([0.0, 0.5, level, 1.0]),
        levels_to=np.array([0.0, 0.5, _COVERAGE, 1.0]),
    )


def _standardize(x: NDArray[Any]) -> tuple[Floats, Floats]:
    shift = x.mean(axis=0, dtype=np.float64)
    deviation = x.std(axis=0, dtype=np.float64)
    return shift, 1.0 / np.maximum(deviation, 1e-3 * max(float(deviation.mean()), 1e-9))


def _fit_prompt(
    x: NDArray[Any], labels: Floats, lengths: Ints, bins: Bins, options: TrainOptions
) -> Stage:
    """Average the logits of a ridge and of a softmax, which is again a linear softmax.

    The ridge ranks better, and better on other prompts than those it was trained on; the softmax
    knows the shape of the distribution and what the cap does.
    """
    shift, scale = _standardize(x)
    inputs = (x - shift) * scale
    parts = [
        _ridge_logits(inputs, labels, lengths, bins),
        fit_network(inputs, labels, None, _PROMPT, options.seed)[0],
    ]
    weight, bias = (np.mean([part[i] for part in parts], axis=0) for i in (0, 1))
    return Stage(shift, scale, (weight, bias))


def _ridge_logits(
    inputs: Floats, labels: Floats, lengths: Ints, bins: Bins
) -> tuple[Floats, Floats]:
    """A ridge on the logarithm of the length with Gaussian errors, as logits of the bins.

    log N(c; mu, s^2) = c mu / s^2 + terms without mu, where c is a bin's logarithm and mu = w x;
    the other terms become biases that give each bin its observed share.
    """
    ridge = fit_ridge(inputs, log_target(lengths))
    variance = np.mean((ridge.left_out[:, None] - np.log(np.maximum(lengths, 1))) ** 2)
    centers = np.log(np.maximum(bins.lengths, 1.0))
    weight = np.outer(centers - centers.mean(), ridge.weights) / max(float(variance), 1e-3)
    fixed = inputs @ weight.T
    shares = np.maximum(labels.mean(axis=0), 1e-4)
    bias = np.log(shares)
    for _ in range(_SHARE_ROUNDS):
        logits = fixed + bias
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        bias += 0.5 * np.log(shares / np.maximum(p.mean(axis=0), 1e-9))
    return weight, bias


def _fit_refined(
    x: NDArray[Any], targets: Floats, alive: NDArray[np.bool_], options: TrainOptions
) -> Stage:
    """One hidden layer; the softmax runs over the bins that are still open."""
    shift, scale = _standardize(x)
    inputs = ((x - shift) * scale).astype(np.float32)
    hidden, output = fit_network(inputs, targets, alive, _REFINED, options.seed)
    return Stage(shift, scale, hidden=hidden, output=output)

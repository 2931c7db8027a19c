"""Judge predictors on a collection: cross-validated, on unseen sources, and while decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deinfer.perception.bins import Bins
from deinfer.perception.dataset import Collection
from deinfer.perception.head import LengthHead
from deinfer.perception.metrics import kendall_tau, pinball, point_metrics
from deinfer.perception.prompt import PromptModel
from deinfer.perception.train import TrainOptions, train_head

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
POSITIONS = (32, 64, 128, 256)


@dataclass(slots=True)
class Evaluation:
    """Results, and the predictions behind them for plots.

    Attributes:
        prompt_time: Metrics by predictor, cross-validated over all prompts.
        calibration: Of the head's distributions against single samples.
        cross_source: Metrics by held-out source and predictor.
        remaining: Metrics of the remaining length by generated tokens and predictor.
        layers: That the head chose, by how often.
        train_seconds: To train a head on (about) 400 answers.
        predicted: Of the head, tokens [n].
        actual: Mean of the samples, tokens [n].
        reliability: (level, share of answers at or below the predicted quantile).
    """

    prompt_time: dict[str, dict[str, float]]
    calibration: dict[str, float]
    cross_source: dict[str, dict[str, dict[str, float]]]
    remaining: dict[str, dict[str, dict[str, float]]]
    layers: dict[str, int]
    train_seconds: dict[str, float]
    predicted: Floats = field(repr=False)
    actual: Floats = field(repr=False)
    reliability: list[tuple[float, float]] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but single predictions."""
        names = ("prompt_time", "calibration", "cross_source", "remaining", "layers")
        result: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {**result, "train_seconds": self.train_seconds, "reliability": self.reliability}


def format_table(evaluation: Evaluation) -> str:
    """Return the results as text for people."""
    rows = [
        f"{'':14}{'MAE':>8}{'Acc-50':>8}{'Acc-100':>8}{'tau':>8}{'within':>8}{'long as short':>15}"
    ]

    def add(name: str, m: dict[str, float]) -> None:
        rows.append(
            f"{name:14}{m['mae']:8.1f}{100 * m['acc50']:7.0f}%{100 * m['acc100']:7.0f}%"
            f"{m['tau']:8.3f}{m['tau_within']:8.3f}{100 * m['long_as_short']:14.0f}%"
        )

    for name, metrics in evaluation.prompt_time.items():
        add(name, metrics)
    for source, predictors in evaluation.cross_source.items():
        rows.append(f"unseen source {source or '(none)'}:")
        for name, metrics in predictors.items():
            add(name, metrics)
    for position, predictors in evaluation.remaining.items():
        answers = next(iter(predictors.values()))["answers"]
        rows.append(f"remaining length after {position} tokens ({answers} answers):")
        for name, m in predictors.items():
            rows.append(f"{name:14}{m['mae']:8.1f}{'':16}{m['tau']:8.3f}")
    c = evaluation.calibration
    rows.append(
        f"calibration: q50 covers {c['coverage_q50']:.1%}, q90 {c['coverage_q90']:.1%}; "
        f"pinball {c['pinball_q50']:.1f} and {c['pinball_q90']:.1f} tokens"
    )
    t = evaluation.train_seconds
    rows.append(f"layers {evaluation.layers}; {t['seconds']:.1f} s train on {t['answers']} answers")
    return "\n".join(rows)


def evaluate(
    collection: Collection,
    *,
    folds: int = 5,
    options: TrainOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Evaluate the head against a constant, TF-IDF + ridge and the `prompt` predictor.

    All are trained on the same splits by prompt. The target of single numbers is the mean of a
    prompt's samples; that of distributions and remaining lengths, every sample.

    Args:
        collection: Answers; prompts with a `source` are also tested on each source alone.
        folds: Of the outer cross-validation.
        options: Of the head's training.
        progress: Called with what is done next.

    Returns:
        The results.

    Raises:
        ValueError: There are too few prompts.
    """
    options = options or TrainOptions()
    n = len(collection.ids)
    if n < 40:
        raise ValueError(f"{n} prompts are too few to evaluate on; 40 are the least")
    actual = collection.lengths.mean(axis=1)
    assignment = _stratified(collection.sources, folds, options.seed)
    points: dict[str, Floats] = {}
    quantiles = {q: np.zeros(n) for q in (*np.round(np.arange(0.1, 0.91, 0.1), 1),)}
    layers: dict[str, int] = {}
    remaining: dict[int, list[tuple[str, Ints, Floats, Floats]]] = {t: [] for t in POSITIONS}
    for fold in range(folds):
        progress(f"fold {fold + 1} of {folds}")
        train, test = np.flatnonzero(assignment != fold), np.flatnonzero(assignment == fold)
        head = train_head(collection, train, options)
        layers[str(head.layer)] = layers.get(str(head.layer), 0) + 1
        found = _prompt_time(collection, train, test, head)
        for name, values in found.items():
            points.setdefault(name, np.zeros(n))[test] = values
        probabilities = head.predict_prompt(_prompt_states(collection, test, head))
        for q, values in quantiles.items():
            values[test] = head.bins.quantile(probabilities, float(q))
        for position in POSITIONS:
            remaining[position] += _remaining(collection, train, test, head, position)
    sources = collection.sources
    return Evaluation(
        prompt_time={
            name: point_metrics(values, actual, sources) for name, values in points.items()
        },
        calibration=_calibration(collection, quantiles),
        cross_source=_cross_source(collection, options, progress),
        remaining=_pool(remaining),
        layers=layers,
        train_seconds=_train_seconds(collection, options),
        predicted=points["hidden_state"],
        actual=actual,
        reliability=[
            (float(q), float(np.mean(collection.lengths <= values[:, None])))
            for q, values in quantiles.items()
        ],
    )


def _stratified(sources: list[str], folds: int, seed: int) -> Ints:
    """Fold of each prompt; every source is spread over all of them."""
    numbers = np.random.default_rng(seed)
    assignment = np.zeros(len(sources), np.int64)
    for source in sorted(set(sources)):
        rows = np.flatnonzero(np.array(sources) == source)
        offset = numbers.integers(folds)
        assignment[rows] = (numbers.permutation(len(rows)) + offset) % folds
    return assignment


def _prompt_states(collection: Collection, rows: Ints, head: LengthHead) -> NDArray[np.float32]:
    layer = collection.config.layers.index(head.layer)
    return np.asarray(collection.prompt_states[rows, layer])


def _prompt_time(
    collection: Collection, train: Ints, test: Ints, head: LengthHead
) -> dict[str, Floats]:
    """One number per test prompt by every predictor."""
    texts = [[collection.prompts[i] for i in rows] for rows in (train, test)]
    lengths, cap = collection.lengths[train], collection.config.cap
    probabilities = head.predict_prompt(_prompt_states(collection, test, head))
    constant = float(np.median(lengths.mean(axis=1)))
    return {
        "constant": np.full(len(test), constant),
        "tfidf_ridge": PromptModel.fit(texts[0], lengths, cap, counts=False).predict(texts[1]),
        "prompt": PromptModel.fit(texts[0], lengths, cap).predict(texts[1]),
        "hidden_state": probabilities @ head.bins.lengths,
    }


def _calibration(collection: Collection, quantiles: dict[Any, Floats]) -> dict[str, float]:
    lengths = collection.lengths.astype(np.float64)
    result = {}
    for q in (0.5, 0.9):
        values = np.broadcast_to(quantiles[q][:, None], lengths.shape)
        result[f"coverage_q{round(100 * q)}"] = float(np.mean(lengths <= values))
        result[f"pinball_q{round(100 * q)}"] = pinball(values, lengths, q)
    return result


def _cross_source(
    collection: Collection, options: TrainOptions, progress: Callable[[str], None]
) -> dict[str, dict[str, dict[str, float]]]:
    """Train on all sources but one, test on that one."""
    sources = np.array(collection.sources)
    result = {}
    actual = collection.lengths.mean(axis=1)
    for source in sorted(set(collection.sources)):
        train, test = np.flatnonzero(sources != source), np.flatnonzero(sources == source)
        if len(train) < 40 or len(test) < 20:
            continue
        progress(f"unseen source {source!r}")
        head = train_head(collection, train, options)
        found = _prompt_time(collection, train, test, head)
        result[source] = {
            name: point_metrics(values, actual[test], [source] * len(test))
            for name, values in found.items()
        }
    return result


def _remaining(
    collection: Collection, train: Ints, test: Ints, head: LengthHead, position: int
) -> list[tuple[str, Ints, Floats, Floats]]:
    """(predictor, prompts, predicted, actual remaining tokens) of test answers that still run."""
    index = collection.refined_rows
    chosen = np.flatnonzero((index[:, 2] == position) & np.isin(index[:, 0], test))
    if not len(chosen):
        return []
    prompts, samples = index[chosen, 0], index[chosen, 1]
    actual = (collection.lengths[prompts, samples] - position).astype(np.float64)
    layer = collection.config.layers.index(head.layer)
    states = collection.refined_states[chosen, :, layer].astype(np.float32)
    generated = index[chosen, 2]
    before = _prompt_states(collection, prompts, head)
    refined = head.predict_refined(states[:, 0], states[:, 1], generated, before)
    first = head.predict_prompt(before)
    survivors = collection.lengths[train].ravel()
    survivors = survivors[survivors > position]
    survival = float(np.median(survivors)) - position if len(survivors) else 1.0
    return [
        ("survival", prompts, np.full(len(chosen), survival), actual),
        (
            "prompt_time",
            prompts,
            _median_beyond(head.bins, first, generated) - position,
            actual,
        ),
        (
            "refined",
            prompts,
            head.bins.median(refined, generated) - position,
            actual,
        ),
    ]


def _median_beyond(bins: Bins, probabilities: Floats, generated: Ints) -> Floats:
    """Medians of distributions, given that so many tokens are there."""
    kept = np.where(bins.open(generated), probabilities, 0.0)
    kept[:, -1] += 1e-9
    return bins.median(kept / kept.sum(axis=1, keepdims=True), generated)


def _pool(
    remaining: dict[int, list[tuple[str, Ints, Floats, Floats]]],
) -> dict[str, dict[str, dict[str, float]]]:
    result: dict[str, dict[str, dict[str, float]]] = {}
    for position, parts in remaining.items():
        for name in dict.fromkeys(part[0] for part in parts):
            predicted = np.concatenate([part[2] for part in parts if part[0] == name])
            actual = np.concatenate([part[3] for part in parts if part[0] == name])
            result.setdefault(str(position), {})[name] = {
                "answers": len(actual),
                "mae": float(np.abs(predicted - actual).mean()),
                # A constant differs between folds, which says nothing.
                "tau": 0.0 if name == "survival" else kendall_tau(predicted, actual),
            }
    return result


def _train_seconds(collection: Collection, options: TrainOptions) -> dict[str, float]:
    prompts = min(len(collection.ids), max(20, 400 // collection.lengths.shape[1]))
    start = time.perf_counter()
    train_head(collection, np.arange(prompts), options)
    return {
        "answers": prompts * collection.lengths.shape[1],
        "seconds": time.perf_counter() - start,
    }

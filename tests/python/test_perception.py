"""Training and judging of length predictors, on states with a planted direction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from deinfer.perception import PREDICTORS, instructed, load_predictors
from deinfer.perception.bins import Bins
from deinfer.perception.dataset import Collection, CollectionConfig, read_prompts
from deinfer.perception.evaluate import evaluate, format_table
from deinfer.perception.features import TfIdf
from deinfer.perception.head import LengthHead
from deinfer.perception.metrics import kendall_tau, long_as_short, pinball, point_metrics
from deinfer.perception.prompt import PromptModel
from deinfer.perception.ridge import fit_ridge
from deinfer.perception.train import TrainOptions, train_head

QUICK = TrainOptions(folds=2)
HIDDEN, CAP, EVERY = 24, 256, 16


def planted(n: int = 160, samples: int = 2, seed: int = 0) -> Collection:
    """Layer 1 holds the logarithm of the expected length; later states what is left of it."""
    numbers = np.random.default_rng(seed)
    direction = numbers.standard_normal(HIDDEN) / HIDDEN**0.5
    typical = numbers.uniform(3.0, 6.2, n)
    logs = typical[:, None] + 0.35 * numbers.standard_normal((n, samples))
    lengths = np.minimum(np.maximum(np.exp(logs), 2), CAP).astype(np.int64)
    noise = numbers.standard_normal((n, 2, HIDDEN))
    prompt_states = noise.copy()
    prompt_states[:, 1] += 4 * typical[:, None] * direction
    rows, states = [], []
    for i in range(n):
        for j in range(samples):
            for t in range(EVERY, lengths[i, j], EVERY):
                state = numbers.standard_normal((2, 2, HIDDEN))
                state[:, 1] += 4 * (logs[i, j] - np.log(t)) * direction
                rows.append((i, j, t))
                states.append(state)
    config = CollectionConfig("model", HIDDEN, 2, [0, 1], EVERY, samples, 0.7, CAP, False, 0)
    words = ["tell", "me", "something", "about", "rivers", "and", "lakes", "please"]
    return Collection(
        config=config,
        ids=[str(i) for i in range(n)],
        sources=["ab"[i % 2] for i in range(n)],
        prompts=[" ".join(numbers.choice(words, 6)) for _ in range(n)],
        lengths=lengths,
        censored=lengths >= CAP,
        prompt_states=prompt_states.astype(np.float32),
        refined_rows=np.array(rows),
        refined_states=np.array(states).astype(np.float16),
    )


def test_a_planted_direction_is_found_and_beats_the_baselines() -> None:
    result = evaluate(planted(), folds=2, options=QUICK)
    ours, text = result.prompt_time["hidden_state"], result.prompt_time["tfidf_ridge"]
    assert ours["mae"] < 0.7 * text["mae"]
    assert ours["mae"] < 0.7 * result.prompt_time["constant"]["mae"]
    assert ours["tau"] > text["tau"] + 0.3
    assert result.layers == {"1": 2}
    assert 0.8 < result.calibration["coverage_q90"] < 0.97
    assert 0.4 < result.calibration["coverage_q50"] < 0.75
    assert set(result.cross_source) == {"a", "b"}
    for metrics in result.cross_source.values():
        assert metrics["hidden_state"]["tau"] > metrics["tfidf_ridge"]["tau"] + 0.3
    remaining = result.remaining["64"]
    assert remaining["refined"]["mae"] < 0.75 * remaining["survival"]["mae"]
    assert remaining["refined"]["tau"] > remaining["prompt_time"]["tau"]
    table = format_table(result)
    assert "unseen source a" in table
    assert f"{ours['mae']:.1f}" in table


def test_states_without_a_direction_give_no_skill() -> None:
    collection = replace(planted(), sources=[""] * 160)
    numbers = np.random.default_rng(9)
    noise = numbers.standard_normal(collection.prompt_states.shape).astype(np.float32)
    result = evaluate(replace(collection, prompt_states=noise), folds=2, options=QUICK)
    assert abs(result.prompt_time["hidden_state"]["tau"]) < 0.15


def test_what_is_too_little_is_refused() -> None:
    collection = planted(30)
    with pytest.raises(ValueError, match="30 prompts are too few"):
        evaluate(collection)
    with pytest.raises(ValueError, match="10 prompts are too few"):
        train_head(collection, np.arange(10))


def test_a_saved_head_says_the_same(tmp_path: Path) -> None:
    collection = planted(60)
    head = train_head(collection)
    again = LengthHead.load(head.save(tmp_path))
    states = collection.prompt_states[:, 1]
    np.testing.assert_allclose(again.predict_prompt(states), head.predict_prompt(states), atol=1e-4)
    generated = collection.refined_rows[:20, 2]
    along = collection.refined_states[:20, :, 1].astype(np.float32)
    first = states[collection.refined_rows[:20, 0]]
    for one in (head, again):
        p = one.predict_refined(along[:, 0], along[:, 1], generated, first)
        np.testing.assert_allclose(p.sum(axis=1), 1)
        assert (p[~head.bins.open(generated)] == 0).all()
    assert again.report["prompts"] == 60
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(ValueError, match=name):
            LengthHead.load(tmp_path / name)


def test_bins_and_censored_lengths() -> None:
    bins = Bins.fit([1, 5, 100, 250, 256, 256, 256], 256)
    assert bins.index([0, 255, 256, 400]).tolist() == [0, 14, 15, 15]
    labels = bins.soft_labels([100, 256])
    np.testing.assert_allclose(labels.sum(axis=1), 1)
    assert labels[0].argmax() == bins.index([100])[0]
    assert labels[0, -1] == 0.0  # it ended: it was not cut off
    assert labels[1, -1] == 1.0
    assert bins.open(np.array([0, 100, 1000])).sum(axis=1).tolist() == [16, 10, 1]
    sure = np.eye(16)[[3]]
    assert bins.edges[3] < bins.median(sure)[0] < bins.edges[4]
    assert bins.quantile(sure, 0.9)[0] == bins.lengths[3]
    short = Bins.fit(np.full(100, 20), 2048)  # far below the cap: narrow bins where answers end
    assert short.edges[-2] == 25
    assert short.edges[-1] == short.lengths[-1] == 2048
    assert (np.diff(short.lengths) > 0).all()


def test_metrics_against_hand_computation() -> None:
    # Pairs of (1, 2, 2, 3) and (1, 3, 2, 2): 3 concordant, 1 discordant, one tie on each side.
    assert kendall_tau([1, 2, 2, 3], [1, 3, 2, 2]) == pytest.approx((3 - 1) / 5)
    assert kendall_tau([1, 2, 3], [4, 5, 6]) == pytest.approx(1)
    assert kendall_tau([1, 1, 1], [4, 5, 6]) == 0.0
    assert kendall_tau([1, 2, 9, 8], [1, 2, 3, 4], ["a", "a", "b", "b"]) == pytest.approx(0)
    assert pinball(np.array([10.0, 10.0]), np.array([20.0, 0.0]), 0.9) == pytest.approx((9 + 1) / 2)
    actual = np.arange(10.0)
    assert long_as_short(actual, actual) == 0.0
    assert long_as_short(-actual, actual) == 1.0
    metrics = point_metrics(np.zeros(4), np.array([10.0, 60, 90, 200]), list("abab"))
    assert (metrics["mae"], metrics["acc50"], metrics["acc100"]) == (90, 0.25, 0.75)


def test_ridge_leaves_out_exactly() -> None:
    numbers = np.random.default_rng(4)
    x = numbers.standard_normal((30, 50))
    y = x[:, 0] + 0.3 * numbers.standard_normal(30)
    fit = fit_ridge(x, y)
    # The penalty that was chosen follows from the solution; refit without a row by hand.
    a, target = x - x.mean(axis=0), y - y.mean()
    dual = (target - a @ fit.weights) / np.linalg.lstsq(a.T, fit.weights, rcond=None)[0]
    penalty = float(np.median(dual))
    for row in (0, 7):
        kept = np.arange(30) != row
        b, t = x[kept] - x[kept].mean(axis=0), y[kept] - y[kept].mean()
        w = b.T @ np.linalg.solve(b @ b.T + penalty * np.eye(29), t)
        expected = y[kept].mean() + (x[row] - x[kept].mean(axis=0)) @ w
        assert fit.left_out[row] == pytest.approx(expected, abs=1e-6)


def test_text_alone_can_be_learned_and_stored(tmp_path: Path) -> None:
    numbers = np.random.default_rng(2)
    kinds = numbers.integers(2, size=80)
    texts = [
        f"write a long essay about rivers {i}" if kind else f"name one word {i}"
        for i, kind in enumerate(kinds)
    ]
    lengths = np.where(kinds == 1, 200, 10)[:, None] + numbers.integers(0, 5, (80, 2))
    model = PromptModel.fit(texts[:60], lengths[:60], 256)
    found = model.predict(texts[60:])
    assert kendall_tau(found, lengths[60:].mean(axis=1)) > 0.35  # 0.5: the kinds alone
    again = PromptModel.load(model.save(tmp_path))
    np.testing.assert_array_equal(again.distributions(texts), model.distributions(texts))
    assert again.distributions(["?"]).shape == (1, 16)  # no known word
    assert TfIdf.fit(["one two", "one two"]).vocabulary == ["one", "one two", "two"]


def test_predictors_are_found_by_name_or_file(tmp_path: Path) -> None:
    assert load_predictors("", tmp_path) == []
    (history,) = load_predictors("history", tmp_path)
    assert history.predict(["a", "b"], lambda q, n: []) == [None, None]
    (head,) = load_predictors("hidden_state", tmp_path)
    assert head.engine_head == str(tmp_path / "perception" / "hidden_state.json")
    for name, message in (
        ("oracle", "length_predictor = 'oracle' is unknown; use one of history, prompt"),
        ("prompt", "train"),
        (str(tmp_path / "none.json"), "cannot be read"),
        (["hidden_state", "hidden_state"], "several heads"),
    ):
        with pytest.raises(ValueError, match=message):
            load_predictors(name, tmp_path)
    with pytest.raises(TypeError, match="not a string"):
        load_predictors([3], tmp_path)  # type: ignore[list-item]
    assert set(PREDICTORS) == {"history", "prompt", "hidden_state", "instructed"}


def test_instructed_reads_numbers_and_nothing_else(tmp_path: Path) -> None:
    assert instructed.parse_length("About 1,200 tokens, or 3") == 1200
    assert instructed.parse_length("none") is None
    assert instructed.parse_length("0") is None
    assert instructed.split_advance("42\nThe answer.") == (42, "The answer.")
    assert instructed.split_advance("The answer.") == (None, "The answer.")
    replies = {instructed.query("a"): "17", instructed.query("b"): "I do not know"}
    (predictor,) = load_predictors("instructed", tmp_path)
    found = predictor.predict(["a", "b"], lambda questions, _: [replies[q] for q in questions])
    assert found == [([17.0], [1.0]), None]
    perfect = instructed.judge(
        lambda questions, _: [str(10 * (i + 1)) for i in range(len(questions))],
        ["x", "y", "z"],
        [10, 20, 30],
    )
    for style in ("query", "in_advance"):
        assert perfect[style] == {"with_number": 1.0, "mae": 0.0, "tau": pytest.approx(1)}


def test_prompts_of_all_kinds_of_files(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert [(r.id, r.prompt) for r in read_prompts(text)] == [("1", "one"), ("3", "two")]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"id": "x", "prompt": "p", "source": "s"}\n{"prompt": "q"}\n')
    assert [(r.id, r.source) for r in read_prompts(lines)] == [("x", "s"), ("2", "")]
    for content, message in (
        ("{", "line 1 is no JSON"),
        ('{"question": 1}', 'line 1 has no "prompt"'),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "'1' occurs twice"),
        ("", "no prompt"),
    ):
        lines.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(lines)

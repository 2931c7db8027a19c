"""The choice of prompts and the checks of bench/perception.py. Nothing is collected here."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import perception as bench  # noqa: E402
from deinfer.perception.dataset import PromptRecord  # noqa: E402
from deinfer.perception.evaluate import Evaluation  # noqa: E402


def test_the_largest_source_is_cut() -> None:
    records = [PromptRecord(f"big-{i}", "p", "x") for i in range(50)]
    records += [PromptRecord(f"small-{i}", "p", "y") for i in range(10)]
    records += [PromptRecord("7", "p", "own")]
    chosen = bench.choose(records, 31, seed=0)
    sources = [record.source for record in chosen]
    assert {s: sources.count(s) for s in set(sources)} == {"big": 20, "small": 10, "own": 1}
    assert chosen == bench.choose(records, 31, seed=0)
    assert chosen != bench.choose(records, 31, seed=1)
    assert sources != sorted(sources)


def evaluation(mae: float, tau: float, refined: float, coverage: float) -> Evaluation:
    metrics = {
        "tfidf_ridge": {"mae": 100.0, "tau": 0.2},
        "hidden_state": {"mae": mae, "tau": tau},
    }
    return Evaluation(
        prompt_time=metrics,
        calibration={"coverage_q90": coverage},
        cross_source={"s": metrics},
        remaining={"64": {"survival": {"mae": 100.0}, "refined": {"mae": refined}}},
        layers={},
        train_seconds={"seconds": 5.0},
        predicted=None,  # type: ignore[arg-type]
        actual=None,  # type: ignore[arg-type]
        reliability=[],
    )


@pytest.mark.parametrize(
    ("values", "missed"),
    [
        ((84.0, 0.33, 74.0, 0.9), set()),
        ((86.0, 0.33, 74.0, 0.9), {"same sources: MAE / TF-IDF", "unseen s: MAE / TF-IDF"}),
        ((84.0, 0.31, 74.0, 0.9), {"same sources: tau - TF-IDF's"}),
        ((84.0, 0.33, 76.0, 0.9), {"remaining at 64: MAE / survival"}),
        ((84.0, 0.33, 74.0, 0.96), {"q90 coverage"}),
        ((84.0, 0.33, 74.0, 0.84), {"q90 coverage"}),
    ],
)
def test_each_target_is_checked(values: tuple[float, ...], missed: set[str]) -> None:
    checks = bench.checks_of(evaluation(*values), {"head_share_of_prefill": 0.001})
    assert {check.name for check in checks if not check.ok} == missed
    slow = bench.checks_of(evaluation(*values), {"head_share_of_prefill": 0.006})
    assert any(check.name == "head / prefill" and not check.ok for check in slow)

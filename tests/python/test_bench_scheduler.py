"""The scheduler's simulation: equal to a straightforward reference, and its workloads as told.

The native simulation is bench/native/scheduler_sim.cc; the scheduler in it is the runtime's.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import scheduler_reference as reference

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import native_cpu  # noqa: E402
import simulation  # noqa: E402
import traces  # noqa: E402

COST = simulation.StepCost(a=10.0, b=0.5, c=0.01, p=0.2)
COSTS = (COST.a, COST.b, COST.c, COST.p)


@pytest.fixture(scope="module")
def library() -> None:
    if not native_cpu.LIBRARY.is_file():
        native_cpu.build()


@pytest.fixture(scope="module")
def load() -> dict:
    lengths = traces.synthetic_lengths(600, seed=4)
    return {
        "prompt": traces.prompt_tokens(600, seed=5),
        "output": lengths.served,
        "expected": traces.noisy_buckets(lengths.longest, seed=6),
    }


STATIC_CASES = {
    "plain": (simulation.static(), {}),
    "sorted": (simulation.static(sort=True), {"sort": True}),
    "variable": (
        {**simulation.PAPER, "collect_failures": False},
        {"sort": True, "variable": True},
    ),
    "recompute": ({**simulation.PAPER, "bucket_tokens": 0}, {"sort": True, "recompute": True}),
    "paper": (simulation.PAPER, {"sort": True, "variable": True, "recompute": True}),
}


@pytest.mark.parametrize("case", STATIC_CASES)
def test_static_batches_equal_the_reference(case: str, load, library) -> None:
    ours, parts = STATIC_CASES[case]
    prompt, output, expected = (load[key].tolist() for key in ("prompt", "output", "expected"))
    told = expected if parts.pop("sort", False) else None
    theirs = reference.static(prompt, output, COSTS, told, **parts)
    belief = traces.certain(load["expected"])
    trace = simulation.offline(load["prompt"], load["output"], belief)
    report = simulation.simulate(trace, simulation.settings(slots=256, cost=COST, static=ours))
    assert report["steps"] == theirs.steps
    assert report["seconds"] == pytest.approx(theirs.ms / 1e3, rel=1e-9)
    assert report["average_length"] == pytest.approx(theirs.rows / len(output), rel=1e-12)
    assert report["preemptions"] == len(theirs.failed)
    assert (len(theirs.failed) > 20) == parts.get("recompute", False)


def test_continuing_failures_computes_less_than_restarting_them(load, library) -> None:
    trace = simulation.offline(load["prompt"], load["output"], traces.certain(load["expected"]))
    steps = {}
    for restart in (False, True):
        batches = {**simulation.PAPER, "restart_failures": restart}
        options = simulation.settings(slots=256, cost=COST, static=batches)
        steps[restart] = simulation.simulate(trace, options)["steps"]
    assert steps[False] < 0.95 * steps[True]


@pytest.mark.parametrize("slots", [1, 7, 64])
def test_continuous_batching_equals_the_reference(slots: int, load, library) -> None:
    prompt, output = load["prompt"][:200], load["output"][:200]
    arrival = traces.arrivals(200, rate=3.0, seed=8, cv=2.0)
    steps, ends = reference.continuous(
        (arrival * 1e3).tolist(), prompt.tolist(), output.tolist(), COSTS, slots
    )
    trace = simulation.Trace(arrival, prompt, output)
    options = simulation.settings(
        slots=slots, cost=COST, policy="fcfs", step_tokens=simulation.UNBOUNDED
    )
    report = simulation.simulate(trace, options)
    assert report["steps"] == steps
    latency = np.array(ends) / 1e3 - arrival
    assert report["latency"]["mean"] == pytest.approx(latency.mean(), rel=1e-9)
    assert report["latency"]["p99"] == pytest.approx(np.percentile(latency, 99), rel=1e-9)
    assert report["effective"] == 1.0


def test_little_kv_costs_preemptions_and_time(load, library) -> None:
    trace = simulation.offline(load["prompt"], load["output"])
    wide, narrow = (
        simulation.simulate(
            trace,
            simulation.settings(slots=64, cost=COST, policy="fcfs", kv_tokens=kv, **admission),
        )
        for kv, admission in ((simulation.UNBOUNDED, {}), (3200, {"admission": "prompt"}))
    )
    assert narrow["preemptions"] == narrow["evicted_for_decode"] > 20
    assert wide["preemptions"] == wide["recomputed_tokens"] == 0
    assert narrow["seconds"] > 1.1 * wide["seconds"]
    assert narrow["mean_batch"] < wide["mean_batch"]


def test_bad_settings_are_refused(load, library) -> None:
    trace = simulation.offline(load["prompt"], load["output"])
    options = simulation.settings(slots=4, cost=COST, policy="fcfs")
    with pytest.raises(RuntimeError, match="unknown setting slots"):
        simulation.simulate(trace, {**options, "slots": 4})
    with pytest.raises(RuntimeError, match='"nonsense" is unknown'):
        simulation.simulate(trace, {**options, "policy": "nonsense"})
    with pytest.raises(RuntimeError, match="batch_size must be at least 1, got 0"):
        simulation.simulate(
            trace, {**options, "policy": "static_bucket", "static": {"batch_size": 0}}
        )


def test_soak_reports_planning_and_memory(library) -> None:
    options = simulation.settings(
        slots=32, cost=COST, policy="fcfs", kv_tokens=32 * 400, max_tokens=100
    )
    report = simulation.soak(options, requests=1000, waiting=200)
    assert report["ended"] >= 1000
    assert 0 < report["planning"]["mean_us"] <= report["planning"]["max_us"]
    assert report["late_bytes"] >= report["early_bytes"] > 1 << 20


def test_traces_are_read_sorted_with_their_beliefs(tmp_path: Path, library) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("arrival,prompt,output,mean\n2.5,10,3,4\n0.5,20,5,\n")
    trace = simulation.read_trace(file)
    assert trace.arrival.tolist() == [0.5, 2.5]
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([20, 10], [5, 3])
    assert trace.belief is not None
    assert np.isnan(trace.belief.lengths[0, 0]) and trace.belief.lengths[1, 0] == 4
    report = simulation.simulate(trace, simulation.settings(slots=2, cost=COST))
    assert report["steps"] == 8
    file.write_text("arrival,output\n0,1\n")
    with pytest.raises(ValueError, match="prompt"):
        simulation.read_trace(file)


def test_lengths_files_have_a_column_per_temperature(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("id,reference,t0.0,t0.3\n1,9,5,8\n2,9,600,3\n")
    lengths = traces.read_lengths(file)
    assert lengths.served.tolist() == [5, traces.MAX_TOKENS]
    assert lengths.longest.tolist() == [8, traces.MAX_TOKENS]
    file.write_text("id,t0.5\n1,5\n")
    with pytest.raises(ValueError, match="no column t0.0"):
        traces.read_lengths(file)


def test_arrivals_have_their_rate_and_burstiness() -> None:
    for cv in (1.0, 4.0):
        gaps = np.diff(traces.arrivals(40_000, rate=5.0, seed=1, cv=cv))
        assert gaps.mean() == pytest.approx(0.2, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_the_noisy_predictor_is_as_accurate_as_the_papers() -> None:
    past, now = traces.synthetic_lengths(8000, seed=2).halves()
    told = traces.accuracy(traces.noisy_buckets(now.longest, seed=3), now.longest)
    assert 50 < told["mae"] < 75
    assert 0.5 < told["within_50"] < 0.68
    belief = traces.noisy(past, now, seed=3)
    np.testing.assert_allclose(belief.probabilities.sum(axis=1), 1.0, rtol=1e-6)
    served = traces.accuracy(belief.mean, now.served)
    assert 0.4 < served["tau"] < 0.65
    assert belief.mean.mean() == pytest.approx(now.served.mean(), rel=0.1)
    same = traces.same_for_all(past, 3)
    assert same.mean == pytest.approx(past.served.mean(), rel=1e-3)
    assert traces.accuracy(now.served, now.served)["tau"] == pytest.approx(1.0)

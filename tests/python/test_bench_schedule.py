"""The judgement of the scheduling benchmarks: tables, targets, fits, gains. Nothing is timed."""

import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import native_cpu  # noqa: E402
import schedule_experiments as experiments  # noqa: E402
import schedule_plots  # noqa: E402
import schedule_real  # noqa: E402
import simulation  # noqa: E402
import step_cost  # noqa: E402
import traces  # noqa: E402


def sample(cost: simulation.StepCost, sequences: int, kv: int, prefill: int, noise: float = 1.0):
    ms = float(cost.ms(np.array(sequences), np.array(kv), np.array(prefill))) * noise
    return step_cost.StepSample(sequences, kv, prefill, ms)


def test_the_cost_of_steps_is_found_again() -> None:
    cost = simulation.StepCost(a=7.0, b=0.3, c=0.001, p=0.5)
    samples = [sample(cost, s, s * n, 0) for s in (1, 4, 16) for n in (20, 300)]
    samples += [sample(cost, 1, n, n) for n in (32, 400)]
    fitted = step_cost.fit(samples)
    for name in ("a", "b", "c", "p"):
        assert getattr(fitted, name) == pytest.approx(getattr(cost, name), rel=1e-6)
    assert np.abs(step_cost.relative_errors(fitted, samples)).max() < 1e-9


def test_no_cost_is_negative() -> None:
    # Longer caches happened to be measured faster: least squares alone would make c negative.
    cost = simulation.StepCost(a=7.0, b=0.3, c=0.0, p=0.5)
    samples = [
        sample(cost, s, s * n, 0, 1.0 if n == 20 else 0.97) for s in (1, 4, 16) for n in (20, 300)
    ]
    fitted = step_cost.fit([*samples, sample(cost, 1, 100, 100)])
    assert fitted.c == 0.0
    assert min(fitted.a, fitted.b, fitted.p) > 0


def test_variants_name_policy_admission_and_predictor() -> None:
    assert schedule_real.variant_options("fcfs") == ({"policy": "fcfs"}, "")
    eager = {"policy": "fcfs", "admission": "prompt", "max_pause": 0, "preempt_limit": 0}
    assert schedule_real.variant_options("fcfs eager") == (eager, "")
    assert schedule_real.variant_options("sjf oracle") == ({"policy": "sjf"}, "oracle")


def session(setting: str, **runs: tuple[float, float]) -> dict:
    return {
        "setting": setting,
        "runs": {
            name.replace("_", " "): {"seconds": seconds, "mean_latency": latency}
            for name, (seconds, latency) in runs.items()
        },
    }


def predicted(**runs: tuple[float, float]) -> dict:
    return {
        name.replace("_", " "): {"seconds": seconds, "latency": {"mean": latency}}
        for name, (seconds, latency) in runs.items()
    }


def test_gains_are_compared_within_sessions_with_their_share_and_sign() -> None:
    simulated = {
        "slots": predicted(fcfs=(10, 5), sjf_oracle=(10, 2.5), static=(20, 10)),
        "kv": predicted(fcfs_eager=(10, 5), fcfs=(9.9, 5), fcfs_oracle=(8, 5)),
    }
    measured = [
        # Half as fast a machine, for both.
        session("slots", fcfs=(20, 10), sjf_oracle=(20, 5.6), static=(30, 20)),
        session("slots", fcfs=(10, 5), sjf_oracle=(10, 2.8)),
        session("kv", fcfs_eager=(10, 5), fcfs=(10.5, 5), fcfs_oracle=(9.5, 5)),
        session("kv", fcfs=(10.5, 5)),  # nothing to compare with
    ]
    rows, checks = schedule_real.compare(measured, simulated)
    gains = {row["variant"]: (row["predicted"], row["measured"]) for row in rows}
    assert gains["sjf oracle"] == pytest.approx((2.0, 5 / 2.8))
    assert gains["static"] == pytest.approx((0.5, 2 / 3))
    judged = {check.name.split(",")[0]: check for check in checks}
    assert set(judged) == {
        "slots: sjf oracle / fcfs",
        "slots: static / fcfs",
        "kv: fcfs oracle / fcfs eager",  # fcfs: too small a gain to be judged
    }
    assert judged["slots: sjf oracle / fcfs"].target == pytest.approx(1.7)
    assert judged["slots: sjf oracle / fcfs"].ok
    loss = judged["slots: static / fcfs"]
    assert loss.target == pytest.approx(0.65) and not loss.at_least and not loss.ok
    assert not judged["kv: fcfs oracle / fcfs eager"].ok


def test_targets_are_ratios_of_means() -> None:
    row = {"throughput": 1.0, "mean": 1.0, "max_wait": 1.0, "preemptions": 0.0}
    tables = {
        "over_static": {"static 16": row, "fcfs": {**row, "throughput": 2.95}},
        "kv_bound": {
            "fcfs, prompt fits, no hysteresis": {**row, "preemptions": 90.0},
            "fcfs, peak, none": {**row, "throughput": 1.031, "preemptions": 10.0},
        },
        "drain": {"fcfs": row, "longest_tail, refined": {**row, "throughput": 1.04}},
        "overload": {
            "fcfs": {**row, "mean": 6.0, "max_wait": 10.0},
            "hrrn, noisy": {**row, "mean": 4.9, "max_wait": 14.9},
            "sjf, noisy": {**row, "mean": 4.0, "max_wait": 40.0},
        },
    }
    ok = [check.ok for check in experiments.target_checks(tables)]
    assert ok == [True, True, False, False, True, True, True]


def test_experiments_run_and_are_plotted(tmp_path: Path) -> None:
    if not native_cpu.LIBRARY.is_file():
        native_cpu.build()
    load = experiments.Load(
        traces.synthetic_lengths(1200, seed=3), simulation.CUDA_GRAPHS, seeds=1, quick=True
    )
    tables = {name: experiment(load) for name, experiment in experiments.EXPERIMENTS.items()}
    over = tables["over_static"]
    assert over["fcfs"]["throughput"] > 2 * over["static 16"]["throughput"]
    assert over["fcfs"]["effective"] == 1.0 > over["static 16"]["effective"]
    assert over["paper, oracle"]["throughput"] > over["paper, noisy"]["throughput"]
    tail = tables["drain"]
    assert tail["longest_tail, oracle"]["throughput"] >= tail["fcfs"]["throughput"]
    known = tail["longest_tail, refined, longest known"]["throughput"]
    assert known >= tail["longest_tail, noisy, longest known"]["throughput"]
    assert len(experiments.target_checks(tables)) == 7
    schedule_plots.plot_all(tables, tmp_path)
    for name in ("throughput", "latency"):
        assert (tmp_path / f"scheduler_{name}.png").stat().st_size > 10_000


def test_a_refined_predictor_is_as_certain_as_the_measured_head() -> None:
    past = traces.synthetic_lengths(4000, seed=5)
    now = traces.synthetic_lengths(1500, seed=6)
    belief = traces.refining(past, now, seed=1)
    assert belief.refined is not None
    stages = -(-traces.MAX_TOKENS // traces.REFINE_EVERY) - 1
    assert belief.refined.lengths.shape == (1500, stages, traces.MAX_BINS)
    assert np.isfinite(belief.refined.lengths).all()
    alive = now.served > 64
    # Refined beliefs are of answers that have got so far.
    assert (belief.refined.lengths[alive, 3] > 64).all()
    accuracy = traces.refined_accuracy(belief, past, now)
    errors = [accuracy[key]["mae_over_survival"] for key in ("32", "64")]
    assert all(0.5 < error < 0.95 for error in errors)
    later = np.abs(np.median(belief.lengths[alive], axis=1) - now.served[alive]).mean()
    refined = np.median(belief.refined.lengths[alive, 3], axis=1)
    assert np.abs(refined - now.served[alive]).mean() < later


def test_the_longest_of_a_bucket_bounds_all_that_were_told_the_same() -> None:
    told = np.array([[50, 100], [50, 50], [100, 100], [50, 100]])
    served = np.array([40, 10, 99, 70])
    belief = traces.longest_of_bucket(told, served)
    assert belief.lengths[:, 0].tolist() == [70, 70, 99, 70]
    assert belief.refined is not None
    # The second one is over after 16 tokens.
    assert belief.refined.lengths[[0, 2, 3], 0, 0].tolist() == [99, 99, 99]

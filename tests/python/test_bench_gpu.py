"""The GPU benchmark where there is no GPU: its refusal, its table, its steps on the CPU."""

import datetime
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import gpu
import gpu_checks
import gpu_ranks
import random_llama

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}


def answer(code: int, out: str = "", err: str = "") -> Any:
    return lambda *_, **__: subprocess.CompletedProcess([], code, out, err)


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu.main([]) == 2
    assert "no NVIDIA GPU here: nvidia-smi is not installed" in capsys.readouterr().err
    with pytest.raises(gpu.NoDeviceError, match="driver is not loaded"):
        gpu.find_device(answer(9, err="driver is not loaded"))
    found = gpu.find_device(answer(0, "NVIDIA H200, 580.1\nNVIDIA H200, 580.1\n"))
    assert found == {"name": "NVIDIA H200", "driver_version": "580.1"}
    name = gpu.result_name(found["name"], datetime.date(2026, 1, 2))
    assert name == "gpu-nvidia-h200-2026-01-02"


def test_products_have_the_models_parameters() -> None:
    dense = gpu.products(gpu.LLAMA_7B, 0)
    assert len(dense) == 32 * 7 + 1
    parameters = sum(n * k for n, k in dense)
    assert parameters == 6_607_077_376
    factors = gpu.products(gpu.LLAMA_7B, 0.5)
    head = 32000 * 4096
    assert sum(n * k for n, k in factors) - head == pytest.approx(
        0.5 * (parameters - head), rel=1e-3
    )


def measured(**changes: float) -> dict[str, Any]:
    engine = {"decode 1": 3.0, "decode 16": 4.0, "decode 64": 6.0, "decode 128": 8.0}
    engine |= {"prefill": 50.0, "dense 1": 0.6, "sampled 64": 6.1}
    engine |= {"int8 1": 2.0, "dense int8 1": 0.4} | changes
    torch_ms = {"decode 1": 5.0, "decode 16": 3.9, "decode 128": 7.9, "prefill": 49.0}
    return {
        "failed_tests": 0,
        "failed_torch_tests": 0,
        "sanitizer": [],
        "agreement": {"equal": 18, "ties": 2, "others": []},
        "busy_ms": {"decode 64": 5.8},
        "dense_bytes": 2_000_000_000,
        "engine_ms": {name: [value] for name, value in engine.items()},
        "torch_ms": {name: [value] for name, value in torch_ms.items()},
        "outside_model": {"decode 64": 0.01},
        "ceilings": {"read_gb_per_s": 4000.0},
        "weight_bytes": 7_000_000_000,
        "ranks": {
            "naive 1": {"step_ms": 1.0},
            "naive 2": {"step_ms": 2.0, "equal_tokens": 0.5, "lockstep_equal": True},
        },
    }


def test_the_table_knows_the_targets() -> None:
    checks = {check.name: check for check in gpu.judge(measured())}
    assert all(check.ok for check in checks.values())
    assert checks["decode of 1 / torch"].value == pytest.approx(0.6)
    assert checks["bandwidth bound / decode of 1"].value == pytest.approx(7 / 4 / 3)
    assert checks["bandwidth bound / dense decode of 1"].value == pytest.approx(0.5 / 0.6)
    assert checks["dense 1: bf16 / int8"].value == pytest.approx(1.5)
    assert checks["no kernel runs, decode of 64"].value == pytest.approx(0.2 / 6.0)
    without = gpu.judge({**measured(), "agreement": None, "sanitizer": None})
    assert len(without) == len(checks) - 2
    differs = {"equal": 19, "ties": 0, "others": [{"question": "", "place": 3}]}
    assert [c.name for c in gpu.judge({**measured(), "agreement": differs}) if not c.ok] == [
        "answers that differ, no ties"
    ]
    slow = {c.name for c in gpu.judge(measured(**{"decode 1": 5.0, "prefill": 60.0})) if not c.ok}
    assert slow == {
        "decode of 1 [ms]",
        "decode of 1 / torch",
        "bandwidth bound / decode of 1",
        "torch's products / prefill",
    }


def test_kernels_are_told_from_copies() -> None:
    events = [("linear", 0, 10), ("Memcpy HtoD", 5, 30), ("norm", 8, 12), ("norm", 40, 41)]
    assert gpu_checks.busy_of(events) == 13
    assert gpu_checks.busy_of([]) == 0


def test_sanitizers_findings_are_named(tmp_path: Path) -> None:
    def run(command: list[str], timeout: float) -> Any:
        tool, test = command[2], Path(command[-1]).name
        assert test.startswith("cuda_") and test.endswith("_test_on_device")
        if tool == "racecheck" and "linear" in test:
            raise subprocess.TimeoutExpired(command, timeout)
        return answer(9 if tool == "memcheck" and "rows" in test else 0)()

    found = gpu_checks.sanitizer_findings(tmp_path, run)
    assert found == ["memcheck: rows", "racecheck: linear"]
    # They are built: tests/cpp/CMakeLists.txt makes them for the device.
    listed = (Path(gpu_checks.ROOT) / "tests" / "cpp" / "CMakeLists.txt").read_text()
    for name in gpu_checks.KERNEL_TESTS:
        assert f"deinfer_cuda_test(cuda_{name}_test ON_DEVICE)" in listed


def test_pytest_and_ties_are_read() -> None:
    assert gpu_checks.failures_of("2 failed, 3 passed in 1s", 1) == 2
    assert gpu_checks.failures_of("6 passed in 1s", 0) == 0
    assert gpu_checks.failures_of("", 3) == gpu_checks.failures_of("5 skipped in 1s", 0) == 1
    assert gpu_checks.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert gpu_checks.first_difference([1, 2, 3], [1, 5, 4]) == 1
    exact = np.array([1.0, 1.01, 0.5], dtype=np.float32)
    rounded = np.array([1.0, 1.0, 0.492], dtype=np.float32)
    assert gpu_checks.is_tie(exact, rounded, (0, 1))
    assert not gpu_checks.is_tie(exact, rounded, (0, 2))


def test_answers_are_compared(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(gpu_checks.QUESTIONS) == 20
    monkeypatch.setattr(gpu_checks, "QUESTIONS", gpu_checks.QUESTIONS[:3])
    result = gpu_checks.agreement(tiny_model, "cpu", tokens=5)
    assert result == {"equal": 3, "ties": 0, "others": []}


def test_steps_are_timed(tmp_path: Path) -> None:
    model = random_llama.write_random_llama(tmp_path / "model", keep=0.5, **TINY)
    stepper = gpu.Stepper(model, "cpu", 3, 20)
    assert stepper.engine.model_info.lowrank_matrices == 14
    for batch in (1, 3):
        times, outside = stepper.decode(batch)
        assert len(times) == gpu.STEPS - 8
        assert all(time > 0 for time in times)
        assert 0 <= outside < 1
    watched = []
    stepper.decode(2, lambda step: watched.append(step()), temperature=0.8, top_p=0.9)
    assert len(watched) == 1 and len(watched[0]) == 2
    int8 = gpu.Stepper(model, "cpu", 1, 64, "int8")
    assert int8.engine.model_info.dtype == "int8"
    assert len(int8.prefill()) == 5


def test_ranks_are_compared_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ranks, "SHAPE", TINY)
    monkeypatch.setattr(gpu_ranks, "NEW_TOKENS", 4)
    monkeypatch.setattr(gpu_ranks, "PLANS", ("naive", "hidden_sharded"))
    results = gpu_ranks.measure(tmp_path, "cpu", sizes=(2,))
    assert set(results) == {"naive 1", "naive 2", "hidden_sharded 1", "hidden_sharded 2"}
    assert all(check.ok for check in gpu_ranks.judge(results))
    results["naive 2"] |= {"lockstep_equal": False, "equal_tokens": 0.1}
    assert not any(check.ok for check in gpu_ranks.judge(results))


def test_tokens_count_up_to_the_first_other_one() -> None:
    assert gpu_ranks.equal_tokens([([1, 2, 3], [])], [([1, 2, 3], [])]) == 1
    answers: gpu_ranks.Answers = [([1, 2, 3, 4], []), ([5, 6, 7, 8], [])]
    others: gpu_ranks.Answers = [([1, 2, 0, 4], []), ([0, 6, 7, 8], [])]
    assert gpu_ranks.equal_tokens(answers, others) == 0.25

"""The judgement of the benchmarks: checks, cases, ratios. Nothing is timed here."""

import json
import math
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import common  # noqa: E402
import linear_cases as cases  # noqa: E402
import timing  # noqa: E402


def case(shape: cases.Shape, m: int, **medians: float) -> dict:
    return {
        "shape": [shape.n, shape.k, shape.r],
        "m": m,
        "threads": 2,
        "ratios": {name: {"median": median} for name, median in medians.items()},
    }


def test_check_knows_its_direction_and_nan() -> None:
    assert common.Check("a", 0.95, 0.95).ok
    assert not common.Check("a", 0.9499, 0.95).ok
    assert common.Check("a", 1.0, 1.0, at_least=False).ok
    assert not common.Check("a", 1.01, 1.0, at_least=False).ok
    assert not common.Check("a", math.nan, 1.0).ok
    assert not common.Check("a", math.nan, 1.0, at_least=False).ok


def test_finish_writes_then_fails_only_when_strict(tmp_path: Path, capsys) -> None:
    checks = [common.Check("met", 2.0, 1.0), common.Check("missed", 2.0, 1.0, at_least=False)]
    file = tmp_path / "results" / "x.json"
    common.finish("x", {"name": "x"}, checks, file, strict=False)
    common.finish("x", {"name": "x"}, checks[:1], tmp_path / "met.json", strict=True)
    file.unlink()
    with pytest.raises(SystemExit) as failure:
        common.finish("x", {"name": "x"}, checks, file, strict=True)
    assert failure.value.code == 1
    assert [row["ok"] for row in json.loads(file.read_text())["checks"]] == [True, False]
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "missed" in line]
    assert [row[-1].strip() for row in rows] == ["NO", "NO"]


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (2048, 5632), (256, 2048), (4096, 11008)])
def test_half_rank_is_the_largest_that_halves(n: int, k: int) -> None:
    r = cases.half_rank(n, k)
    assert 2 * cases.Shape(n, k, r).parameters <= cases.Shape(n, k).parameters
    assert 2 * cases.Shape(n, k, r + 1).parameters > cases.Shape(n, k).parameters


def test_every_matrix_is_large_enough_for_the_bandwidth_target() -> None:
    for shape in cases.SHAPES:
        smaller = min(shape.n, shape.k) * shape.r if shape.r else shape.parameters
        assert 2 * smaller >= 8_000_000, shape


def test_ragged_ranks_are_ragged() -> None:
    for shape in cases.RAGGED_SHAPES:
        even = cases.next_multiple(shape.r, 32)
        assert even % 32 == 0 and shape.r < even < shape.r + 32
    assert cases.next_multiple(64, 32) == 64


def test_targets_apply_where_they_belong() -> None:
    dense = cases.Shape(4096, 4096)
    ratios = {"stream": 0.94, "peak": 0.93, "torch": 0.5}
    (gemv,) = cases.linear_checks(case(dense, 1, **ratios))
    assert (gemv.value, gemv.target, gemv.ok) == (0.94, 0.95, False)
    (gemm,) = cases.linear_checks(case(dense, 512, **ratios))
    assert (gemm.value, gemm.target, gemm.ok) == (0.93, 0.92, True)
    found = {
        m: cases.linear_checks(case(cases.TORCH_SHAPE, m, **ratios))
        for m in cases.tokens_of(cases.TORCH_SHAPE, quick=False)
    }
    assert {m: len(checks) for m, checks in found.items()} == {1: 2, 8: 1, 32: 1, 128: 2, 512: 2}
    assert [checks[-1].ok for checks in found.values()] == [False, False, True, True, True]
    assert cases.ragged_checks(case(cases.RAGGED_SHAPES[0], 1, per_parameter=1.04))[0].ok
    assert not cases.ragged_checks(case(cases.RAGGED_SHAPES[0], 1, per_parameter=1.06))[0].ok
    assert [check.ok for check in cases.int8_checks(case(dense, 1, bf16=1.69))] == [False]
    assert cases.int8_checks(case(cases.TORCH_SHAPE, 1, bf16=1.0)) == []
    (fewer_bits,) = cases.compressed_checks(case(dense, 1, bf16=1.19, torch=0.5))
    assert (fewer_bits.target, fewer_bits.ok) == (1.2, False)
    assert cases.compressed_checks(case(dense, 8, bf16=0.9, torch=0.5)) == []
    assert [
        c.ok for c in cases.compressed_checks(case(cases.TORCH_SHAPE, 8, bf16=1, torch=0.35))
    ] == [True]


def test_a_case_beyond_the_machine_is_noticed() -> None:
    shape = cases.SHAPES[0]
    honest = case(shape, 1, stream=1.05, peak=0.1)
    assert cases.limit_check([honest]).ok
    assert not cases.limit_check([honest, case(shape, 128, stream=0.1, peak=1.3)]).ok


def test_ratios_are_taken_within_rounds() -> None:
    # The machine was half as fast in the second and third round, for both.
    ratio = cases.round_ratios([1.0, 2.0, 2.0], [2.0, 4.0, 4.0])
    assert (ratio["min"], ratio["median"], ratio["max"]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError):
        cases.round_ratios([1.0], [1.0, 2.0])


def test_interleave_takes_turns_and_drops_what_is_cold(monkeypatch) -> None:
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    turns: list[tuple[str, int]] = []

    def contestant(name: str, seconds: float) -> timing.Run:
        def run(calls: int) -> list[float]:
            turns.append((name, calls))
            cold = 100.0 if len(turns) <= 4 else seconds  # the warm-up round
            return [99.0] + [seconds if len(turns) <= 2 else cold] * (calls - 1)

        return run

    runs = {"a": contestant("a", 0.01), "b": contestant("b", 0.5)}
    samples = timing.interleave(runs, rounds=3, seconds=0.05)
    assert samples == {"a": [0.01] * 3, "b": [0.5] * 3}
    assert turns == [("a", 2), ("b", 2)] + [("a", 6), ("b", 2)] * 4

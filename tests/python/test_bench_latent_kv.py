"""The judgement of bench/latent_kv.py; nothing is timed here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import latent_kv as bench  # noqa: E402
from deinfer import _C  # noqa: E402
from latent_peer import TorchRebuild, checked_rebuild  # noqa: E402


def test_the_formula_is_what_engines_report(tmp_path: Path) -> None:
    for shape in ("rotary", "plain"):
        path = bench.write_shape(tmp_path, shape, 1)
        described = _C.describe_config(str(path))
        # An odd rank of k has a zero behind it where K is rebuilt.
        padding = 2 * (bench.RANK % 2) if shape == "rotary" else 0
        assert 2 * described.latent_kv_elements_per_token == bench.formula_bytes(1) + padding
        row = bench.capacity(path, 1)
        assert bench.capacity_check(shape, row).ok
        assert row["of_dense"] > 4.9


def test_token_sharded_latents_keep_their_gain_on_any_ranks(tmp_path: Path) -> None:
    rows = bench.ranks("plain", tmp_path, "cpu:20:100")
    assert [row["ranks"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        one = rows[0]["tokens_with_latents"]
        assert row["tokens_with_latents"] * row["ranks"] == pytest.approx(one)
        assert row["tokens_with_token_sharded_latents"] == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("rotary", [False, True])
def test_the_peer_attends_over_what_the_factors_make(rotary: bool) -> None:
    sizes = {"heads": 3, "head_dim": 8, "rank": 5, "context": 37}
    peer = TorchRebuild(rotary=rotary, dtype=torch.float64, **sizes)
    z_k, z_v = (z[peer.table].flatten(0, 1)[:37] for z in peer.latents)
    expected = []
    for head in range(3):
        rows = slice(8 * head, 8 * head + 8)
        keys = z_k @ peer.factors[0][rows].T
        pairs = torch.complex(keys[:, :4], keys[:, 4:])
        if rotary:
            rates = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
            turns = torch.outer(torch.arange(37, dtype=torch.float64), rates)
            pairs = pairs * torch.polar(torch.ones_like(turns), turns)
        scores = torch.cat((pairs.real, pairs.imag), dim=1) @ peer.query[0, head, 0] / 8**0.5
        expected.append(scores.softmax(0) @ (z_v @ peer.factors[1][rows].T))
    torch.testing.assert_close(peer.step(), torch.cat(expected))
    assert checked_rebuild(rotary=rotary, **sizes).step().dtype == torch.bfloat16


def test_checks_apply_where_they_belong() -> None:
    def row(context: int, ratio: float, shape: str = "plain") -> dict:
        return {
            "shape": shape,
            "context": context,
            "torch_over_latent": {"median": ratio},
            "torch_over_v_latent": {"median": 30.0},
        }

    assert bench.attention_checks(row(512, 1.0)) == []
    assert [check.ok for check in bench.attention_checks(row(4096, 2.9))] == [False]
    assert [check.ok for check in bench.attention_checks(row(4096, 3.1))] == [True]

    rotary = bench.attention_checks(row(4096, 1.8, "rotary"))
    assert [check.ok for check in rotary] == [False, True]

    def case(budget: str, ratio: float) -> dict:
        return {"shape": "plain", "budget": budget, "auto": {"of_dense": {"median": ratio}}}

    assert not bench.throughput_checks(case("small", 1.4))[0].ok
    assert bench.throughput_checks(case("small", 1.6))[0].ok
    assert bench.throughput_checks(case("ample", 0.96))[0].ok
    assert not bench.throughput_checks(case("ample", 0.9))[0].ok


def test_every_request_fits_the_small_budget() -> None:
    trace = bench.make_trace(np.array([5, 5000]), 50)
    assert max(prompt + answer for prompt, answer in trace) + 16 <= bench.SMALL_TOKENS
    assert {answer for _, answer in trace} == {5, bench.MOST}

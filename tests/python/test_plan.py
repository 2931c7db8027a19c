"""`deinfer plan`: what it predicts and chooses from a config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deinfer import _C
from deinfer.cli import main

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}
LLAMA3_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}
PLANS = ["dense", "naive", "rank_gather", "hidden_sharded", "two_collective", "token_sharded"]


def write_config(path: Path, fields: dict[str, Any], ranks: dict[str, int] | None = None) -> Path:
    config: dict[str, Any] = {"model_type": "llama", **fields}
    if ranks is not None:
        config["model_type"] = "lowrank_llama"
        config["low_rank"] = {"version": 1, "base_model_type": "llama", "ranks": ranks}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


class Command:
    """Runs `deinfer plan` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self, *arguments: Any) -> str:
        status = main(["plan", *map(str, arguments)])
        captured = self._capsys.readouterr()
        assert (status, captured.err) == (0, "")
        return captured.out

    def report(self, *arguments: Any) -> Any:
        return json.loads(self.text(*arguments, "--json"))

    def complaint(self, status: int, *arguments: Any) -> str:
        assert main(["plan", *map(str, arguments)]) == status
        error = self._capsys.readouterr().err
        assert error.startswith("deinfer: error: ") and error.count("\n") == 1
        return error


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def milliseconds(report: Any, plan: str, phase: str) -> float:
    entry = next(entry for entry in report["plans"] if entry["plan"] == plan)
    return float(entry["phases"][phase]["seconds"]) * 1e3


# Predictions of an independent script with the same constants (separate kernels on NVLink, context
# 1024). It sums bf16 on the wire (here fp32) and counts kernels by hand: for naive 20 per layer
# (here 25, as every sum is an operation), for token shards 14 (here 12).
@pytest.mark.parametrize(
    ("fields", "tp", "expected"),
    [
        (
            LLAMA3_70B,
            8,
            {
                "decode:1": {"dense": 8.67, "naive": 9.91, "hidden_sharded": 6.62},
                "decode:16": {"dense": 9.57, "naive": 13.95, "hidden_sharded": 7.36},
            },
        ),
        (LLAMA3_70B, 4, {"decode:1": {"dense": 14.45, "naive": 12.14, "hidden_sharded": 8.99}}),
        (
            LLAMA_7B,
            8,
            {
                "decode:1": {"dense": 1.72, "naive": 3.36, "hidden_sharded": 1.95},
                "decode:16": {"dense": 2.25, "naive": 7.14, "hidden_sharded": 2.46},
            },
        ),
        (
            LLAMA_7B,
            2,
            {
                "decode:1": {"dense": 3.44, "naive": 4.00, "hidden_sharded": 2.71},
                "decode:16": {"dense": 5.04, "naive": 7.26, "hidden_sharded": 4.30},
                "prefill:2048": {"dense": 26.44, "token_sharded": 12.8},
            },
        ),
    ],
)
def test_predictions_are_near_those_of_the_research_model(
    plan: Command,
    tmp_path: Path,
    fields: dict[str, Any],
    tp: int,
    expected: dict[str, dict[str, float]],
) -> None:
    path = write_config(tmp_path, fields)
    report = plan.report(path, "--tp", tp, "--keep", 0.4, "--batch", 1, 16)
    for phase, times in expected.items():
        for name, time in times.items():
            close = pytest.approx(time, rel=0.15 if name == "naive" else 0.12)
            assert milliseconds(report, name, phase) == close, (name, phase)


@pytest.mark.parametrize(
    ("fields", "tp", "link", "decode", "prefill"),
    [
        (LLAMA3_70B, 4, "nvlink", "hidden_sharded", "hidden_sharded"),
        (LLAMA3_70B, 8, "nvlink", "hidden_sharded", "hidden_sharded"),
        (LLAMA3_8B, 2, "pcie", "two_collective", "token_sharded"),
    ],
)
def test_choices(
    plan: Command,
    tmp_path: Path,
    fields: dict[str, Any],
    tp: int,
    link: str,
    decode: str,
    prefill: str,
) -> None:
    path = write_config(tmp_path, fields)
    arguments = (path, "--tp", tp, "--keep", 0.4, "--link", link)
    choice = plan.report(*arguments)["choice"]
    assert (choice["decode_plan"], choice["prefill_plan"]) == (decode, prefill)
    assert choice["phases"]["decode:1"]["plan"] == decode
    assert choice["phases"]["prefill:2048"]["plan"] == prefill
    assert sum(phase["weight"] for phase in choice["phases"].values()) == pytest.approx(1)
    text = " ".join(plan.text(*arguments).split())
    assert f"choice: {decode}" in text
    # Alone, prefill is the business of token shards.
    alone = plan.report(*arguments, "--mix", "prefill:2048=1")["choice"]
    assert alone["prefill_plan"] == "token_sharded"


def test_7b_that_keeps_most_is_better_multiplied_out(plan: Command, tmp_path: Path) -> None:
    path = write_config(tmp_path, LLAMA_7B)
    report = plan.report(path, "--tp", 8, "--keep", 0.8)
    assert report["choice"]["layout"] == "dense"
    assert "dense" in report["reason"]


def test_report(plan: Command, tmp_path: Path) -> None:
    ranks = {
        f"model.layers.{layer}.{name}": rank
        for layer in range(2)
        for name, rank in (
            ("self_attn.q_proj", 20),
            ("self_attn.k_proj", 9),
            ("self_attn.v_proj", 11),
            ("self_attn.o_proj", 13),
            ("mlp.gate_proj", 17),
            ("mlp.up_proj", 19),
        )
    }
    path = write_config(tmp_path, TINY, ranks)
    report = plan.report(path / "config.json", "--tp", 2, "--dtype", "float32", "--batch", 3)
    assert [entry["plan"] for entry in report["plans"]] == PLANS
    assert set(report["plans"][0]["phases"]) == {"decode:3", "prefill:2048"}
    assert report["choice"]["phases"]["decode:3"]["weight"] == pytest.approx(0.5)
    by_name = {entry["plan"]: entry for entry in report["plans"]}
    assert by_name["two_collective"]["layout"] == by_name["token_sharded"]["layout"]
    # The down projection stayed dense: what it adds is scattered.
    assert by_name["hidden_sharded"]["collectives_per_layer"] == {
        "all_reduce": pytest.approx(3),
        "all_gather": pytest.approx(0),
        "reduce_scatter": pytest.approx(1),
    }
    layer = 20 * 128 + (9 + 11) * 96 + 13 * 128 + (17 + 19) * 160 + 96 * 64
    weights = 4 * (2 * layer + 2 * 128 * 64) // 2 + 4 * 5 * 64
    assert by_name["hidden_sharded"]["weight_bytes"] == weights
    assert by_name["hidden_sharded"]["kv_bytes_per_token"] == 2 * 2 * 16 * 4
    # Per layer: all-reduces of 41, 13 and 37 columns, half a scatter of 64; then the ends.
    columns = 2 * (41 + 13 + 37 + 64 / 2) + 64 / 2 + 32 + 2 / 2
    assert by_name["hidden_sharded"]["wire_bytes_per_token"] == pytest.approx(4 * columns)
    for entry in report["plans"]:
        for phase in entry["phases"].values():
            parts = ("product", "operation", "attention", "exchange")
            total = sum(phase[f"{part}_seconds"] for part in parts)
            assert phase["seconds"] == pytest.approx(total)


def test_table(plan: Command, tmp_path: Path) -> None:
    path = write_config(tmp_path, LLAMA3_70B)
    text = plan.text(path, "--tp", 8, "--keep", 0.4, "--overlap")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 130
    head = next(line for line in lines if line.startswith("plan "))
    assert "b1 " in head and "b256" in head and head.endswith("p2048")
    row = next(line for line in lines if line.startswith("hidden_sharded"))
    assert "4 AR" in row and "yes" in row and "*" in row
    assert "2 AG + 2 RS" in text and "7 AR" in text and "choice: hidden_sharded" in text


def test_latents_over_ranks(plan: Command, tmp_path: Path) -> None:
    path = write_config(tmp_path, LLAMA_7B)
    arguments = (path, "--tp", 4, "--keep", 0.4, "--memory", 8, "--kv-cache", "latent")
    ways = ("replicated", "token_sharded")
    one, all_ = (plan.report(*arguments, "--kv-latents", way)["plans"][3] for way in ways)
    assert one["plan"] == "hidden_sharded"
    # Of 819 elements, to which rebuilt K adds one that products read.
    for entry in (one, all_):
        assert entry["latent_kv_bytes_per_token"] == 32 * (820 + 819) * 2
        assert entry["token_sharded_kv_bytes_per_token"] == 32 * (820 + 819) * 2 // 4
        assert entry["dense_kv_bytes_per_token"] == 32 * 2 * 1024 * 2
    assert (one["kv_token_sharded"], all_["kv_token_sharded"]) == (False, True)
    assert all_["kv_bytes_per_token"] == all_["token_sharded_kv_bytes_per_token"]
    # U of q, k and v of all heads, instead of a quarter.
    assert all_["weight_bytes"] - one["weight_bytes"] == 32 * 3 * 3072 * 819 * 2
    assert all_["kv_tokens"] > 3 * one["kv_tokens"]
    reduce_scatters = [entry["collectives_per_layer"]["reduce_scatter"] for entry in (one, all_)]
    assert reduce_scatters == [0, 1]
    # An output, its maximum and its sum of each of 32 heads in fp32; of which 3 quarters leave.
    wire = all_["wire_bytes_per_token"] - one["wire_bytes_per_token"]
    assert wire == pytest.approx(32 * 32 * (128 + 2) * 4 * 3 / 4)
    text = plan.text(*arguments)
    assert "26224 where the ranks divide the" in " ".join(text.split())
    assert "4 ranks divide the tokens" in text and "there is room for" in " ".join(text.split())
    assert "--kv-latents" in plan.complaint(2, *arguments, "--kv-latents", "some")


def test_overlap_is_predicted_only_where_the_runtime_has_it(plan: Command, tmp_path: Path) -> None:
    path = write_config(tmp_path, LLAMA3_70B)
    arguments = (path, "--tp", 8, "--keep", 0.4, "--link", "200:20", "--hardware", "cpu:100:2000")
    whole, chunked = (plan.report(*arguments, *more)["plans"] for more in ((), ("--overlap",)))
    for plain, overlapped in zip(whole, chunked, strict=True):
        # Few tokens: only sums of z are cut. Many: everything is.
        has = plain["plan"] in ("hidden_sharded", "rank_gather", "two_collective", "token_sharded")
        for phase, before in plain["phases"].items():
            after = overlapped["phases"][phase]
            cut = after["chunks"] > 1
            assert before["chunks"] == 1
            assert after["seconds"] <= (0.97 if cut else 1) * before["seconds"]
            if phase in ("decode:1", "decode:4", "decode:16", "decode:64"):
                assert has or not cut, (plain["plan"], phase)
        decode = [overlapped["phases"][f"decode:{batch}"]["chunks"] for batch in (1, 4, 16, 64)]
        assert (max(decode) > 1) == has, (plain["plan"], decode)


def test_memory(plan: Command, tmp_path: Path) -> None:
    path = write_config(tmp_path, LLAMA3_70B)
    report = plan.report(path, "--tp", 2, "--memory", 24)
    assert report["choice"] is None
    assert "No plan fits" in report["reason"] and "24.0 GiB" in report["reason"]
    assert "no" in plan.text(path, "--tp", 2, "--memory", 24)
    unknown = plan.report(path, "--tp", 2, "--hardware", "cpu:100:2000")
    assert unknown["memory_bytes"] is None and unknown["plans"][0]["kv_tokens"] is None
    assert unknown["choice"] is not None


@pytest.mark.parametrize(
    ("fields", "all_reduces"),
    [
        ({"model_type": "opt", "ffn_dim": 16384}, {"hidden_sharded": 4, "naive": 6}),
        ({"model_type": "qwen3", "head_dim": 128}, {"hidden_sharded": 4, "naive": 7}),
        # The norms of q and k over all heads, and of what blocks add over hidden shards.
        (
            {"model_type": "olmo2"},
            {"hidden_sharded": 7, "naive": 7, "two_collective": 3, "dense": 3, "token_sharded": 1},
        ),
    ],
)
def test_families(
    plan: Command, tmp_path: Path, fields: dict[str, Any], all_reduces: dict[str, int]
) -> None:
    path = write_config(tmp_path, {**LLAMA_7B, **fields})
    report = plan.report(path, "--tp", 4, "--keep", 0.5)
    assert report["choice"] is not None
    counts = {entry["plan"]: entry["collectives_per_layer"] for entry in report["plans"]}
    assert {name: counts[name].get("all_reduce", 0) for name in all_reduces} == all_reduces


def test_ranks_by_the_names_of_the_family(plan: Command, tmp_path: Path) -> None:
    ranks = {"model.decoder.layers.1.fc1": 8, "model.decoder.layers.0.self_attn.out_proj": 4}
    path = write_config(tmp_path, {**TINY, "ffn_dim": 96, "model_type": "opt"}, ranks)
    config = json.loads((path / "config.json").read_text())
    config["model_type"] = "lowrank_opt"
    config["low_rank"]["base_model_type"] = "opt"
    (path / "config.json").write_text(json.dumps(config))
    assert plan.report(path, "--tp", 2)["choice"] is not None


def test_one_rank(plan: Command, tmp_path: Path) -> None:
    report = plan.report(write_config(tmp_path, LLAMA_7B), "--tp", 1, "--keep", 0.5)
    for entry in report["plans"]:
        assert entry["wire_bytes_per_token"] == 0
        assert set(entry["collectives_per_layer"].values()) == {0}
        assert entry["phases"]["decode:1"]["exchange_seconds"] == 0
    assert report["choice"]["layout"] != "dense"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--tp", 0), "tensor_parallel_size=0"),
        (("--tp", 5), "tensor_parallel_size=5"),
        (("--tp", 2, "--link", "string"), '"string"'),
        (("--tp", 2, "--link", "5:0"), '"5:0"'),
        (("--tp", 2, "--hardware", "h900"), '"h900"'),
        (("--tp", 2, "--dtype", "fp4"), '"fp4"'),
        (("--tp", 2, "--keep", 0), "--keep 0"),
        (("--tp", 2, "--keep", 1.5), "keep=1.5"),
        (("--tp", 2, "--memory", -1), "--memory -1"),
        (("--tp", 2, "--context", 0), "context=0"),
        (("--tp", 2, "--batch", 4, 0), "batches has 0"),
        (("--tp", 2, "--prefill", -2), "prefill has -2"),
        (("--tp", 2, "--mix", "decode:1"), "'decode:1'"),
        (("--tp", 2, "--mix", "decode:2=1"), '"decode:2"'),
        (("--tp", 2, "--mix", "decode:1=0"), "weight 0"),
    ],
)
def test_bad_values_are_named(
    plan: Command, tmp_path: Path, arguments: tuple[Any, ...], expected: str
) -> None:
    assert expected in plan.complaint(2, write_config(tmp_path, TINY), *arguments)


def test_bad_models(plan: Command, tmp_path: Path) -> None:
    assert "'nowhere'" in plan.complaint(2, "nowhere", "--tp", 2)
    assert "no config.json" in plan.complaint(2, tmp_path, "--tp", 2)
    other = write_config(tmp_path / "other", {**TINY, "model_type": "mamba"})
    assert '"mamba"' in plan.complaint(1, other, "--tp", 2)
    bad = write_config(tmp_path / "bad", {**TINY, "hidden_size": "big"})
    assert "hidden_size" in plan.complaint(1, bad, "--tp", 2)
    extra = write_config(tmp_path / "extra", TINY, {"model.layers.9.mlp.up_proj": 4})
    assert "low_rank.ranks" in plan.complaint(1, extra, "--tp", 2)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="links"):
        _C.PlannerConfig(model="x", links="nvlink")  # type: ignore[call-arg]

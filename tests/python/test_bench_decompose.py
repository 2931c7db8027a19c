"""bench/decompose.py on a tiny model: its parts run and add up in one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from deinfer.decompose import recovery  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    import decompose

    monkeypatch.setattr(decompose, "GRID", (decompose.OURS, decompose.BASELINE))
    return decompose


def test_parts_add_up(
    bench: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    common = ["decompose.py", "--model", str(tiny_model), "--build", str(tmp_path / "build")]
    common += ["--calibration-tokens", "400", "--text-tokens", "300", "--json", str(file)]
    monkeypatch.setattr(recovery, "_ROUND_TOKENS", 200)
    for parts in (["grid", "--keeps", "0.7"], ["kinds"], ["recover", "--minutes", "0.005"]):
        monkeypatch.setattr(sys, "argv", [*common, "--parts", *parts])
        bench.main()
    results = json.loads(file.read_text())
    assert set(results["grid"]) == {"whitened uniform", "two_sided allocated compensated"}
    for row in results["grid"].values():
        assert 0.5 < row["0.7"]["keep"] < 0.75 and row["0.7"]["heldout"] > 0
    assert results["kinds"] and all("measured" in kind for kind in results["kinds"].values())
    assert results["recover"]["recovery"]["steps"] >= 1
    names = [check["name"] for check in results["checks"]]
    assert "keep 0.7: two_sided allocated / whitened uniform, heldout" in names
    assert any("of recovery" in name for name in names)
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_random_llama_is_a_checkpoint(tmp_path: Path) -> None:
    from deinfer import LLM, SamplingParams
    from random_llama import write_random_llama

    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300}
    path = write_random_llama(tmp_path / "model", **small, **heads)
    llm = LLM(path, num_threads=1, num_kv_blocks=8)
    output = llm.generate(["abc"], SamplingParams(max_tokens=3), use_tqdm=False)[0]
    assert output.prompt_token_ids == llm.get_tokenizer()("abc")["input_ids"]

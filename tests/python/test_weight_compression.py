"""bf16 weights in 12 bits: the same bits as in 16, or an error that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_model
from deinfer import LLM
from deinfer._C import supported_isas


def load(path: Path, **options: Any) -> LLM:
    return LLM(str(path), num_kv_blocks=128, **options)


@pytest.mark.parametrize(
    "ranks", [None, {"q_proj": 40, "gate_proj": 33}], ids=["dense", "low-rank"]
)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16"])
def test_compressed_weights_give_the_same_bits(
    isa: str,
    size: int,
    ranks: dict[str, int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if isa not in supported_isas():
        pytest.skip(f"this CPU lacks {isa}")
    monkeypatch.setenv("DEINFER_CPU_ISA", isa)
    fields = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 160}
    path = write_model(tmp_path / "model", ranks, dtype=torch.bfloat16, **fields)
    tokens = np.random.default_rng(0).integers(0, 131, 70).tolist()
    found = {}
    for compression in ("none", "lossless", "auto"):
        options = {"tensor_parallel_size": size, "tensor_parallel_plan": "hidden_sharded"}
        options["max_num_seqs"] = 2  # more, and "auto" leaves 16 bits with AVX2
        llm = load(path, dtype="bfloat16", weight_compression=compression, **options)
        info = llm.model_info
        assert info.weight_compression == ("none" if compression == "none" else "lossless")
        found[compression] = info.weight_bytes, llm.prompt_logits(tokens)
    assert found["lossless"][0] < 0.95 * found["none"][0]
    assert found["auto"][0] == found["lossless"][0]
    np.testing.assert_array_equal(found["lossless"][1], found["none"][1])
    np.testing.assert_array_equal(found["auto"][1], found["none"][1])
    large_batches = load(path, dtype="bfloat16", max_num_seqs=3).model_info
    assert large_batches.weight_compression == ("none" if isa == "avx2" else "lossless")


def test_compression_that_is_impossible_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match='weight_compression="zip"'):
        load(path, weight_compression="zip")
    for dtype in ("float32", "int8"):
        with pytest.raises(ValueError, match=f"lossless.*bfloat16.*{dtype}"):
            load(path, dtype=dtype, weight_compression="lossless")
    monkeypatch.setenv("DEINFER_CPU_ISA", "scalar")
    with pytest.raises(NotImplementedError, match="lossless.*scalar"):
        load(path, weight_compression="lossless")
    assert load(path).model_info.weight_compression == "none"

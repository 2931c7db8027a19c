"""The native runtime against transformers on tiny random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_model
from deinfer import LLM, SamplingParams
from deinfer._C import supported_isas
from deinfer.decompose.reference import load_reference
from oracle import greedy_tokens, reference_logits, relative_error
from safetensors.torch import load_file, save_file

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
ALL_OPT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
CASES: dict[str, tuple[dict[str, int] | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "all-rank-7": (dict.fromkeys(ALL, 7), {}),
    "all-rank-1": (dict.fromkeys(ALL, 1), {}),
    "all-rank-64": (
        dict.fromkeys(ALL, 64),
        {"hidden_size": 160, "intermediate_size": 264, "head_dim": 40},
    ),
    "mixed": ({"q_proj": 7, "o_proj": 33, "gate_proj": 1, "down_proj": 64}, {}),
    "up-only": ({"up_proj": 13, "v_proj": 5}, {}),
    "untied": ({"q_proj": 16}, {"tie_word_embeddings": False}),
    "multi-head": ({"k_proj": 3}, {"num_key_value_heads": 4}),
    "multi-query": ({"k_proj": 3}, {"num_key_value_heads": 1, "head_dim": 10}),
    "odd-sizes": (
        {"q_proj": 11, "up_proj": 19},
        {"hidden_size": 52, "intermediate_size": 71, "head_dim": 22, "vocab_size": 257},
    ),
    "biases": ({"q_proj": 7, "down_proj": 5}, {"attention_bias": True, "mlp_bias": True}),
    "rope-theta": (None, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "rope-linear": (
        {"q_proj": 7},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "rope-dynamic": (
        None,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "rope-llama3": ({"k_proj": 9}, {"rope_parameters": LLAMA3}),
    "rope-yarn": ({"k_proj": 9}, {"rope_parameters": YARN}),
    "rope-longrope": (None, {"rope_parameters": LONGROPE}),
}
MIXED = {"q_proj": 7, "o_proj": 33, "gate_proj": 1, "down_proj": 64}
# A norm of what an MLP of rank 1 adds would divide by a number that may be near 0.
SANDWICH_MIXED = {**MIXED, "gate_proj": 5}
WINDOW = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}
SLIDING_SECOND = {"layer_types": ["full_attention", "sliding_attention"]}
FAMILY_CASES: dict[str, tuple[dict[str, int] | None, dict[str, Any]]] = {
    "gemma-dense": (None, {"family": "gemma"}),
    "gemma-low-rank": (dict.fromkeys(ALL, 7), {"family": "gemma"}),
    "gemma-mixed": (MIXED, {"family": "gemma", "num_key_value_heads": 1, "head_dim": 32}),
    "gemma2-dense": (None, {"family": "gemma2"}),
    "gemma2-low-rank": (dict.fromkeys(ALL, 7), {"family": "gemma2", "num_key_value_heads": 4}),
    "gemma2-mixed": (
        SANDWICH_MIXED,
        {"family": "gemma2", "num_hidden_layers": 3, "vocab_size": 257},
    ),
    "gemma2-uncapped": (
        {"k_proj": 5},
        {"family": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2-layer-types": ({"up_proj": 9}, {"family": "gemma2", **SLIDING_SECOND}),
    "gemma2-biases": ({"q_proj": 5}, {"family": "gemma2", "attention_bias": True}),
    "gemma3-dense": (None, {"family": "gemma3_text"}),
    "gemma3-low-rank": (dict.fromkeys(ALL, 7), {"family": "gemma3_text", "head_dim": 40}),
    "gemma3-mixed": (
        SANDWICH_MIXED,
        {
            "family": "gemma3_text",
            "num_key_value_heads": 1,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3-pattern": (
        {"down_proj": 9},
        {"family": "gemma3_text", "num_hidden_layers": 7, "layer_types": None},
    ),
    "gemma3-untied": (None, {"family": "gemma3_text", "tie_word_embeddings": False}),
    "mistral-dense": (None, {"family": "mistral"}),
    "mistral-low-rank": (dict.fromkeys(ALL, 7), {"family": "mistral", "head_dim": 20}),
    "mistral-window": (MIXED, {"family": "mistral", "sliding_window": 50}),
    "ministral-dense": (None, {"family": "ministral"}),
    "ministral-low-rank": (dict.fromkeys(ALL, 7), {"family": "ministral", "layer_types": None}),
    "olmo3-dense": (None, {"family": "olmo3"}),
    "olmo3-low-rank": (
        dict.fromkeys(ALL, 7),
        {
            "family": "olmo3",
            "num_hidden_layers": 4,
            "layer_types": None,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "olmo2-dense": (None, {"family": "olmo2"}),
    "olmo2-low-rank": (dict.fromkeys(ALL, 7), {"family": "olmo2", "num_key_value_heads": 4}),
    "olmo2-mixed": (MIXED, {"family": "olmo2", "num_key_value_heads": 1}),
    "olmo2-biases": (
        {"k_proj": 9},
        {"family": "olmo2", "attention_bias": True, "hidden_size": 160, "vocab_size": 257},
    ),
    "opt-dense": (None, {"family": "opt"}),
    "opt-low-rank": (dict.fromkeys(ALL_OPT, 7), {"family": "opt"}),
    "opt-mixed": ({"k_proj": 7, "out_proj": 33, "fc2": 5}, {"family": "opt"}),
    "opt-odd-sizes": (
        {"q_proj": 11, "fc1": 19},
        {"family": "opt", "hidden_size": 52, "word_embed_proj_dim": 52, "ffn_dim": 71},
    ),
    "opt-no-biases": ({"q_proj": 7}, {"family": "opt", "enable_bias": False}),
    "opt-untied": ({"fc1": 9}, {"family": "opt", "tie_word_embeddings": False}),
    "opt-no-final-norm": (None, {"family": "opt", "_remove_final_layer_norm": True}),
    "qwen2-dense": (None, {"family": "qwen2"}),
    "qwen2-low-rank": (dict.fromkeys(ALL, 7), {"family": "qwen2"}),
    "qwen2-mixed": (MIXED, {"family": "qwen2", "num_key_value_heads": 1}),
    "qwen2-window": ({"k_proj": 5}, {"family": "qwen2", **WINDOW}),
    "qwen2-late-windows": (None, {"family": "qwen2", **WINDOW, "max_window_layers": 1}),
    "qwen3-dense": (None, {"family": "qwen3"}),
    "qwen3-low-rank": (dict.fromkeys(ALL, 7), {"family": "qwen3", "head_dim": 40}),
    "qwen3-mixed": (MIXED, {"family": "qwen3", "head_dim": 32, "num_key_value_heads": 1}),
    "qwen3-biases": (
        {"k_proj": 9, "down_proj": 3},
        {"family": "qwen3", "attention_bias": True, "tie_word_embeddings": False},
    ),
    "qwen3-yarn": (None, {"family": "qwen3", "rope_parameters": YARN}),
    "qwen3-layer-types": (
        {"o_proj": 9},
        {"family": "qwen3", **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
CASES |= FAMILY_CASES
TWO_RANKS = ["dense", "all-rank-7"]
TWO_RANKS += [case for case in FAMILY_CASES if case.endswith(("-dense", "-low-rank"))]
# longrope picks its factors by length; 200 tokens take the long ones in both programs. 400 tokens
# fill several KV splits, of which a window hides whole ones.
LENGTHS = {"rope-longrope": 200, "mistral-window": 400, "gemma2-mixed": 400, "gemma3-mixed": 400}
ROUNDED = ["dense", "mixed", "odd-sizes", "biases", "gemma-mixed", "gemma2-mixed", "gemma3-mixed"]
ROUNDED += ["mistral-window", "olmo2-mixed", "opt-mixed", "qwen2-mixed", "qwen3-mixed"]


def random_tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(t) for t in rng.integers(3, vocabulary, count)]


def load(path: Path, **options: Any) -> LLM:
    return LLM(str(path), num_kv_blocks=128, **options)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_match_transformers(case: str, tmp_path: Path) -> None:
    ranks, fields = CASES[case]
    path = write_model(tmp_path / "model", ranks, **fields)
    tokens = random_tokens(LENGTHS.get(case, 90), fields.get("vocab_size", 131))
    llm = load(path, dtype="float32", max_num_batched_tokens=37)
    expected = reference_logits(path, tokens, torch.float64)
    assert relative_error(llm.prompt_logits(tokens), expected) < 2e-5

    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    answer = llm.generate([tokens], params, use_tqdm=False)[0].outputs[0].token_ids
    assert len(answer) == 24
    assert answer == greedy_tokens(load_reference(path, torch.float64), tokens, answer)


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks_match_transformers(case: str, tmp_path: Path) -> None:
    ranks, fields = CASES[case]
    path = write_model(tmp_path / "model", ranks, **fields)
    tokens = random_tokens(90, fields.get("vocab_size", 131))
    expected = reference_logits(path, tokens, torch.float64)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    for plan in ("dense", "hidden_sharded"):  # tensor_parallel_test.cc has all of them
        two = {"tensor_parallel_size": 2, "tensor_parallel_plan": plan, "num_threads": 1}
        llm = load(path, dtype="float32", max_num_batched_tokens=37, **two)
        assert relative_error(llm.prompt_logits(tokens), expected) < 2e-5
        answer = llm.generate([tokens], params, use_tqdm=False)[0].outputs[0].token_ids
        assert answer == greedy_tokens(load_reference(path, torch.float64), tokens, answer)


@pytest.mark.parametrize("case", ROUNDED)
def test_bfloat16_is_no_further_from_float64_than_torch(case: str, tmp_path: Path) -> None:
    ranks, fields = CASES[case]
    path = write_model(tmp_path / "model", ranks, dtype=torch.bfloat16, **fields)
    tokens = random_tokens(60, fields.get("vocab_size", 131))
    exact = reference_logits(path, tokens, torch.float64)
    theirs = relative_error(reference_logits(path, tokens, torch.bfloat16), exact)
    llm = load(path)
    assert llm.model_info.dtype == "bfloat16"
    assert relative_error(llm.prompt_logits(tokens), exact) <= theirs


def round_to_int8(source: Path, target: Path, *, tied: bool) -> None:
    """Write `source` with every matrix as int8 represents it, in fp32."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        weight = weight.float()
        looked_up = "embed_positions" in name or ("embed_tokens" in name and not tied)
        if weight.ndim == 2 and not looked_up:
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            weight = torch.where(scale > 0, torch.round(weight / scale) * scale, weight)
        tensors[name] = weight.contiguous()
    save_file(tensors, target / "model.safetensors")


@pytest.mark.parametrize("case", ROUNDED)
def test_int8_is_no_further_from_its_dequantized_weights_than_torch_bfloat16(
    case: str, tmp_path: Path
) -> None:
    ranks, fields = CASES[case]
    path = write_model(tmp_path / "model", ranks, dtype=torch.bfloat16, **fields)
    tied = json.loads((path / "config.json").read_text())["tie_word_embeddings"]
    round_to_int8(path, tmp_path / "rounded", tied=tied)
    tokens = random_tokens(60, fields.get("vocab_size", 131))
    exact = reference_logits(tmp_path / "rounded", tokens, torch.float64)
    theirs = relative_error(reference_logits(tmp_path / "rounded", tokens, torch.bfloat16), exact)
    llm = load(path, dtype="int8")
    assert llm.model_info.dtype == "int8"
    bfloat16 = load(path, dtype="bfloat16", weight_compression="none")
    assert llm.model_info.weight_bytes < bfloat16.model_info.weight_bytes
    assert relative_error(llm.prompt_logits(tokens), exact) <= theirs


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_isa_agrees_with_scalar(
    isa: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa not in supported_isas():
        pytest.skip(f"this CPU lacks {isa}")
    path = write_model(tmp_path / "model", {"q_proj": 7, "gate_proj": 33}, dtype=torch.bfloat16)
    tokens = random_tokens(80, 131)
    logits = {}
    for name in ("scalar", isa):
        monkeypatch.setenv("DEINFER_CPU_ISA", name)
        llm = load(path, dtype=dtype)
        assert llm.model_info.isa == name
        logits[name] = llm.prompt_logits(tokens)
    # The kernels do the same operations in the same order; what may differ is libm's last bit. Only
    # AMX sums bf16 products in another order, which now and then rounds z or an activation the
    # other way: far less than bf16 itself costs (1e-2 here).
    tolerance = 2e-3 if (isa, dtype) == ("amx_bf16", "bfloat16") else 1e-6
    assert relative_error(logits[isa], logits["scalar"]) < tolerance


def test_unknown_isa_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEINFER_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="mmx"):
        load(write_model(tmp_path / "model"))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=false"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=false"),
        ("opt", {"word_embed_proj_dim": 24}, "word_embed_proj_dim=24 .* hidden_size=48"),
        ("opt", {"activation_function": "gelu"}, 'activation_function "gelu"'),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
        ("gemma2", {"hidden_activation": "silu"}, 'hidden_activation "silu"'),
        ("gemma3_text", {"attn_logit_softcapping": 9.0}, "attn_logit_softcapping=9.0"),
        ("qwen3", {"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported for qwen3'),
    ],
)
def test_what_a_family_lacks_is_named(
    family: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model", family=family, **fields)
    with pytest.raises(NotImplementedError, match=message):
        load(path)


def test_positions_beyond_the_table_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", family="opt")
    with pytest.raises(ValueError, match="max_model_len=513"):
        load(path, max_model_len=513)


LATENT = [case for case, (ranks, _) in CASES.items() if {"k_proj", "v_proj"} & set(ranks or {})]
LOW_RANK = [case for case in FAMILY_CASES if case.endswith("-low-rank")]
TOKEN_SHARDED = {
    "kv_latents": "token_sharded",
    "tensor_parallel_size": 2,
    "tensor_parallel_plan": "hidden_sharded",
    "num_threads": 1,
}


@pytest.mark.parametrize(
    ("case", "options"),
    [(case, {}) for case in LATENT]
    + [(case, TOKEN_SHARDED) for case in ["all-rank-7", "multi-query", *LOW_RANK]],
    ids=lambda value: value if isinstance(value, str) else value.get("kv_latents", "one_rank"),
)
def test_latents_match_transformers(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    ranks, fields = CASES[case]
    path = write_model(tmp_path / "model", ranks, **fields)
    tokens = random_tokens(LENGTHS.get(case, 90), fields.get("vocab_size", 131))
    llm = load(path, dtype="float32", max_num_batched_tokens=37, kv_cache="latent", **options)
    forms = {form for layer in llm.model_info.kv_layers for form in (layer.k, layer.v)}
    assert forms & {"absorbed", "rebuilt"}
    divided_by = options.get("tensor_parallel_size", 1)
    assert {layer.ranks for layer in llm.model_info.kv_layers} == {divided_by}
    expected = reference_logits(path, tokens, torch.float64)
    assert relative_error(llm.prompt_logits(tokens), expected) < 2e-5
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    answer = llm.generate([tokens], params, use_tqdm=False)[0].outputs[0].token_ids
    assert answer == greedy_tokens(load_reference(path, torch.float64), tokens, answer)


ROUNDED_LATENT = ["all-rank-7", "all-rank-64", "multi-head", "multi-query", "rope-yarn"]
ROUNDED_LATENT += [*LOW_RANK, "opt-mixed", "olmo2-biases", "qwen2-window", "gemma2-uncapped"]


@pytest.mark.parametrize("case", ROUNDED_LATENT)
def test_bfloat16_latents_are_as_near_to_float64_as_dense_caches(case: str, tmp_path: Path) -> None:
    ranks, fields = CASES[case]
    ways: dict[str, dict[str, Any]] = {
        "dense": {},
        "latent": {"kv_cache": "latent"},
        "token_sharded": {"kv_cache": "latent", **TOKEN_SHARDED},
    }
    errors = dict.fromkeys(ways, 0.0)
    for seed in range(4):
        path = write_model(tmp_path / str(seed), ranks, dtype=torch.bfloat16, seed=seed, **fields)
        tokens = random_tokens(120, fields.get("vocab_size", 131), seed)
        exact = reference_logits(path, tokens, torch.float64)
        for way, options in ways.items():
            llm = load(path, **options)
            assert llm.model_info.dtype == "bfloat16"
            errors[way] += relative_error(llm.prompt_logits(tokens), exact)
    assert max(errors["latent"], errors["token_sharded"]) <= 1.2 * errors["dense"], errors

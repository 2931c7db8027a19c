"""What only Gemma has: published configs, multimodal checkpoints, capped logits."""

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
from deinfer._C import describe_config
from safetensors.torch import load_file, save_file

# Fields as the files on the hub have them, and no others.
GEMMA_2B = {
    "model_type": "gemma",
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA_2_27B = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "vocab_size": 256000,
}
GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GEMMA_3_4B = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def describe(tmp_path: Path, config: dict[str, Any]) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return describe_config(str(tmp_path))


def test_published_configs(tmp_path: Path) -> None:
    # Parameters as the model cards count them.
    first = describe(tmp_path, GEMMA_2B)
    assert first.parameters == 2_506_172_416
    assert (first.activation, first.tied_embeddings) == ("gelu_pytorch_tanh", True)
    assert [(kind.num_layers, kind.window) for kind in first.attention] == [(18, 0)]

    second = describe(tmp_path, GEMMA_2_27B)
    assert second.parameters == 27_227_128_320
    assert (second.attention_soft_cap, second.logit_soft_cap) == (50, 30)
    assert [(kind.num_layers, kind.window) for kind in second.attention] == [(23, 4096), (23, 0)]
    assert second.norms_inputs and second.norms_outputs and second.qk_norm == "none"

    third = describe(tmp_path, GEMMA_3_1B)
    assert third.parameters == 999_885_952
    assert [(k.num_layers, k.window, k.rope_theta) for k in third.attention] == [
        (22, 512, 1e4),
        (4, 0, 1e6),
    ]
    assert third.qk_norm == "per_head" and third.max_model_len == 32768

    fourth = describe(tmp_path, GEMMA_3_4B)
    assert fourth.parameters == 3_880_263_168  # of the text model
    assert (fourth.num_heads, fourth.num_kv_heads, fourth.head_dim) == (8, 4, 256)
    assert (fourth.vocab_size, fourth.max_model_len) == (262208, 131072)
    assert [(k.num_layers, k.window, k.rope_type, k.rope_factor) for k in fourth.attention] == [
        (29, 1024, "default", 1),
        (5, 0, "linear", 8),
    ]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"final_logit_softcapping": 0}, ValueError, "final_logit_softcapping=0"),
        ({"query_pre_attn_scalar": -1}, ValueError, "query_pre_attn_scalar=-1"),
        ({"layer_types": ["full_attention"]}, ValueError, "layer_types: expected a list of 26"),
        ({"layer_types": ["linear"] * 26}, NotImplementedError, 'layer_types: "linear"'),
        ({"use_bidirectional_attention": True}, NotImplementedError, "bidirectional"),
        ({"rope_parameters": {"rope_type": "default"}}, ValueError, "found rope_type"),
        ({"rope_parameters": 5}, ValueError, "rope_parameters: expected an object, found 5"),
        ({"sliding_window": 0}, ValueError, "sliding_window: expected an integer >= 1, found 0"),
    ],
)
def test_bad_configs(
    fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        describe(tmp_path, {**GEMMA_3_1B, **fields})


@pytest.mark.parametrize("model_type", ["gemma2", "t5"])
def test_other_text_models_of_multimodal_ones_are_refused(model_type: str, tmp_path: Path) -> None:
    config = {**GEMMA_3_4B, "text_config": {**GEMMA_3_4B["text_config"], "model_type": model_type}}
    with pytest.raises(NotImplementedError, match=f'"{model_type}"'):
        describe(tmp_path, config)
    with pytest.raises(ValueError, match="text_config"):
        describe(tmp_path, {"model_type": "gemma3"})


def write_multimodal(source: Path, target: Path, prefixes: dict[str, str]) -> None:
    """Write a text model as part of a multimodal one."""
    shutil.copytree(source, target)
    text = json.loads((source / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (target / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        tensors[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    root = "" if prefixes["model."].startswith("language_model") else "model."
    tensors[f"{root}vision_tower.vision_model.embeddings.weight"] = torch.ones(3, 5)
    tensors[f"{root}multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(7)
    save_file(tensors, target / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "prefixes",
    [
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        {"model.": "model.language_model.", "lm_head.": "lm_head."},
    ],
)
def test_the_text_model_of_a_multimodal_checkpoint(
    prefixes: dict[str, str], tied: bool, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "text", family="gemma3_text", tie_word_embeddings=tied)
    write_multimodal(source, tmp_path / "both", prefixes)
    if not tied:
        config = json.loads((tmp_path / "both" / "config.json").read_text())
        (tmp_path / "both" / "config.json").write_text(
            json.dumps({**config, "tie_word_embeddings": False})
        )
    tokens = list(range(3, 80))
    llms = [LLM(path, num_threads=1, num_kv_blocks=8) for path in (source, tmp_path / "both")]
    assert np.array_equal(llms[0].prompt_logits(tokens), llms[1].prompt_logits(tokens))
    assert llms[0].model_info.parameters == llms[1].model_info.parameters
    tensors = load_file(tmp_path / "both" / "model.safetensors")
    tensors["model.audio_tower.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "both" / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected tensor model\.audio_tower\.weight"):
        LLM(tmp_path / "both", num_threads=1, num_kv_blocks=8)


def test_greedy_tokens_are_those_of_capped_logits(tmp_path: Path) -> None:
    # A cap far below the logits makes many of them equal: the first of these is taken, whether
    # logits are looked at or not.
    path = write_model(tmp_path / "model", family="gemma2", final_logit_softcapping=0.02)
    llm = LLM(path, num_threads=1, num_kv_blocks=8)
    tokens = list(range(5, 40))
    logits = llm.prompt_logits(tokens)
    assert (logits == np.float32(0.02)).sum(axis=1).min() > 1
    for logprobs in (None, 0):
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=logprobs, ignore_eos=True)
        (answer,) = llm.generate([tokens], params, use_tqdm=False)
        assert answer.outputs[0].token_ids == [int(logits[-1].argmax())]

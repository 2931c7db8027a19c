"""Tiny random checkpoints, dense and decomposed, in the canonical format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
ROTARY = {**COMMON, "intermediate_size": 88, "num_key_value_heads": 2, "initializer_range": 0.25}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {**ROTARY, "head_dim": 16},
    "gemma2": {
        **ROTARY,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 50,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        **ROTARY,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 50,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama": ROTARY,
    "ministral": {
        **ROTARY,
        "head_dim": 12,
        "sliding_window": 30,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "mistral": {**ROTARY, "sliding_window": None},
    "olmo2": ROTARY,
    "olmo3": {
        **ROTARY,
        "sliding_window": 30,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": {**COMMON, "ffn_dim": 88, "word_embed_proj_dim": 48, "init_std": 0.25},
    "qwen2": ROTARY,
    "qwen3": {**ROTARY, "head_dim": 12},
}


def write_model(
    path: Path,
    ranks: dict[str, int] | None = None,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Write a random model; `ranks` maps a suffix such as "self_attn.q_proj" to a rank."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **fields})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    entry = json.loads(config.to_json_string(use_diff=False))
    modules: dict[str, int] = {}
    for suffix, rank in (ranks or {}).items():
        for name in [n for n in tensors if n.endswith(f"{suffix}.weight")]:
            module = name.removesuffix(".weight")
            n, k = tensors.pop(name).shape
            tensors[f"{module}.v.weight"] = torch.randn(rank, k) / k**0.5
            tensors[f"{module}.u.weight"] = torch.randn(n, rank) / rank**0.5 * 1.5
            if f"{module}.bias" in tensors:
                tensors[f"{module}.u.bias"] = tensors.pop(f"{module}.bias")
            modules[module] = rank
    if modules:
        entry["model_type"] = f"lowrank_{family}"
        entry["low_rank"] = {"version": 1, "base_model_type": family, "ranks": modules}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(entry))
    save_file({k: v.to(dtype).contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    return path

"""Tiny random Llama checkpoints, dense and decomposed, in the canonical format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def write_llama(
    path: Path,
    ranks: dict[str, int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Write a random Llama; `ranks` maps a suffix such as "self_attn.q_proj" to a rank."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 131,
            "hidden_size": 48,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.25,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
            **fields,
        }
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
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
        entry["model_type"] = "lowrank_llama"
        entry["low_rank"] = {"version": 1, "base_model_type": "llama", "ranks": modules}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(entry))
    save_file({k: v.to(dtype).contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    return path

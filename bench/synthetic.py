"""Checkpoints of real shapes with random bf16 weights: speed does not look at the values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# The shape of TinyLlama-1.1B (arXiv 2401.02385).
LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 2,
}


def write_synthetic(path: Path, config: dict[str, Any], keep: float | None = None) -> Path:
    """Write a random checkpoint unless it is there.

    Args:
        path: Directory to write.
        config: A Llama's config.json.
        keep: Share of the parameters that every linear of the layers keeps as U V, with ranks
            rounded down and not to a multiple; None: dense.

    Returns:
        `path`.
    """
    if (path / "config.json").is_file():
        return path
    generator = torch.Generator().manual_seed(0)

    def random(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator) / math.sqrt(k)).bfloat16()

    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": random(vocab, hidden),
        "lm_head.weight": random(vocab, hidden),
        "model.norm.weight": ones,
    }
    ranks = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = ones.clone()
        tensors[prefix + "post_attention_layernorm.weight"] = ones.clone()
        for name, n, k in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            if keep is None:
                tensors[f"{prefix}{name}.weight"] = random(n, k)
                continue
            rank = int(keep * n * k / (n + k))
            ranks[prefix + name] = rank
            tensors[f"{prefix}{name}.v.weight"] = random(rank, k)
            tensors[f"{prefix}{name}.u.weight"] = random(n, rank)
    if ranks:
        low_rank = {"version": 1, "base_model_type": "llama", "ranks": ranks}
        config = {**config, "model_type": "lowrank_llama", "low_rank": low_rank}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


# A decoder without rotation of the width of TinyLlama-1.1B, as OPT's (arXiv 2205.01068) are.
OPT_1B: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "ffn_dim": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def write_synthetic_opt(path: Path, config: dict[str, Any], keep: float) -> Path:
    """Write a random decomposed OPT unless it is there; see `write_synthetic`."""
    if (path / "config.json").is_file():
        return path
    generator = torch.Generator().manual_seed(0)

    def random(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator) / math.sqrt(k)).bfloat16()

    hidden, inner = config["hidden_size"], config["ffn_dim"]
    tensors = {
        "model.decoder.embed_tokens.weight": random(config["vocab_size"], hidden),
        "model.decoder.embed_positions.weight": random(
            config["max_position_embeddings"] + 2, hidden
        ),
    }

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        tensors[f"{name}.bias"] = torch.zeros(hidden, dtype=torch.bfloat16)

    norm("model.decoder.final_layer_norm")
    ranks = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.decoder.layers.{layer}."
        norm(prefix + "self_attn_layer_norm")
        norm(prefix + "final_layer_norm")
        for name, n, k in (
            *((f"self_attn.{leaf}_proj", hidden, hidden) for leaf in ("q", "k", "v", "out")),
            ("fc1", inner, hidden),
            ("fc2", hidden, inner),
        ):
            rank = int(keep * n * k / (n + k))
            ranks[prefix + name] = rank
            tensors[f"{prefix}{name}.v.weight"] = random(rank, k)
            tensors[f"{prefix}{name}.u.weight"] = random(n, rank)
            tensors[f"{prefix}{name}.u.bias"] = torch.zeros(n, dtype=torch.bfloat16)
    low_rank = {"version": 1, "base_model_type": "opt", "ranks": ranks}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps({**config, "model_type": "lowrank_opt", "low_rank": low_rank}, indent=2)
    )
    return path

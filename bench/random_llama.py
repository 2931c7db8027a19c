"""Write a random Llama of 1.1 billion parameters, with a tokenizer of bytes, in little memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deinfer.decompose.writer import Layout, write_safetensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_random_llama(path: Path, seed: int = 0, keep: float = 0.0, **changes: int) -> Path:
    """Write the checkpoint unless it is there; `changes` are fields of the config.

    With `keep`, the linears of the layers are factors of so many of their parameters.
    """
    config: dict[str, Any] = {**CONFIG, **changes}
    if keep:
        ranks = {
            name: rank_of(n, k, keep)
            for layer in range(config["num_hidden_layers"])
            for name, (n, k) in layer_linears(config, layer).items()
        }
        low_rank = {"version": 1, "base_model_type": "llama", "ranks": ranks}
        config |= {"model_type": "lowrank_llama", "low_rank": low_rank}
    if (path / "config.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    layout = _layout(config)
    generator = torch.Generator().manual_seed(seed)

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (dtype, shape) in layout.items():
            if len(shape) == 1:
                yield name, torch.ones(shape, dtype=dtype)
            else:
                scale = 1.0 if "embed" in name else shape[1] ** -0.5
                yield name, (torch.randn(shape, generator=generator) * scale).to(dtype)

    write_safetensors(path / "model.safetensors", layout, values())
    _write_tokenizer(path)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def rank_of(n: int, k: int, keep: float) -> int:
    """The rank at which the factors of W[n, k] have at most `keep` of its parameters."""
    return max(1, int(keep * n * k / (n + k)))


def layer_linears(config: dict[str, Any], layer: int) -> dict[str, tuple[int, int]]:
    """Name and shape (n, k) of the linears of a layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    queries = config["num_attention_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{layer}.{leaf}": shape for leaf, shape in shapes.items()}


def _layout(config: dict[str, Any]) -> Layout:
    hidden = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (config["vocab_size"], hidden),
        "model.norm": (hidden,),
        "lm_head": (config["vocab_size"], hidden),
    }
    ranks = config.get("low_rank", {}).get("ranks", {})
    for i in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}"] = (hidden,)
        for name, (n, k) in layer_linears(config, i).items():
            if name in ranks:
                shapes |= {f"{name}.v": (ranks[name], k), f"{name}.u": (n, ranks[name])}
            else:
                shapes[name] = (n, k)
    return {f"{name}.weight": (torch.bfloat16, shapes[name]) for name in sorted(shapes)}


def _write_tokenizer(path: Path) -> None:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(path / "tokenizer.json"))
    entry = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[1],
        "eos_token": special[2],
        "chat_template": _TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(entry), encoding="utf-8")

"""Write a random Llama of 1.1 billion parameters, with a tokenizer of bytes, in little memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

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


def write_random_llama(path: Path, seed: int = 0, **changes: int) -> Path:
    """Write the checkpoint unless it is there; `changes` are fields of the config."""
    config = {**CONFIG, **changes}
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


def _layout(config: dict) -> Layout:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    queries = config["num_attention_heads"] * config["head_dim"]
    shapes = {
        "model.embed_tokens": (config["vocab_size"], hidden),
        "model.norm": (hidden,),
        "lm_head": (config["vocab_size"], hidden),
    }
    for i in range(config["num_hidden_layers"]):
        for leaf, shape in {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            shapes[f"model.layers.{i}.{leaf}"] = shape
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

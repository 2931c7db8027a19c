"""Write a dense Llama checkpoint as GGUF, with the very weights that the other programs run.

Without a tokenizer: the benchmark speaks in token ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig

TYPES = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows [heads * d, k] of a query or key projection for llama.cpp's rotation.

    It rotates neighbouring pairs of a head's elements, Hugging Face elements i and i + d/2.
    """
    n, k = weight.shape
    return weight.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


def write_header(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    """The hyperparameters that llama.cpp asks of a Llama."""
    rope = config.rope_parameters
    if config.model_type != "llama" or rope["rope_type"] != "default" or config.attention_bias:
        raise SystemExit(f"cannot write {config.model_type!r} with {rope['rope_type']!r} rotation")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, default="bf16")
    options = parser.parse_args()
    config = AutoConfig.from_pretrained(options.model, local_files_only=True)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    partial = options.out.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, "llama")
    write_header(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for file in sorted(options.model.glob("model*.safetensors")):
        for name, tensor in load_file(file).items():
            target = names.get_name(name, try_suffixes=(".weight",))
            if target is None:
                raise SystemExit(f"GGUF has no name for tensor {name!r}")
            weight = tensor.to(torch.float32).numpy()
            layer = name.split(".")[-2]
            if layer in heads:
                weight = interleave(weight, heads[layer])
            kind = TYPES[options.type] if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(target, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(options.out)


if __name__ == "__main__":
    main()

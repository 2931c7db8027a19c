"""A plain torch model of a decomposed checkpoint: the oracle that the native runtime must match."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deinfer.architectures import attention_implementation
from deinfer.decompose.checkpoint import Factors
from deinfer.modeling_lowrank import LowRankLinear, replace_linears

__all__ = ["LowRankLinear", "load_reference", "replace_linears"]


def install_factors(module: nn.Module, factors: Mapping[str, Factors], dtype: torch.dtype) -> None:
    """Put factors where a module has linears, in place; biases stay as they are.

    Args:
        module: Model or block with the dense linears.
        factors: By name within the module.
        dtype: Dtype of the factors there.
    """
    biases = {name: getattr(module.get_submodule(name), "bias", None) for name in factors}
    replace_linears(module, {name: pair.u.shape[1] for name, pair in factors.items()}, dtype)
    with torch.no_grad():
        for name, pair in factors.items():
            layer: Any = module.get_submodule(name)
            layer.u.weight.copy_(pair.u)
            layer.v.weight.copy_(pair.v)
            if biases[name] is not None:
                layer.u.bias.copy_(biases[name])
    module.requires_grad_(False)


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Build transformers' model for a canonical directory, with factor pairs in place of linears.

    Args:
        path: Directory written by `deinfer.decompose`, or a plain Hugging Face one.
        dtype: Dtype to compute in; stored values are converted.

    Returns:
        The transformers model (`LlamaForCausalLM` and the like) in eval mode.

    Raises:
        ValueError: The config is of another format version, or tensors are missing, unexpected or
            of another shape than the config says.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    low_rank = config.pop("low_rank", {"version": 1, "ranks": {}})
    if low_rank.get("version") != 1:
        raise ValueError(f"low_rank.version {low_rank.get('version')!r} is not 1")
    model_type = low_rank.get("base_model_type", config["model_type"])
    for key in ("model_type", "architectures", "transformers_version"):
        config.pop(key, None)
    hf_config = AutoConfig.for_model(model_type, **config)
    # The default dtype keeps from_config from building the model in fp32 first.
    model = AutoModelForCausalLM.from_config(
        hf_config, dtype=dtype, attn_implementation=attention_implementation(hf_config)
    )
    replace_linears(model, low_rank["ranks"], dtype)
    tensors = {}
    for file in sorted(path.glob("model*.safetensors")):
        tensors.update({name: t.to(dtype) for name, t in load_file(file).items()})
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    try:
        result = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
    missing = set(result.missing_keys) - tied
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{str(path)!r}: missing tensors {sorted(missing)[:5]}, "
            f"unexpected {sorted(result.unexpected_keys)[:5]}"
        )
    model.tie_weights()
    return model.eval()

"""The architectures that deinfer runs, as far as Python needs to know them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = (*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_PREFIX = "lowrank_"


@dataclass(frozen=True)
class Architecture:
    """What a `model_type` stands for.

    Attributes:
        name: Class name of transformers without its ending, e.g. `Llama`.
        linears: Linears of a layer, in the order in which they run.
        layers: Module that holds the layers.
        activation: Field of the config that names the activation.
        activations: Its supported values, the default first.
        attention_norm: Norm within a layer of what attention reads; empty if there is none.
        attention_output_norm: Norm of what attention adds to the residual stream; likewise.
        mlp_norm: As attention_norm.
        mlp_output_norm: As attention_output_norm.
    """

    name: str
    linears: tuple[str, ...] = _GATED
    layers: str = "model.layers"
    activation: str = "hidden_act"
    activations: tuple[str, ...] = ("silu", "swish")
    attention_norm: str = "input_layernorm"
    attention_output_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_output_norm: str = ""

    def linear_names(self, num_layers: int) -> list[str]:
        """Name the linears of all layers, in the order in which they run."""
        return [f"{self.layers}.{i}.{leaf}" for i in range(num_layers) for leaf in self.linears]


_GELU = "gelu_pytorch_tanh"
_GEMMA2 = Architecture(
    "Gemma2",
    activation="hidden_activation",
    activations=(_GELU,),
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
_OLMO2 = Architecture(
    "Olmo2",
    attention_norm="",
    attention_output_norm="post_attention_layernorm",
    mlp_norm="",
    mlp_output_norm="post_feedforward_layernorm",
)

# What csrc/model/registry.cc runs, each also as lowrank_*.
ARCHITECTURES = {
    # "gelu" is how the first Gemmas say gelu_pytorch_tanh.
    "gemma": Architecture("Gemma", activations=(_GELU, "gelu")),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, name="Gemma3"),
    "llama": Architecture("Llama"),
    "ministral": Architecture("Ministral"),
    "mistral": Architecture("Mistral"),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, name="Olmo3"),
    "opt": Architecture(
        "OPT",
        linears=(*_QKV, "self_attn.out_proj", "fc1", "fc2"),
        layers="model.decoder.layers",
        activation="activation_function",
        activations=("relu",),
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
    ),
    "qwen2": Architecture("Qwen2"),
    "qwen3": Architecture("Qwen3"),
}


def find_architecture(model_type: str | None) -> Architecture | None:
    """Look up a `model_type`, dense or decomposed.

    Args:
        model_type: As in config.json.

    Returns:
        The architecture, or None if deinfer does not run it.
    """
    return ARCHITECTURES.get((model_type or "").removeprefix(_PREFIX))


def attention_implementation(config: Any) -> str:
    """Choose an attention of transformers that computes all that a model asks for.

    Args:
        config: transformers' config of the model.

    Returns:
        `sdpa`, or `eager` for models that cap attention scores, which sdpa leaves out silently.
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"

"""Low-rank decomposed language models for `transformers`, written by deinfer.

A copy of this file lies in every decomposed checkpoint; `trust_remote_code=True` lets
`AutoModelForCausalLM.from_pretrained` use it. It needs torch and transformers, not deinfer.

`LowRank<Family>Config` and `LowRank<Family>ForCausalLM` exist for every family of transformers
(`LowRankLlamaForCausalLM`, `LowRankQwen3ForCausalLM`, ...). They are the family's own classes, but
that the linear layers which `config.low_rank["ranks"]` names are pairs of factors:
y = u (v x) + bias, with v [rank, in] and u [out, rank].
"""

import functools
import re
from typing import Any

import torch
import transformers
from torch import nn

_CLASS = re.compile(r"LowRank(\w+?)(Config|ForCausalLM)")
_VERSION = 1


class LowRankLinear(nn.Module):
    """y = u (v x) + bias, in the dtype of its factors.

    Args:
        n: Outputs.
        k: Inputs.
        rank: Inner dimension r.
        bias: Whether `u` carries a bias [n].
        dtype: Dtype of the factors.
        device: Device of the factors.
    """

    def __init__(
        self,
        n: int,
        k: int,
        rank: int,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        """Create the factors `v` [rank, k] and `u` [n, rank] with nn.Linear's initial values."""
        super().__init__()
        self.v = nn.Linear(k, rank, bias=False, dtype=dtype, device=device)
        self.u = nn.Linear(rank, n, bias=bias, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., k] to [..., n]."""
        y: torch.Tensor = self.u(self.v(x))
        return y


def replace_linears(
    model: nn.Module, ranks: dict[str, int], dtype: torch.dtype | None = None
) -> None:
    """Put a `LowRankLinear` with initial values where `ranks` names a linear, in place.

    Args:
        model: Model to change.
        ranks: Rank by module name, e.g. `model.layers.0.self_attn.q_proj`.
        dtype: Dtype of the new factors; by default that of the linear.

    Raises:
        ValueError: A name is not a linear layer of the model.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, rank in ranks.items():
        if name not in linears:
            raise ValueError(f"low_rank.ranks names {name!r}, which is no linear of the model")
        old = linears[name]
        new = LowRankLinear(
            old.out_features,
            old.in_features,
            rank,
            bias=old.bias is not None,
            dtype=dtype or old.weight.dtype,
            device=old.weight.device,
        )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


class _LowRankModel:
    """What distinguishes a decomposed model from the family's own; goes before it in the bases."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        low_rank = getattr(config, "low_rank", None) or {}
        if low_rank.get("version") != _VERSION:
            raise ValueError(f"low_rank.version {low_rank.get('version')!r} is not {_VERSION}")
        family: Any = super()
        family.__init__(config, *args, **kwargs)
        replace_linears(self, low_rank["ranks"])  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but right or not at all.

        A checkpoint that lacks tensors of the model is refused, where transformers would leave
        random values in their place. Models that cap attention scores get eager attention unless
        the caller chooses another: sdpa, transformers' default, leaves the cap out.
        """
        if getattr(kwargs.get("config"), "attn_logit_softcapping", None):
            kwargs.setdefault("attn_implementation", "eager")
        report = kwargs.pop("output_loading_info", False)
        family: Any = super()
        model, info = family.from_pretrained(*args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors, e.g. {missing[0]!r}")
        return (model, info) if report else model


@functools.cache
def __getattr__(name: str) -> Any:
    """Make the class that config.json's auto_map or architectures names."""
    match = _CLASS.fullmatch(name)
    base = getattr(transformers, f"{match[1]}ForCausalLM", None) if match else None
    if match is None or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if match[2] == "Config":
        family = base.config_class
        # A plan for tensor parallelism would name linears that are no more.
        fields = {"model_type": f"lowrank_{family.model_type}", "base_model_tp_plan": None}
        return type(name, (family,), {**fields, "__module__": __name__})
    fields = {"config_class": __getattr__(f"LowRank{match[1]}Config")}
    return type(name, (_LowRankModel, base), {**fields, "__module__": __name__})

"""Adapt the second factors to the activations that the decomposed model itself produces.

Each layer's factors are optimal for inputs from the dense model, but at run time its inputs carry
the errors of all layers before it. Going through the blocks in order, with the dense and the
decomposed activations side by side, `u` is fitted again by least squares. Its target mixes what
the dense weight makes of the actual input with what it makes of the clean one: the first alone
never corrects an error, the second alone overfits (mixed targets: SAES-SVD, arXiv 2602.03051).
The output-gradient weights do not enter: the best `u` for a given `v` does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from deinfer.decompose.checkpoint import Factors
from deinfer.decompose.reference import replace_linears

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_O = ("self_attn.o_proj",)
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = ("mlp.down_proj",)

Visit = Callable[[tuple[str, ...], Tensor], None]
"""Takes the names of linears that share an input, and that input [tokens, k], before they run."""


def compensate(
    model: Any,
    factors: Mapping[str, Factors],
    sequences: Sequence[Sequence[int]],
    *,
    clean_share: float = 0.75,
    ridge: float = 0.03,
    progress: bool = True,
) -> dict[str, Factors]:
    """Fit every `u` again on the decomposed model's own activations.

    Args:
        model: Dense Llama of transformers. Its linears are replaced by the factors on the way.
        factors: Factors by module name.
        sequences: Calibration token ids.
        clean_share: Share of the dense model's activations in the target, in [0, 1].
        ridge: Pull towards the given `u`, relative to the mean power of v x.
        progress: Show a progress bar.

    Returns:
        Factors with new `u` [n, r] and the given `v`.
    """
    lengths = [len(s) for s in sequences]
    fitted = dict(factors)
    with torch.no_grad():
        ids = torch.tensor([token for s in sequences for token in s])
        dense = model.get_input_embeddings()(ids)
        low = dense
        positions = torch.arange(max(lengths))[None]
        rotary = model.model.rotary_emb(dense[None], positions)
        blocks = tqdm(model.model.layers, desc="compensate", unit="block", disable=not progress)
        for index, block in enumerate(blocks):
            prefix = f"model.layers.{index}."
            clean: dict[str, Tensor] = {}
            weights: dict[str, Tensor] = {}

            def record(leaves: tuple[str, ...], x: Tensor, clean: Any = clean) -> None:
                clean.update(dict.fromkeys(leaves, x))

            dense = run_block(block, dense, lengths, rotary, record)
            ranks = {}
            for leaf in (*_QKV, *_O, *_GATE_UP, *_DOWN):
                if prefix + leaf in factors:
                    weights[leaf] = block.get_submodule(leaf).weight
                    ranks[leaf] = factors[prefix + leaf].u.shape[1]
            replace_linears(block, ranks, dense.dtype)

            def refit(
                leaves: tuple[str, ...],
                x: Tensor,
                block: Any = block,
                prefix: str = prefix,
                clean: Any = clean,
                weights: Any = weights,
            ) -> None:
                for leaf in leaves:
                    if leaf in weights:
                        target = torch.lerp(x, clean[leaf], clean_share)
                        pair = _refit(weights[leaf], factors[prefix + leaf], x, target, ridge)
                        fitted[prefix + leaf] = pair
                        block.get_submodule(leaf).u.weight.copy_(pair.u)
                        block.get_submodule(leaf).v.weight.copy_(pair.v)

            low = run_block(block, low, lengths, rotary, refit)
    return fitted


def _refit(weight: Tensor, pair: Factors, x: Tensor, target: Tensor, ridge: float) -> Factors:
    """Minimize sum |u v x - W target|^2 + rho |u - u0|^2 over u; x and target are [tokens, k]."""
    z = x.float() @ pair.v.float().T
    gram = (z.T @ z).double()
    cross = weight.double() @ (target.float().T @ z).double()
    rho = ridge * gram.diagonal().mean()
    gram.diagonal().add_(rho.clamp_min(torch.finfo(torch.float64).tiny))
    u = torch.linalg.solve(gram, (cross + rho * pair.u).T).T
    return Factors(u, pair.v) if bool(torch.isfinite(u).all()) else pair


def run_block(
    block: Any, hidden: Tensor, lengths: Sequence[int], rotary: Any, visit: Visit
) -> Tensor:
    """Run one pre-norm Llama block over joined sequences, visiting its linears.

    Args:
        block: transformers' decoder layer.
        hidden: Residual stream [tokens, hidden].
        lengths: Tokens of each sequence, in their order.
        rotary: cos and sin [1, >= max(lengths), head_dim].
        visit: Called before linears run; it may change them.

    Returns:
        The residual stream after the block [tokens, hidden].
    """
    attention, mlp = block.self_attn, block.mlp
    x = block.input_layernorm(hidden)
    visit(_QKV, x)
    mixed: list[Tensor] = []
    handle = attention.o_proj.register_forward_pre_hook(
        lambda _, inputs: mixed.append(inputs[0].flatten(0, -2))
    )
    cos, sin = rotary
    for part in x.split(list(lengths)):
        where = (cos[:, : len(part)], sin[:, : len(part)])
        # Without a mask the attention is causal.
        attention(hidden_states=part[None], position_embeddings=where, attention_mask=None)
    handle.remove()
    x = torch.cat(mixed)
    visit(_O, x)
    hidden = hidden + attention.o_proj(x)
    x = block.post_attention_layernorm(hidden)
    visit(_GATE_UP, x)
    x = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    visit(_DOWN, x)
    result: Tensor = hidden + mlp.down_proj(x)
    return result

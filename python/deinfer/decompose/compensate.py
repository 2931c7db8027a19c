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

from deinfer.architectures import ARCHITECTURES, Architecture
from deinfer.decompose.checkpoint import Factors
from deinfer.decompose.reference import replace_linears

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
        model: Dense model of transformers. Its linears are replaced by the factors on the way.
        factors: Factors by module name.
        sequences: Calibration token ids.
        clean_share: Share of the dense model's activations in the target, in [0, 1].
        ridge: Pull towards the given `u`, relative to the mean power of v x.
        progress: Show a progress bar.

    Returns:
        Factors with new `u` [n, r] and the given `v`.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    lengths = [len(s) for s in sequences]
    fitted = dict(factors)
    with torch.no_grad():
        dense, rotary = embed(model, sequences)
        low = dense
        layers: Any = model.get_submodule(architecture.layers)
        blocks = tqdm(layers, desc="compensate", unit="block", disable=not progress)
        for index, block in enumerate(blocks):
            prefix = f"{architecture.layers}.{index}."
            clean: dict[str, Tensor] = {}
            weights: dict[str, Tensor] = {}

            def record(leaves: tuple[str, ...], x: Tensor, clean: Any = clean) -> None:
                clean.update(dict.fromkeys(leaves, x))

            angles = rotary[index] if rotary else None
            dense = run_block(architecture, block, dense, lengths, angles, record)
            ranks = {}
            for leaf in architecture.linears:
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

            low = run_block(architecture, block, low, lengths, angles, refit)
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


def embed(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Any]:
    """Compute what the first block gets.

    Args:
        model: Model of transformers, of a supported architecture.
        sequences: Token ids.

    Returns:
        The residual stream of the joined sequences [tokens, hidden], and of every block cos and
        sin [1, longest, head_dim] of rotary positions, or None.
    """
    lengths = [len(s) for s in sequences]
    ids = torch.tensor([token for s in sequences for token in s])
    hidden: Tensor = model.get_input_embeddings()(ids)
    positions = torch.arange(max(lengths))[None]
    if model.config.model_type == "opt":
        learned = model.model.decoder.embed_positions(None, position_ids=positions)[0]
        return hidden + torch.cat([learned[:length] for length in lengths]), None
    rotary = model.model.rotary_emb
    if hasattr(rotary, "layer_types"):  # which turn differently
        kinds = model.config.layer_types
        by_kind = {kind: rotary(hidden[None], positions, kind) for kind in set(kinds)}
        return hidden, [by_kind[kind] for kind in kinds]
    return hidden, [rotary(hidden[None], positions)] * model.config.num_hidden_layers


def run_block(
    architecture: Architecture,
    block: Any,
    hidden: Tensor,
    lengths: Sequence[int],
    rotary: Any,
    visit: Visit,
) -> Tensor:
    """Run one block over joined sequences, visiting its linears.

    Args:
        architecture: Names of the block's modules.
        block: transformers' decoder layer.
        hidden: Residual stream [tokens, hidden].
        lengths: Tokens of each sequence, in their order.
        rotary: cos and sin [1, >= max(lengths), head_dim], or None.
        visit: Called before linears run; it may change them.

    Returns:
        The residual stream after the block [tokens, hidden].
    """

    def run(name: str, x: Tensor) -> Any:
        return block.get_submodule(name)(x) if name else x

    qkv, (output, *inner, down) = architecture.linears[:3], architecture.linears[3:]
    x = run(architecture.attention_norm, hidden)
    visit(qkv, x)
    mixed: list[Tensor] = []
    handle = block.get_submodule(output).register_forward_pre_hook(
        lambda _, inputs: mixed.append(inputs[0].flatten(0, -2))
    )
    for part in x.split(list(lengths)):
        # Without a mask sdpa is causal, over all positions also where there is a window:
        # calibration sequences are shorter than that of any published model.
        mask = None
        if block.self_attn.config._attn_implementation == "eager":
            hidden_from = torch.finfo(part.dtype).min
            mask = torch.full((len(part), len(part)), hidden_from, dtype=part.dtype).triu(1)
        where = {}
        if rotary is not None:
            where["position_embeddings"] = tuple(angles[:, : len(part)] for angles in rotary)
        block.self_attn(hidden_states=part[None], attention_mask=mask, **where)
    handle.remove()
    x = torch.cat(mixed)
    visit((output,), x)
    hidden = hidden + run(architecture.attention_output_norm, run(output, x))
    x = run(architecture.mlp_norm, hidden)
    visit(tuple(inner), x)
    activation = block.mlp.act_fn if hasattr(block, "mlp") else block.activation_fn
    first, *second = (run(name, x) for name in inner)  # gate and up, or up alone
    x = activation(first) * second[0] if second else activation(first)
    visit((down,), x)
    result: Tensor = hidden + run(architecture.mlp_output_norm, run(down, x))
    return result

"""Train the factors on the dense model's outputs, to win back what truncation lost.

Each step takes a few sequences, runs both models over them and follows the gradient of
KL(dense || decomposed) at every position (distillation, arXiv 1503.02531). Only the factors move;
what stayed dense is left as it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from deinfer.decompose.checkpoint import Factors
from deinfer.decompose.reference import LowRankLinear

STEP_TOKENS = 512
"""Tokens of an optimizer step, about."""
_LEARNING_RATE = 3e-4
_WARMUP_STEPS = 4


def recover(
    dense: Any,
    decomposed: Any,
    sequences: Sequence[Sequence[int]],
    *,
    steps: int,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Factors]:
    """Distil a dense model into its decomposed copy.

    Args:
        dense: Model of transformers, the teacher.
        decomposed: The same model with `LowRankLinear` layers in float32; changed in place.
        sequences: Token ids to train on, at most 512 each.
        steps: Optimizer steps of about 512 tokens each, >= 1.
        seed: Order of the sequences.
        progress: Show a progress bar with the loss in nats per token.

    Returns:
        The trained factors by module name, float32.

    Raises:
        ValueError: `steps` is not positive, or the loss is not finite.
    """
    if steps < 1:
        raise ValueError(f"recovery steps {steps} is not positive")
    layers = {n: m for n, m in decomposed.named_modules() if isinstance(m, LowRankLinear)}
    decomposed.requires_grad_(False)
    trained = [p.requires_grad_() for layer in layers.values() for p in layer.parameters()]
    # Factors are balanced to a common scale, so that one learning rate fits all of them.
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    native: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    bars = tqdm(batches(sequences, steps, seed), desc="recover", unit="step", disable=not progress)
    for step, (ids, valid) in enumerate(bars):
        remaining = 1 - step / steps
        rate = min((step + 1) / _WARMUP_STEPS, 0.5 * (1 - math.cos(math.pi * remaining)))
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * rate
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(native())):
            with torch.no_grad():
                target = dense(ids).logits[valid].float().log_softmax(-1)
            logits = decomposed(ids).logits[valid]
        loss = F.kl_div(
            logits.float().log_softmax(-1), target, reduction="batchmean", log_target=True
        )
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"recovery diverged in step {step}: loss {loss.item()}")
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bars.set_postfix_str(f"KL {loss.item():.3f}", refresh=False)
    return {
        name: Factors(layer.u.weight.detach(), layer.v.weight.detach())
        for name, layer in layers.items()
    }


def batches(
    sequences: Sequence[Sequence[int]], steps: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Group sequences into steps of about 512 tokens, in random order, over and over.

    Args:
        sequences: Token ids.
        steps: Groups wanted.
        seed: Of the order.

    Returns:
        (ids, valid) per step: int64 and bool [batch, longest]; right of a sequence stands padding,
        which causal attention keeps out of what comes before.
    """
    numbers = random.Random(seed)
    groups: list[list[Sequence[int]]] = []
    group: list[Sequence[int]] = []
    while len(groups) < steps:
        order = list(sequences)
        numbers.shuffle(order)
        for sequence in order:
            if group and sum(map(len, group)) + len(sequence) > STEP_TOKENS:
                groups.append(group)
                group = []
            group.append(sequence)
    padded = []
    for group in groups[:steps]:
        longest = max(map(len, group))
        ids = torch.zeros(len(group), longest, dtype=torch.int64)
        valid = torch.zeros(len(group), longest, dtype=torch.bool)
        for i, sequence in enumerate(group):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            valid[i, : len(sequence)] = True
        padded.append((ids, valid))
    return padded

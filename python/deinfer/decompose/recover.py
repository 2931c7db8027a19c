"""Train the factors on the dense model's outputs, to win back what truncation lost.

Each step takes a few sequences and follows the gradient of KL(dense || decomposed) at every
position (distillation, arXiv 1503.02531). Factors and norms move; what stayed dense is left as it
is. The weights that move are float32; products are bf16 where the CPU has them. The dense model
runs once over the text, before: what it says at a position is made again from its last residual
stream, and its head and the other's run over few positions at a time, with the gradient, so that
their wide rows stay in cache.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deinfer.decompose.checkpoint import Factors
from deinfer.decompose.reference import LowRankLinear
from deinfer.progress import progress_bar

STEP_TOKENS = 512
"""Tokens of an optimizer step, about."""
_LEARNING_RATE = 3e-4
_WARMUP_STEPS = 4
_HEAD_ROWS = 128  # positions whose logits are in memory
_SORTED = 32  # sequences that are sorted by length together, so that steps have little padding


@dataclass(frozen=True)
class Recovered:
    """What training has changed.

    Attributes:
        factors: By module name, float32.
        norms: Weights and biases of norms by parameter name, float32.
        steps: Optimizer steps.
        tokens: Tokens that the steps have seen, all in all.
        first_loss: KL in nats per token, mean over the first tenth of the steps.
        last_loss: The same over the last tenth.
    """

    factors: dict[str, Factors]
    norms: dict[str, Tensor]
    steps: int
    tokens: int
    first_loss: float
    last_loss: float


def recover(
    decomposed: Any,
    teacher: Callable[[Tensor], Tensor],
    sequences: Sequence[Sequence[int]],
    streams: Sequence[Tensor],
    *,
    steps: int = 0,
    seconds: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Recovered:
    """Distil a dense model into its decomposed copy.

    Args:
        decomposed: Model of transformers with `LowRankLinear` layers in float32; changed in place.
        teacher: Makes the dense model's logits [rows, vocabulary] of rows of `streams`.
        sequences: Token ids to train on, at most 512 each, used over and over.
        streams: The dense model's residual stream after the last block [tokens, hidden] for each.
        steps: Optimizer steps of about 512 tokens each; or
        seconds: Time to train for, whose end the learning rate reaches at zero.
        seed: Order of the sequences.
        progress: Show a progress bar with the loss in nats per token.
        clock: Tells the time in seconds.

    Returns:
        What has changed. With `steps` it is deterministic.

    Raises:
        ValueError: Not exactly one of `steps` and `seconds` is positive.
        RuntimeError: The loss is not finite.
    """
    if (steps > 0) == (seconds > 0) or steps < 0 or seconds < 0:
        raise ValueError(f"recovery needs steps ({steps}) or seconds ({seconds}), and not both")
    layers = {n: m for n, m in decomposed.named_modules() if isinstance(m, LowRankLinear)}
    decomposed.requires_grad_(False)
    norms = {n: p.requires_grad_() for n, p in decomposed.named_parameters() if _of_norm(n)}
    trained = [layer.get_parameter(name) for layer in layers.values() for name in _FACTORS]
    for parameter in trained:
        parameter.requires_grad_()
    trained += norms.values()
    # Factors are balanced to a common scale, so that one learning rate fits all of them.
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    start = clock()
    losses: list[float] = []
    tokens = 0
    bar = progress_bar(progress, desc="recover", unit="step" if steps else "s", total=steps or None)
    for step, members in enumerate(batches([len(s) for s in sequences], seed)):
        elapsed = clock() - start
        done = step / steps if steps else elapsed / seconds
        # A step that would end later than half of its time after the end is not begun.
        if done >= 1 or (seconds and step and elapsed + 0.5 * elapsed / step > seconds):
            break
        rate = min((step + 1) / _WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * rate
        ids, valid = _padded([sequences[i] for i in members])
        target = torch.cat([streams[i] for i in members])
        losses.append(_follow(decomposed, teacher, ids, valid, target))
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"recovery diverged in step {step}: loss {losses[-1]}")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(valid.sum())
        bar.set_postfix_str(f"KL {losses[-1]:.3f}", refresh=False)
        bar.update(1)
    bar.close()
    tenth = max(1, len(losses) // 10)
    return Recovered(
        factors={n: Factors(m.u.weight.detach(), m.v.weight.detach()) for n, m in layers.items()},
        norms={name: p.detach() for name, p in norms.items()},
        steps=len(losses),
        tokens=tokens,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
    )


_FACTORS = ("u.weight", "v.weight")


def _of_norm(name: str) -> bool:
    """Whether a parameter belongs to a norm, as all families name them."""
    return "norm" in name.rsplit(".", 2)[-2]


def _follow(
    decomposed: Any,
    teacher: Callable[[Tensor], Tensor],
    ids: Tensor,
    valid: Tensor,
    target: Tensor,
) -> float:
    """Add the gradient of KL(dense || decomposed), mean over valid tokens, and return it in nats.

    ids and valid are [batch, longest], target [valid tokens, hidden].
    """
    head, cap = decomposed.get_output_embeddings(), _soft_cap(decomposed)
    native: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    total = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(native())):
        hidden = decomposed.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[valid]
        gradients = []
        for first in range(0, len(target), _HEAD_ROWS):
            rows = hidden[first : first + _HEAD_ROWS].detach().requires_grad_()
            wanted = target[first : first + _HEAD_ROWS]
            with torch.no_grad():
                log_p = teacher(wanted).float().log_softmax(-1)
                p = log_p.exp()
                total += float((p * log_p).sum())
            logits = head(rows).float()
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            loss = F.cross_entropy(logits, p, reduction="sum")
            gradients.append(torch.autograd.grad(loss, rows)[0])
            total += loss.item()
    hidden.backward(torch.cat(gradients) / len(target))
    return total / len(target)


def _soft_cap(model: Any) -> float | None:
    """The cap of the logits, where a model has one, by transformers' name."""
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


def batches(lengths: Sequence[int], seed: int) -> Iterator[list[int]]:
    """Group sequences of like length into steps of about 512 tokens, over and over.

    Args:
        lengths: Tokens of the sequences.
        seed: Of the order.

    Yields:
        Indices of sequences, per step; each comes once in every round.
    """
    numbers = random.Random(seed)
    while True:
        order = list(range(len(lengths)))
        numbers.shuffle(order)
        groups: list[list[int]] = []
        for first in range(0, len(order), _SORTED):
            tokens = STEP_TOKENS
            for i in sorted(order[first : first + _SORTED], key=lengths.__getitem__):
                if tokens + lengths[i] > STEP_TOKENS:
                    groups.append([])
                    tokens = 0
                groups[-1].append(i)
                tokens += lengths[i]
        numbers.shuffle(groups)
        yield from groups


def _padded(group: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and which of them count [batch, longest].

    Right of a sequence stands padding, which causal attention keeps out of what comes before.
    """
    longest = max(map(len, group))
    ids = torch.zeros(len(group), longest, dtype=torch.int64)
    valid = torch.zeros(len(group), longest, dtype=torch.bool)
    for i, sequence in enumerate(group):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        valid[i, : len(sequence)] = True
    return ids, valid

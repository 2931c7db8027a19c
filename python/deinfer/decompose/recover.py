"""Train on the dense model's outputs, to win back what truncation lost.

Each step takes a few sequences and follows the gradient of KL(dense || decomposed) at every
position (distillation, arXiv 1503.02531). All weights of the blocks move: factors, norms, and the
matrices that stayed dense, which make good what the others lost; embedding, head and biases stay.
The dense model runs once over the text, before: what it says at a position is made again from its
last residual stream, and its head and the other's run over few positions at a time, with the
gradient.
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
from deinfer.decompose.master_weights import MasterWeights
from deinfer.decompose.reference import LowRankLinear
from deinfer.decompose.streaming import bf16_is_native
from deinfer.progress import progress_bar

STEP_TOKENS = 1088
"""Tokens of an optimizer step, about."""
_LEARNING_RATE = 1.4e-4
_WARMUP_STEPS = 4
_HEAD_ROWS = 128  # positions whose logits are in memory
_LENGTH_MULTIPLE = 32  # of padded sequences: few sizes, for which torch prepares products once
_SORTED = 64  # sequences that are sorted by length together, so that steps have little padding


@dataclass(frozen=True)
class Recovered:
    """What training has changed.

    Attributes:
        factors: By module name, float32.
        weights: Of norms and matrices that stayed dense, by parameter name, float32.
        steps: Optimizer steps.
        tokens: Tokens that the steps have seen, all in all.
        first_loss: KL in nats per token, mean over the first tenth of the steps.
        last_loss: The same over the last tenth.
    """

    factors: dict[str, Factors]
    weights: dict[str, Tensor]
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
        decomposed: Model of transformers with `LowRankLinear` layers in float32; changed in place,
            and where the CPU multiplies bf16, to that.
        teacher: Makes the dense model's logits [rows, vocabulary] of rows of `streams`.
        sequences: Token ids to train on, at most 512 each, used over and over.
        streams: The dense model's residual stream after the last block [tokens, hidden] for each.
        steps: Optimizer steps of about 1,100 tokens each; or
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
    moving = {n: p.requires_grad_() for n, p in decomposed.named_parameters() if _moves(n)}
    # Factors are balanced to a common scale, so that one learning rate fits all of them.
    master = MasterWeights(
        decomposed, moving, torch.bfloat16 if bf16_is_native() else torch.float32
    )
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
        ids, valid = _padded([sequences[i] for i in members])
        target = torch.cat([streams[i] for i in members])
        losses.append(_follow(decomposed, teacher, ids, valid, target))
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"recovery diverged in step {step}: loss {losses[-1]}")
        master.step(_LEARNING_RATE * rate)
        tokens += int(valid.sum())
        bar.set_postfix_str(f"KL {losses[-1]:.3f}", refresh=False)
        bar.update(1)
    bar.close()
    tenth = max(1, len(losses) // 10)
    weights = dict(master.values)
    factors = {
        name: Factors(*(weights.pop(f"{name}.{factor}.weight") for factor in "uv"))
        for name in layers
    }
    return Recovered(
        factors=factors,
        weights=weights,
        steps=len(losses),
        tokens=tokens,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
    )


def _moves(name: str) -> bool:
    """Whether a parameter, as all families name them, is a block's matrix or belongs to a norm."""
    return "norm" in name.rsplit(".", 2)[-2] or (".layers." in name and name.endswith(".weight"))


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
    hidden = decomposed.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[valid]
    total, gradients = 0.0, []
    for first in range(0, len(target), _HEAD_ROWS):
        rows = hidden[first : first + _HEAD_ROWS].detach().requires_grad_()
        count = len(rows)
        logits = head(_whole(rows, _HEAD_ROWS))[:count].float()
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        with torch.no_grad():
            wanted = _whole(target[first : first + _HEAD_ROWS], _HEAD_ROWS)
            log_p = teacher(wanted)[:count].float().log_softmax(-1)
            log_q = logits.log_softmax(-1)
            p = log_p.exp()
            total += float(torch.dot(p.flatten(), log_p.sub_(log_q).flatten()))
            gradient = log_q.exp_().sub_(p)  # of KL by the logits
        gradients.append(torch.autograd.grad(logits, rows, gradient)[0])
    hidden.backward(torch.cat(gradients) / len(target))
    return total / len(target)


def _whole(rows: Tensor, count: int) -> Tensor:
    """Rows filled up with zeros to `count`: torch prepares products anew for every size."""
    return F.pad(rows, (0, 0, 0, count - len(rows)))


def _soft_cap(model: Any) -> float | None:
    """The cap of the logits, where a model has one, by transformers' name."""
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


def batches(lengths: Sequence[int], seed: int) -> Iterator[list[int]]:
    """Group sequences of like length into steps of about 1,100 tokens, over and over.

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
    """Token ids and which of them count [batch, longest, rounded up].

    Right of a sequence stands padding, which causal attention keeps out of what comes before.
    """
    longest = -(-max(map(len, group)) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    ids = torch.zeros(len(group), longest, dtype=torch.int64)
    valid = torch.zeros(len(group), longest, dtype=torch.bool)
    for i, sequence in enumerate(group):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        valid[i, : len(sequence)] = True
    return ids, valid

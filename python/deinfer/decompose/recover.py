"""Train on the dense model's outputs, to win back what truncation lost.

Each step takes a few sequences and follows the gradient of KL(dense || decomposed) at every
position (distillation, arXiv 1503.02531). All weights of the blocks move: factors, norms, and the
matrices that stayed dense, which make good what the others lost; embedding, head and biases stay.
What the dense model says at a position is made again from its last state, which is known before;
its head and the other's run over few positions at a time, with the gradient.
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
from deinfer.decompose.examples import Example
from deinfer.decompose.master_weights import MasterWeights
from deinfer.decompose.reference import LowRankLinear
from deinfer.decompose.streaming import bf16_is_native
from deinfer.progress import progress_bar

STEP_TOKENS = 544
"""Tokens of an optimizer step, about."""
_LEARNING_RATE = 1e-4
_WARMUP_STEPS = 4
_FASTEST = 1000.0  # tokens a second, a guess before the first step
_HEAD_ROWS = 128  # positions whose logits are in memory
_CACHED_ROWS = 8  # whose distributions stay in the CPU's caches while they are compared
_LENGTH_MULTIPLE = 8  # of padded sequences: few sizes, for which torch prepares products once
_SORTED = 128  # sequences that are sorted by length together, so that steps have little padding


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
    head: Callable[[Tensor], Tensor],
    text: Callable[[int], Sequence[Example]],
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
        head: Makes the dense model's logits [rows, vocabulary], before a soft cap, of states.
        text: Makes what to train on next, given how many tokens are wanted at most; asked whenever
            all that it made has been used once.
        steps: Optimizer steps of about 500 tokens each; or
        seconds: Time to train for, whose end the learning rate reaches at zero.
        seed: Order of the examples.
        progress: Show a progress bar with the loss in nats per token.
        clock: Tells the time in seconds.

    Returns:
        What has changed. With `steps` it is deterministic.

    Raises:
        ValueError: Not exactly one of `steps` and `seconds` is positive, or `text` makes nothing to
            train on.
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

    def wanted() -> int:
        """Tokens that the rest of the training takes, about."""
        if steps:
            return (steps - len(losses)) * STEP_TOKENS
        elapsed = max(clock() - start, 1e-9)
        rest = (seconds - elapsed) * tokens / elapsed if tokens else seconds * _FASTEST
        return max(int(rest), STEP_TOKENS)

    bar = progress_bar(progress, desc="recover", unit="step" if steps else "s", total=steps or None)
    groups = batches(lambda: text(wanted()), seed)
    while True:
        step, elapsed = len(losses), clock() - start
        done = step / steps if steps else elapsed / seconds
        # A step that would end later than half of its time after the end is not begun.
        if done >= 1 or (seconds and step and elapsed + 0.5 * elapsed / step > seconds):
            break
        rate = min((step + 1) / _WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * done)))
        members = next(groups)
        ids, valid = _padded(members)
        target = torch.cat([example.states for example in members])
        losses.append(_follow(decomposed, head, ids, valid, target))
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
    dense_head: Callable[[Tensor], Tensor],
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
        logits = head(_whole(rows, _HEAD_ROWS))
        gradient = torch.empty_like(logits)
        gradient[count:] = 0
        with torch.no_grad():
            wanted = dense_head(_whole(target[first : first + _HEAD_ROWS], _HEAD_ROWS))
            for part in range(0, count, _CACHED_ROWS):
                among = slice(part, min(part + _CACHED_ROWS, count))
                total += _divergence(wanted[among], logits[among], cap, gradient[among])
        gradients.append(torch.autograd.grad(logits, rows, gradient)[0])
    hidden.backward(torch.cat(gradients) / len(target))
    return total / len(target)


def _divergence(wanted: Tensor, logits: Tensor, cap: float | None, gradient: Tensor) -> float:
    """Compute the KL of two rows' distributions, summed over rows.

    Args:
        wanted: The dense model's logits [rows, vocabulary], before the soft cap.
        logits: The decomposed model's, likewise.
        cap: The soft cap, if there is one.
        gradient: Becomes the gradient by `logits`.

    Returns:
        KL(wanted || logits) in nats.
    """
    dense, capped = wanted.float(), logits.float()
    if cap is not None:
        dense, capped = (cap * torch.tanh(x / cap) for x in (dense, capped))
    log_p, log_q = dense.log_softmax(-1), capped.log_softmax(-1)
    p = log_p.exp()
    total = float(torch.dot(p.flatten(), log_p.sub_(log_q).flatten()))
    slope = log_q.exp_().sub_(p)
    if cap is not None:
        slope *= 1 - (capped / cap).square()
    gradient.copy_(slope)
    return total


def _whole(rows: Tensor, count: int) -> Tensor:
    """Rows filled up with zeros to `count`: torch prepares products anew for every size."""
    return F.pad(rows, (0, 0, 0, count - len(rows)))


def _soft_cap(model: Any) -> float | None:
    """The cap of the logits, where a model has one, by transformers' name."""
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


def batches(text: Callable[[], Sequence[Example]], seed: int) -> Iterator[list[Example]]:
    """Group examples of like length into steps of about 500 tokens.

    Args:
        text: Makes examples; asked again when all of them have been yielded.
        seed: Of the order.

    Yields:
        Examples per step.

    Raises:
        ValueError: `text` makes no example with a state.
    """
    numbers = random.Random(seed)
    while True:
        made = text()
        examples = [example for example in made if len(example.states)]
        if not examples:
            raise ValueError(f"none of {len(made)} sequences to train on has a state")
        numbers.shuffle(examples)
        groups: list[list[Example]] = []
        for first in range(0, len(examples), _SORTED):
            tokens = STEP_TOKENS
            for example in sorted(examples[first : first + _SORTED], key=len):
                if tokens + len(example) > STEP_TOKENS:
                    groups.append([])
                    tokens = 0
                groups[-1].append(example)
                tokens += len(example)
        numbers.shuffle(groups)
        yield from groups


def _padded(group: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Token ids and which of them have states [batch, longest, rounded up].

    Right of a sequence stands padding, which causal attention keeps out of what comes before.
    """
    longest = -(-max(map(len, group)) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    ids = torch.zeros(len(group), longest, dtype=torch.int64)
    valid = torch.zeros(len(group), longest, dtype=torch.bool)
    for i, example in enumerate(group):
        ids[i, : len(example)] = torch.tensor(example.ids)
        valid[i, len(example) - len(example.states) : len(example)] = True
    return ids, valid

"""How far one model's predictions of a text are from another's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deinfer.evaluate import scoring_windows

if TYPE_CHECKING:
    from deinfer.llm import LLM

_ROWS = 32
"""Rows of logits that are float64 at a time."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found; all over the same scored tokens.

    Attributes:
        kl: Mean of KL(model || other) = sum_t p(t) log(p(t) / q(t)) over the vocabulary, in nats
            per token, p of `model` and q of `other`: what is lost when q stands in for p.
        kl_max: The largest at one token.
        agreement: Share of tokens at which both find the same token most likely.
        perplexity: Of `model`.
        other_perplexity: Of `other`.
        perplexity_ratio: other_perplexity / perplexity.
        tokens: Tokens scored: all of the text but the first.
        window: Tokens of the longest context.
        stride: Tokens that a window moves on.
    """

    kl: float
    kl_max: float
    agreement: float
    perplexity: float
    other_perplexity: float
    perplexity_ratio: float
    tokens: int
    window: int
    stride: int


def compare(
    llm: LLM, other: LLM, text: str, *, window: int | None = None, stride: int | None = None
) -> Comparison:
    """Compare two models' next-token distributions over a text, window by window.

    Windows are those of `perplexity`. Two windows of logits are in memory at a time: 8 bytes times
    window times vocabulary.

    Args:
        llm: The model whose distributions are the reference, say the dense one.
        other: The model that is to stand in for it, with the same vocabulary.
        text: Text to score.
        window: Tokens in a window; by default 1024, or as many as both models take if that is less.
        stride: Tokens that a window moves on; by default half the window.

    Returns:
        Divergence, agreement and both perplexities.

    Raises:
        ValueError: The models' vocabularies differ, the text has fewer than 2 tokens, or window or
            stride do not fit.
    """
    token_ids = _common_tokens(llm, other, text)
    longest = min(llm.model_info.max_model_len, other.model_info.max_model_len)
    windows = scoring_windows(len(token_ids), longest, window, stride)
    kl: list[NDArray[np.float64]] = []
    agreed = 0
    loss = other_loss = 0.0
    for begin, first, end in windows.spans:
        ids = token_ids[begin:end]
        logits, other_logits = llm.prompt_logits(ids), other.prompt_logits(ids)
        targets = np.asarray(token_ids[first:end])
        for row in range(first, end, _ROWS):
            # Row i of the logits predicts token i + 1.
            rows = slice(row - 1 - begin, min(row + _ROWS, end) - 1 - begin)
            log_p, log_q = _log_softmax(logits[rows]), _log_softmax(other_logits[rows])
            kl.append(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))
            agreed += int(np.sum(logits[rows].argmax(axis=1) == other_logits[rows].argmax(axis=1)))
            target = targets[row - first : row - first + _ROWS]
            index = np.arange(len(target))
            loss -= float(log_p[index, target].sum())
            other_loss -= float(log_q[index, target].sum())
    divergence = np.concatenate(kl)
    count = len(divergence)
    return Comparison(
        kl=float(divergence.mean()),
        kl_max=float(divergence.max()),
        agreement=agreed / count,
        perplexity=_exp(loss / count),
        other_perplexity=_exp(other_loss / count),
        perplexity_ratio=_exp((other_loss - loss) / count),
        tokens=count,
        window=windows.window,
        stride=windows.stride,
    )


def _common_tokens(llm: LLM, other: LLM, text: str) -> list[int]:
    """Tokenize, and check that both models mean the same by a token."""
    sizes = [model.model_info.vocab_size for model in (llm, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the models have different vocabularies: {sizes[0]:,} and {sizes[1]:,} tokens"
        )
    ids = llm.get_tokenizer()(text, verbose=False)["input_ids"]
    other_ids = other.get_tokenizer()(text, verbose=False)["input_ids"]
    if ids != other_ids:
        place = next(
            (i for i, (a, b) in enumerate(zip(ids, other_ids, strict=False)) if a != b),
            min(len(ids), len(other_ids)),
        )
        found = [tokens[place] if place < len(tokens) else "none" for tokens in (ids, other_ids)]
        raise ValueError(
            "the models have different vocabularies: their tokenizers differ at token "
            f"{place} of the text ({found[0]} and {found[1]})"
        )
    return [int(token) for token in ids]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each row, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _exp(nll: float) -> float:
    # exp of a hopeless model's loss overflows; infinity says the same.
    return math.exp(nll) if nll < 700 else math.inf

"""Perplexity and speed, measured through the native runtime."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deinfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from deinfer.llm import LLM

DEFAULT_WINDOW = 1024


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp(nll).
        nll: Mean negative log-likelihood of a scored token, in nats.
        tokens: Tokens scored: all of the text but the first.
        seconds: Wall time, tokenization included.
        window: Tokens of the longest context.
        stride: Tokens that a window moves on.
    """

    perplexity: float
    nll: float
    tokens: int
    seconds: float
    window: int
    stride: int


def perplexity(
    llm: LLM, text: str, *, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """Score a text in overlapping windows.

    Every token but the first is scored exactly once. Those of the first window see what precedes
    them, all others see at least `window - stride` tokens.

    Args:
        llm: The model.
        text: Text to score; the tokenizer adds its usual special tokens.
        window: Tokens in a window; by default 1024, or as many as the model takes if that is
            less.
        stride: Tokens that a window moves on; by default half the window. A smaller stride gives
            more context and takes longer.

    Returns:
        The perplexity.

    Raises:
        ValueError: The text has fewer than 2 tokens, or window or stride do not fit.
    """
    start = time.perf_counter()
    token_ids = list(llm.get_tokenizer()(text, verbose=False)["input_ids"])
    windows = scoring_windows(len(token_ids), llm.model_info.max_model_len, window, stride)
    outputs = llm.generate(
        [token_ids[begin:end] for begin, _, end in windows.spans],
        SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0, detokenize=False),
        use_tqdm=False,
    )
    total = 0.0
    for (begin, first, end), output in zip(windows.spans, outputs, strict=True):
        rows = output.prompt_logprobs or []
        for position in range(first, end):
            row = rows[position - begin]
            if row is None:
                raise RuntimeError(f"token {position} of the text has no log-probability")
            total -= row[token_ids[position]].logprob
    nll = total / (len(token_ids) - 1)
    return Perplexity(
        # exp of a hopeless model's loss overflows; infinity says the same.
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        tokens=len(token_ids) - 1,
        seconds=time.perf_counter() - start,
        window=windows.window,
        stride=windows.stride,
    )


@dataclass(frozen=True, slots=True)
class Windows:
    """How a text is cut.

    Attributes:
        window: Tokens of a window.
        stride: Tokens that a window moves on.
        spans: As `window_spans` gives them.
    """

    window: int
    stride: int
    spans: list[tuple[int, int, int]]


def scoring_windows(
    length: int, max_model_len: int, window: int | None, stride: int | None
) -> Windows:
    """Cut a text as a caller asks for it.

    Args:
        length: Tokens of the text.
        max_model_len: Longest sequence of the model, one new token included.
        window: Tokens in a window; None: 1024, or as many as the model takes if that is less.
        stride: Tokens that a window moves on; None: half the window.

    Returns:
        The windows.

    Raises:
        ValueError: The text has fewer than 2 tokens, or window or stride do not fit.
    """
    longest = max_model_len - 1  # a request also needs room for one new token
    window = min(DEFAULT_WINDOW, longest) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= longest:
        raise ValueError(f"window = {window} is not in [2, {longest}]")
    if not 1 <= stride < window:
        raise ValueError(f"stride = {stride} is not in [1, window) = [1, {window})")
    if length < 2:
        raise ValueError(f"the text has {length} tokens; at least 2 are needed")
    return Windows(window, stride, window_spans(length, window, stride))


def window_spans(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Cut a text into windows.

    Args:
        length: Tokens of the text, >= 2.
        window: Tokens of a window.
        stride: Tokens that a window moves on, < window.

    Returns:
        (begin, first, end) of each window: it holds tokens [begin, end) and scores [first, end).
    """
    end = min(window, length)
    spans = [(0, 1, end)]
    while end < length:
        first, end = end, min(end + stride, length)
        spans.append((first - (window - stride), first, end))
    return spans


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, medians over the rounds.

    Attributes:
        prefill: Prompt tokens per second.
        decode: Generated tokens per second by batch size, all sequences of the batch together.
    """

    prefill: float
    decode: dict[int, float]


def measure_speed(
    llms: Sequence[LLM],
    *,
    prompt_tokens: int = 512,
    batch_sizes: Sequence[int] = (1, 16),
    decode_tokens: int = 32,
    decode_prompt_tokens: int = 16,
    rounds: int = 3,
    seed: int = 0,
) -> list[Speed]:
    """Compare the speed of models, in interleaved rounds so that a noisy machine favours none.

    Decode speed at batch size B is B (T - 1) / (t(T) - t(1)), where t(T) is the time to generate T
    tokens for each of B prompts: the time of the prompts cancels out. All prompts are random and
    different, so that prefix caching cannot help, and end-of-sequence tokens are ignored.

    Args:
        llms: Models with the same vocabulary.
        prompt_tokens: Tokens of the prompt that prefill is measured with.
        batch_sizes: Batch sizes to measure decoding at.
        decode_tokens: T, >= 2.
        decode_prompt_tokens: Tokens of the prompts that decoding is measured with.
        rounds: Repetitions, after one warm-up that does not count.
        seed: Seed of the random prompts.

    Returns:
        The speed of each model, in the order of `llms`.

    Raises:
        ValueError: A number is too small, or a prompt does not fit the models.
    """
    if decode_tokens < 2 or rounds < 1:
        raise ValueError(f"decode_tokens = {decode_tokens} < 2 or rounds = {rounds} < 1")
    numbers = random.Random(seed)
    prefill: list[list[float]] = [[] for _ in llms]
    decode: list[dict[int, list[float]]] = [{b: [] for b in batch_sizes} for _ in llms]
    for round_number in range(rounds + 1):
        for i, llm in enumerate(llms):
            once = _time(llm, numbers, 1, prompt_tokens, 1)
            if round_number > 0:
                prefill[i].append(prompt_tokens / once)
        for batch in batch_sizes if round_number > 0 else ():
            for i, llm in enumerate(llms):
                one = _time(llm, numbers, batch, decode_prompt_tokens, 1)
                many = _time(llm, numbers, batch, decode_prompt_tokens, decode_tokens)
                # On a machine that stalls, t(1) can exceed t(T); such a round says nothing.
                if many > one:
                    decode[i][batch].append(batch * (decode_tokens - 1) / (many - one))
    return [
        Speed(
            statistics.median(p),
            {b: statistics.median(rates) if rates else math.nan for b, rates in d.items()},
        )
        for p, d in zip(prefill, decode, strict=True)
    ]


def _time(llm: LLM, numbers: random.Random, batch: int, prompt_tokens: int, tokens: int) -> float:
    """Seconds to generate `tokens` tokens for `batch` new random prompts."""
    vocabulary = range(llm.model_info.vocab_size)
    prompts = [numbers.choices(vocabulary, k=prompt_tokens) for _ in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start

"""Perplexity and speed as `deinfer eval` measures them, on a tiny random model."""

from __future__ import annotations

import numpy as np
import pytest
from deinfer import LLM, perplexity
from deinfer.evaluate import measure_speed, window_spans


@pytest.mark.parametrize("length", [2, 5, 8, 9, 12, 13, 50])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 1), (8, 7), (2, 1)])
def test_windows_score_every_token_once(length: int, window: int, stride: int) -> None:
    spans = window_spans(length, window, stride)
    assert [t for _, first, end in spans for t in range(first, end)] == list(range(1, length))
    for begin, first, end in spans:
        assert 0 <= begin < first and end - begin <= window
        assert begin == 0 or first - begin >= window - stride


def test_perplexity(llm: LLM) -> None:
    text = "The capital of France is Paris, and the sky is blue. " * 3
    ids = llm.get_tokenizer()(text)["input_ids"]
    whole = perplexity(llm, text, window=len(ids), stride=1)
    logits = llm.prompt_logits(ids).astype(np.float64)[:-1]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    assert whole.nll == pytest.approx(losses.mean(), abs=1e-5)
    assert whole.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert whole.tokens == len(ids) - 1
    short = perplexity(llm, text, window=16)
    assert (short.window, short.stride, short.tokens) == (16, 8, len(ids) - 1)
    assert perplexity(llm, text).window == 255


def test_bad_evaluation_arguments(llm: LLM) -> None:
    for arguments in ({"window": 1}, {"window": 256}, {"window": 8, "stride": 8}, {"stride": 0}):
        with pytest.raises(ValueError, match="window|stride"):
            perplexity(llm, "The sky is blue", **arguments)
    with pytest.raises(ValueError, match="tokens"):
        perplexity(llm, "")


def test_measure_speed(llm: LLM) -> None:
    hits = llm.stats.prefix_hit_tokens
    (speed,) = measure_speed([llm], prompt_tokens=64, batch_sizes=(1, 4), decode_tokens=8, rounds=2)
    assert speed.prefill > 0 and set(speed.decode) == {1, 4}
    assert llm.stats.prefix_hit_tokens == hits

"""Sampling parameters, stopping and log-probabilities of `LLM` on a tiny random model."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
from deinfer import LLM, Logprob, SamplingParams
from llm_helpers import GREEDY, PROMPTS, texts

# Sampling parameters


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("temperature", float("nan"), ValueError),
        ("temperature", -1.5, ValueError),
        ("top_p", -0.5, ValueError),
        ("top_k", -2, ValueError),
        ("min_p", 1.5, ValueError),
        ("n", 0, ValueError),
        ("max_tokens", 0, ValueError),
        ("min_tokens", -1, ValueError),
        ("logprobs", -1, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("presence_penalty", 2.5, ValueError),
        ("repetition_penalty", -0.5, ValueError),
        ("temperature", "hot", TypeError),
        ("stop", [""], ValueError),
        ("stop", [3], TypeError),
    ],
)
def test_bad_sampling_parameter(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        SamplingParams(**{field: value})
    assert field in str(caught.value)
    shown = value[0] if isinstance(value, list) else value
    assert str(shown) in str(caught.value)


def test_unknown_sampling_parameter() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(2)  # type: ignore[misc]


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_a_value_changed_later_is_checked_too(llm: LLM) -> None:
    params = SamplingParams()
    params.temperature = -1
    with pytest.raises(ValueError, match="temperature"):
        llm.generate("The sky", params)


def test_parameters_compare_show_and_copy() -> None:
    params = SamplingParams(temperature=0.7, stop="a", stop_token_ids=[3], seed=2**64 - 1)
    assert repr(params) == (
        "SamplingParams(temperature=0.7, seed=18446744073709551615, stop_token_ids=[3], stop=['a'])"
    )
    assert repr(SamplingParams()) == "SamplingParams()"
    for other in (params.clone(), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert other == params and other is not params
        other.stop.append("b")
        assert other != params
    assert params != "params"


# Stopping


def test_stop_string_across_tokens(llm: LLM) -> None:
    (free,) = llm.generate("The sky", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    whole, tokenizer = free.outputs[0].text, llm.get_tokenizer()
    # From the middle of one token's text to the middle of another's.
    pieces = [tokenizer.decode([token_id]) for token_id in free.outputs[0].token_ids]
    at = len("".join(pieces[:8])) - 1
    stop = whole[at : at + 4]
    first = whole.find(stop)
    for stops in (stop, [stop], ["\x00never", stop]):
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=stops)
        (output,) = llm.generate("The sky", params)
        sample = output.outputs[0]
        assert sample.text == whole[:first]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
        assert sample.token_ids == free.outputs[0].token_ids[: len(sample.token_ids)]
        assert len(sample.token_ids) < 30
        kept = params.clone()
        kept.include_stop_str_in_output = True
        assert texts(llm.generate("The sky", kept)) == [whole[: first + len(stop)]]


def test_stop_string_ends_one_of_several_samples(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=20, ignore_eos=True)
    (free,) = llm.generate("The sky", params)
    stop = free.outputs[2].text[5:8]
    (output,) = llm.generate("The sky", SamplingParams(**{**params._values(), "stop": [stop]}))
    for before, after in zip(free.outputs, output.outputs, strict=True):
        end = before.text.find(stop)
        assert after.text == (before.text if end < 0 else before.text[:end])
        assert after.finish_reason == ("length" if end < 0 else "stop")
    assert output.outputs[2].stop_reason == stop


def test_stop_token_is_in_the_tokens_and_not_in_the_text(llm: LLM) -> None:
    (free,) = llm.generate("The sky", GREEDY)
    ids = free.outputs[0].token_ids
    stop = ids[5]
    first = ids.index(stop)
    params = SamplingParams(**{**GREEDY._values(), "stop_token_ids": [stop]})
    sample = llm.generate("The sky", params)[0].outputs[0]
    assert sample.token_ids == ids[: first + 1]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    decode = partial(llm.get_tokenizer().decode, skip_special_tokens=True)
    assert sample.text == decode(ids[:first])
    params.include_stop_str_in_output = True
    assert texts(llm.generate("The sky", params)) == [decode(ids[: first + 1])]


def test_min_tokens_holds_back_stop_strings_and_tokens(llm: LLM) -> None:
    (free,) = llm.generate("The sky", GREEDY)
    stop = free.outputs[0].text[0]
    params = SamplingParams(**{**GREEDY._values(), "stop": [stop], "min_tokens": 12})
    assert texts(llm.generate("The sky", params)) == texts([free])


def test_end_of_sequence(llm: LLM) -> None:
    """A hot model ends by chance; the text lacks the end token, the tokens have it."""
    params = SamplingParams(n=64, temperature=5.0, max_tokens=200, seed=0)
    (output,) = llm.generate("The sky", params)
    ended = [s for s in output.outputs if s.finish_reason == "stop"]
    assert ended
    for sample in ended:
        assert sample.token_ids[-1] == 2 and sample.token_ids.count(2) == 1
        assert sample.stop_reason is None
        assert "<|im_end|>" not in sample.text


def test_max_tokens_none_runs_until_the_context_is_full(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate([list(range(3, 203))], params)
    assert len(output.outputs[0].token_ids) == 256 - 200
    assert output.outputs[0].finish_reason == "length"


# Samples and log-probabilities


def test_n_samples_differ_and_repeat_with_a_seed(llm: LLM) -> None:
    params = SamplingParams(n=5, temperature=2.0, max_tokens=10, seed=7, ignore_eos=True)
    (first,), (second,) = llm.generate("The sky", params), llm.generate("The sky", params)
    assert [s.index for s in first.outputs] == [0, 1, 2, 3, 4]
    assert len({tuple(s.token_ids) for s in first.outputs}) == 5
    assert first.outputs == second.outputs


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=6, logprobs=3, prompt_logprobs=2)
    params.ignore_eos = True
    (output,) = llm.generate(PROMPTS[1], params)
    sample, prompt = output.outputs[0], output.prompt_token_ids
    assert sample.logprobs is not None and len(sample.logprobs) == 6
    logits = llm.prompt_logits([*prompt, *sample.token_ids]).astype(np.float64)
    table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for i, (token_id, entry) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
        _check_entry(entry, token_id, table[len(prompt) - 1 + i], 3, llm)
    total = sum(e[t].logprob for t, e in zip(sample.token_ids, sample.logprobs, strict=True))
    assert sample.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for i, row in enumerate(output.prompt_logprobs[1:], 1):
        assert row is not None
        _check_entry(row, prompt[i], table[i - 1], 2, llm)


def _check_entry(
    entry: dict[int, Logprob], chosen: int, row: np.ndarray, count: int, llm: LLM
) -> None:
    order = np.argsort(-row, kind="stable")
    assert next(iter(entry)) == chosen
    assert set(entry) == {chosen, *(int(t) for t in order[:count])}
    for token_id, value in entry.items():
        assert value.logprob == pytest.approx(row[token_id], abs=1e-4)
        assert value.rank == int((row > row[token_id]).sum()) + 1
        assert value.decoded_token == llm.get_tokenizer().decode([token_id])


def test_no_logprobs_unless_asked_for(llm: LLM) -> None:
    (output,) = llm.generate("The sky", GREEDY)
    assert output.prompt_logprobs is None and output.prompt_logits is None
    assert output.outputs[0].logprobs is None and output.outputs[0].cumulative_logprob is None


def test_prompt_logits(llm: LLM) -> None:
    ids = llm.get_tokenizer()(PROMPTS[1])["input_ids"]
    logits = llm.prompt_logits(ids)
    assert logits.shape == (len(ids), llm.model_info.vocab_size) and logits.dtype == np.float32
    assert np.isfinite(logits).all()
    (output,) = llm.generate([ids], GREEDY)
    assert int(logits[-1].argmax()) == output.outputs[0].token_ids[0]
    np.testing.assert_array_equal(llm.prompt_logits(np.array(ids[:3])), logits[:3])

"""`LLM` on a tiny random model, through the real native module."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_model
from deinfer import LLM, CompletionOutput, Logprob, RequestOutput, SamplingParams, perplexity
from deinfer.evaluate import measure_speed, window_spans

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The sky", "The capital of France is", "One, two", "drink water and"]


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        shared = request.getfixturevalue("llm")
        assert not shared._requests
        assert not shared._engine.has_unfinished_requests()


class Interrupting:
    """The engine, with a KeyboardInterrupt in place of one step."""

    def __init__(self, engine: Any, steps: int) -> None:
        self._engine, self._left = engine, steps

    def step(self) -> Any:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return self._engine.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


# Prompts and order


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    # Different lengths, so that requests finish in another order than they came.
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (20, 3, 11, 1)]
    outputs = llm.generate(PROMPTS, params)
    assert [o.prompt for o in outputs] == PROMPTS
    assert [len(o.outputs[0].token_ids) for o in outputs] == [20, 3, 11, 1]
    for output, prompt, own in zip(outputs, PROMPTS, params, strict=True):
        (alone,) = llm.generate(prompt, own)
        assert alone.outputs == output.outputs
        assert output.finished and output.outputs[0].finish_reason == "length"


def test_all_forms_of_a_prompt_mean_the_same(llm: LLM) -> None:
    ids = llm.get_tokenizer()("The sky")["input_ids"]
    forms: list[Any] = [
        "The sky",
        {"prompt": "The sky"},
        ids,
        tuple(ids),
        np.array(ids),
        {"prompt_token_ids": ids},
        {"prompt": "ignored", "prompt_token_ids": ids},
    ]
    together = llm.generate(forms, GREEDY)
    alone = [llm.generate(form, GREEDY)[0] for form in forms]
    assert len({tuple(o.outputs[0].token_ids) for o in together + alone}) == 1
    assert all(o.prompt_token_ids == list(ids) for o in together)
    assert [o.prompt for o in together] == ["The sky"] * 2 + [None] * 4 + ["ignored"]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.chat([]) == []


def test_arguments_are_not_changed(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, stop=["x"], seed=1)
    prompts = [{"prompt": "The sky"}, {"prompt_token_ids": [5, 6]}]
    messages = [{"role": "user", "content": "hi"}]
    before = copy.deepcopy((params, prompts, messages))
    llm.generate(prompts, params)
    llm.chat(messages, params)
    list(llm.stream(messages, params))
    assert (params, prompts, messages) == before


@pytest.mark.parametrize(
    ("prompts", "error", "text"),
    [
        ("", ValueError, "empty"),
        ([[]], ValueError, "empty"),
        ([[1], [100000]], ValueError, "prompt 1: .*100000"),
        ([[-1]], ValueError, "-1"),
        ([[2**40]], ValueError, str(2**40)),
        ([[1] * 1000], ValueError, "1000"),
        ({"text": "x"}, ValueError, "text"),
        ({}, ValueError, "keys"),
        ({"prompt": None}, ValueError, "None"),
        ({"prompt": 3}, TypeError, "3"),
        (3, TypeError, "int"),
        (None, TypeError, "None"),
        ([["a", "b"]], TypeError, "'a'"),
        ([1, "a"], TypeError, "'a'"),
        ([1.5], TypeError, "1.5"),
    ],
)
def test_bad_prompts(llm: LLM, prompts: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        llm.generate(prompts, GREEDY)


def test_parameters_must_fit_the_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="1 sampling_params for 4 prompts"):
        llm.generate(PROMPTS, [GREEDY])
    for bad in ({"max_tokens": 3}, [1, 2, 3, 4], "abcd"):
        with pytest.raises(TypeError, match="SamplingParams"):
            llm.generate(PROMPTS, bad)  # type: ignore[arg-type]


def test_default_parameters_are_sampling_params_defaults(llm: LLM) -> None:
    (output,) = llm.generate("The sky")
    assert len(output.outputs[0].token_ids) <= 16


# Engine arguments


def test_unknown_engine_argument(tiny_model: Path) -> None:
    with pytest.raises(TypeError, match="'nm_threads'; did you mean 'num_threads'"):
        LLM(tiny_model, nm_threads=2)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_threads", -1, ValueError),
        ("num_threads", 2**40, ValueError),
        ("num_threads", "two", TypeError),
        ("kv_cache_bytes", -1, ValueError),
        ("max_model_len", 10**6, ValueError),
        ("max_num_seqs", 0, ValueError),
        ("block_size", 17, ValueError),
        ("dtype", "int4", ValueError),
        ("dtype", 16, TypeError),
        ("device", "tpu", ValueError),
        ("scheduling_policy", "random", ValueError),
        ("admission", "all", ValueError),
        ("safety", 1.5, ValueError),
        ("kv_watermark", 1.5, ValueError),
        ("max_pause", -1, ValueError),
        ("preempt_limit", -1, ValueError),
        ("promote_after", -1.5, ValueError),
        ("promote_per_token", "soon", TypeError),
        ("bucket_width", 0, ValueError),
        ("static_group", 0, ValueError),
        ("static_batch_size", 0, ValueError),
        ("recompute", "never", ValueError),
        ("tensor_parallel_plan", "magic", ValueError),
    ],
)
def test_bad_engine_argument(
    tiny_model: Path, name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=rf"{name}.*{value}"):
        LLM(tiny_model, **{name: value})


def test_policies_give_the_same_answers_and_report_themselves(tiny_model: Path) -> None:
    prompts = [{"prompt_token_ids": [1 + i, 5, 9]} for i in range(24)]
    params = [
        SamplingParams(
            max_tokens=8 + i,
            temperature=0,
            ignore_eos=True,
            expected_tokens=7 + i,
            detokenize=False,
        )
        for i in range(24)
    ]
    answers = []
    for policy in ("fcfs", "hrrn", "length_bucket", "longest_tail", "sjf", "static_bucket"):
        small = LLM(
            tiny_model, num_kv_blocks=9, max_num_seqs=6, scheduling_policy=policy, promote_after=30
        )
        outputs = small.generate(prompts, params)
        answers.append([output.outputs[0].token_ids for output in outputs])
        stats = small.stats
        accuracy = stats.length_accuracy
        assert (accuracy.count, accuracy.mae, accuracy.acc_50) == (24, 1.0, 1.0)
        assert accuracy.kendall_tau == 1.0
        assert stats.forecast_kv_blocks > 0
        assert 0 < stats.effective_token_ratio <= 1
        assert stats.num_preemptions == stats.evicted_for_decode + stats.evicted_for_prefill
        assert (stats.used_kv_blocks, stats.promised_kv_blocks, stats.num_waiting) == (0, 0, 0)
    assert all(answer == answers[0] for answer in answers)
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected_tokens"):
            SamplingParams(expected_tokens=bad)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        LLM(tmp_path / "nowhere")


def test_model_info(llm: LLM, tiny_model: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(tiny_model / "model.safetensors")
    info = llm.model_info
    assert (info.num_layers, info.hidden_size, info.max_model_len) == (2, 64, 256)
    assert info.parameters == sum(t.size for t in tensors.values())
    assert info.weight_bytes >= 4 * info.parameters
    assert (info.lowrank_matrices, info.dense_matrices) == (0, 14)


def test_two_models_in_one_process(llm: LLM, lowrank_model: Path) -> None:
    alone = texts(llm.generate(PROMPTS, GREEDY))
    other = LLM(lowrank_model, num_threads=2, kv_cache_bytes=1 << 20)
    assert other.model_info.lowrank_matrices == 3
    streams = [one.stream(PROMPTS[0], GREEDY) for one in (llm, other)]
    pairs = list(zip(*streams, strict=True))
    assert pairs[-1][0].outputs[0].text == alone[0]
    assert pairs[-1][1].outputs[0].text != alone[0]
    assert texts(llm.generate(PROMPTS, GREEDY)) == alone


def test_load_progress(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "deinfer.llm.report_to", lambda bar: lambda done, total: calls.append((done, total))
    )
    LLM(tiny_model, num_threads=1, kv_cache_bytes=1 << 20)
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] > 0


def test_interrupt_while_loading(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def report(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deinfer.llm.report_to", lambda bar: report)
    with pytest.raises(KeyboardInterrupt):
        LLM(tiny_model, num_threads=1, kv_cache_bytes=1 << 20)


def test_a_request_that_can_never_fit(tiny_model: Path) -> None:
    small = LLM(tiny_model, num_threads=1, num_kv_blocks=4, block_size=16)
    with pytest.raises(MemoryError, match="prompt 1: .*the pool has 4"):
        small.generate([[3] * 10, [3] * 100], GREEDY)
    # Together they need more than there is: they take turns.
    outputs = small.generate([[3 + i] * 40 for i in range(4)], GREEDY)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [12] * 4


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


# Text


def test_text_is_the_decoded_tokens(llm: LLM) -> None:
    params = SamplingParams(n=16, temperature=3.0, seed=5, max_tokens=60, ignore_eos=True)
    for skip in (True, False):
        params.skip_special_tokens = skip
        for sample in llm.generate("The sky", params)[0].outputs:
            decoded = llm.get_tokenizer().decode(sample.token_ids, skip_special_tokens=skip)
            assert sample.text == decoded


def test_tokens_alone_need_no_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path, 50)
    bare = LLM(tmp_path, num_threads=1, kv_cache_bytes=1 << 20)
    (output,) = bare.generate([[3, 4, 5]], SamplingParams(max_tokens=4, logprobs=1, seed=0))
    assert output.outputs[0].text == "" and output.outputs[0].token_ids
    assert output.outputs[0].logprobs is not None
    assert next(iter(output.outputs[0].logprobs[0].values())).decoded_token is None
    for call in (
        lambda: bare.generate("text"),
        lambda: bare.generate([[3]], SamplingParams(stop="x")),
        lambda: bare.chat([{"role": "user", "content": "x"}]),
        bare.get_tokenizer,
    ):
        with pytest.raises(FileNotFoundError, match="no tokenizer"):
            call()
    assert bare.generate([[3, 4]], SamplingParams(max_tokens=1))[0].finished


def test_a_tokenizer_from_elsewhere(tmp_path: Path, tiny_model: Path, llm: LLM) -> None:
    write_model(tmp_path, llm.model_info.vocab_size)
    for tokenizer in (tiny_model, str(tiny_model), llm.get_tokenizer()):
        other = LLM(tmp_path, tokenizer=tokenizer, num_threads=1, kv_cache_bytes=1 << 20)
        assert texts(other.generate("The sky", GREEDY)) == texts(llm.generate("The sky", GREEDY))


def test_chat_uses_the_template(llm: LLM) -> None:
    one = [{"role": "user", "content": "Why is the sky blue?"}]
    two = [{"role": "system", "content": "Be brief."}, *one]
    outputs = llm.chat([one, two], GREEDY)
    rendered = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
    assert outputs[0].prompt == f"{rendered}<|im_start|>assistant\n"
    assert outputs[1].prompt == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n{rendered}<|im_start|>assistant\n"
    )
    assert outputs[0].prompt_token_ids.count(1) == 2
    assert llm.chat(one, GREEDY)[0].outputs == outputs[0].outputs
    (bare,) = llm.chat(one, GREEDY, add_generation_prompt=False)
    assert bare.prompt == rendered
    (own,) = llm.chat(one, GREEDY, chat_template="{{ messages[0].content }}{{ end }}!")
    assert own.prompt == "Why is the sky blue?!"
    (own,) = llm.chat(
        one, GREEDY, chat_template="{{ word }}!", chat_template_kwargs={"word": "hello"}
    )
    assert own.prompt == "hello!"


def test_chat_errors(llm: LLM) -> None:
    with pytest.raises(ValueError, match="empty"):
        llm.chat([[]], GREEDY)
    with pytest.raises(ValueError, match="no system here"):
        llm.chat(
            [{"role": "user", "content": "x"}],
            GREEDY,
            chat_template="{{ raise_exception('no system here') }}",
        )


def test_chat_without_a_template(tmp_path: Path) -> None:
    from conftest import write_tokenizer

    write_model(tmp_path, write_tokenizer(tmp_path, chat_template=None))
    bare = LLM(tmp_path, num_threads=1, kv_cache_bytes=1 << 20)
    with pytest.raises(ValueError, match="no chat template"):
        bare.chat([{"role": "user", "content": "x"}])


# Streaming and interrupts


@pytest.mark.parametrize("stop", [None, "e", " t"])
def test_stream_equals_generate(llm: LLM, stop: str | None) -> None:
    params = SamplingParams(
        n=2, temperature=1.0, seed=11, max_tokens=40, ignore_eos=True, stop=stop, logprobs=1
    )
    (whole,) = llm.generate("The sky", params)
    cumulative = list(llm.stream("The sky", params))
    assert cumulative[-1].outputs == whole.outputs
    assert [o.finished for o in cumulative] == [False] * (len(cumulative) - 1) + [True]
    for before, after in zip(cumulative, cumulative[1:], strict=False):
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert new.text.startswith(old.text)
            assert new.token_ids[: len(old.token_ids)] == old.token_ids
    deltas = [o.outputs for o in llm.stream("The sky", params, delta=True)]
    for index, sample in enumerate(whole.outputs):
        parts = [outputs[index] for outputs in deltas]
        assert "".join(part.text for part in parts) == sample.text
        assert [t for part in parts for t in part.token_ids] == sample.token_ids
        assert [e for part in parts for e in part.logprobs or []] == sample.logprobs
        assert parts[-1].finish_reason == sample.finish_reason


def test_stream_of_a_conversation(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert list(llm.stream(messages, GREEDY))[-1].outputs == llm.chat(messages, GREEDY)[0].outputs


def test_stream_checks_at_the_call(llm: LLM) -> None:
    with pytest.raises(ValueError, match="one prompt, not 2"):
        llm.stream(["a", "b"], GREEDY)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="SamplingParams"):
        llm.stream("a", 3)  # type: ignore[arg-type]


def test_closing_a_stream_drops_its_request(llm: LLM) -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True, n=2)
    stream = llm.stream("The sky", params)
    next(stream)
    stream.close()
    assert not llm._engine.has_unfinished_requests()
    unused = llm.stream("The sky", params)
    del unused
    assert not llm._engine.has_unfinished_requests()


def test_streams_and_batches_interleave(llm: LLM) -> None:
    alone = texts(llm.generate(PROMPTS, GREEDY))
    first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
    next(first)
    next(second)
    assert texts(llm.generate(PROMPTS[2:], GREEDY)) == alone[2:]
    assert list(second)[-1].outputs[0].text == alone[1]
    assert list(first)[-1].outputs[0].text == alone[0]


def test_threads_share_one_model(llm: LLM) -> None:
    alone = texts(llm.generate(PROMPTS, GREEDY))
    results: dict[int, str] = {}

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = texts(llm.generate(PROMPTS[i], GREEDY))[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(len(PROMPTS))] == alone


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_interrupt_in_generate(llm: LLM, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    alone = texts(llm.generate(PROMPTS, GREEDY))
    free = llm.stats.free_kv_blocks
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(llm, "_engine", Interrupting(llm._engine, steps))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, SamplingParams(n=2, max_tokens=100, ignore_eos=True))
    # Another caller's request goes on; those of the interrupted call are gone.
    assert list(stream)[-1].outputs[0].text == alone[0]
    assert not llm._requests
    assert texts(llm.generate(PROMPTS, GREEDY)) == alone
    assert llm.stats.num_running == llm.stats.num_waiting == 0
    assert llm.stats.free_kv_blocks == free


def test_interrupt_in_stream(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm, "_engine", Interrupting(llm._engine, 3))
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream("The sky", GREEDY))
    assert not llm._engine.has_unfinished_requests()
    assert llm.generate("The sky", GREEDY)[0].finished


def test_a_request_that_no_one_knows_is_dropped(llm: LLM) -> None:
    """As when an interrupt hits between submit and its registration."""
    llm._engine.submit([3, 4], SamplingParams(max_tokens=200, ignore_eos=True))
    llm.generate("The sky", GREEDY)
    assert not llm._engine.has_unfinished_requests()


def test_failing_submission_drops_the_others(llm: LLM) -> None:
    with pytest.raises(ValueError, match="prompt 1"):
        llm.generate([[3], [10**6]], GREEDY)
    assert not llm._engine.has_unfinished_requests()


# Evaluation


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


def test_outputs_are_frozen(llm: LLM) -> None:
    (output,) = llm.generate("The sky", GREEDY)
    assert isinstance(output.outputs[0], CompletionOutput) and output.outputs[0].finished()
    with pytest.raises(AttributeError):
        output.finished = False  # type: ignore[misc]

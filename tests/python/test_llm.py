"""`LLM` on a tiny random model, through the real native module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deinfer import LLM, CompletionOutput, SamplingParams
from llm_helpers import GREEDY, PROMPTS, texts

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


def test_a_device_that_is_not_there_is_an_error(tiny_model: Path) -> None:
    assert LLM(tiny_model, device="auto", dtype="bfloat16").generate([1, 2])
    with pytest.raises((NotImplementedError, ValueError), match=r'device="cuda:999"'):
        LLM(tiny_model, device="cuda:999")


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
        ("device", "cuda:one", ValueError),
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


def test_outputs_are_frozen(llm: LLM) -> None:
    (output,) = llm.generate("The sky", GREEDY)
    assert isinstance(output.outputs[0], CompletionOutput) and output.outputs[0].finished()
    with pytest.raises(AttributeError):
        output.finished = False  # type: ignore[misc]

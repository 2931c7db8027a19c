"""Text, conversations, streams and interrupts of `LLM` on a tiny random model."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from conftest import write_model
from deinfer import LLM, SamplingParams
from llm_helpers import GREEDY, PROMPTS, Interrupting, texts

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

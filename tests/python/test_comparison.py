"""Two models side by side, as `deinfer eval --compare` measures them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_model, write_tokenizer
from deinfer import LLM, compare, perplexity
from deinfer.cli import main
from deinfer.evaluate import window_spans

TEXT = "The capital of France is Paris, and the sky is blue. " * 4
ENGINE: dict[str, Any] = {"num_threads": 1, "kv_cache_bytes": 1 << 22, "use_tqdm_on_load": False}


@pytest.fixture(scope="module")
def other(lowrank_model: Path) -> LLM:
    return LLM(lowrank_model, **ENGINE)


class Recorder:
    """A model that notes the prompts whose logits are asked for."""

    def __init__(self, llm: LLM) -> None:
        self.lengths: list[int] = []
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def prompt_logits(self, token_ids: Sequence[int]) -> Any:
        self.lengths.append(len(token_ids))
        return self._llm.prompt_logits(token_ids)


def probabilities(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.longdouble))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(("window", "stride"), [(None, None), (16, 8), (40, 5)])
def test_what_is_reported_is_what_float64_says(
    llm: LLM, other: LLM, window: int | None, stride: int | None
) -> None:
    result = compare(llm, other, TEXT, window=window, stride=stride)
    ids = llm.get_tokenizer()(TEXT)["input_ids"]
    kl, agreed, losses = [], [], []
    for begin, first, end in window_spans(len(ids), result.window, result.stride):
        p, q = (probabilities(model.prompt_logits(ids[begin:end])) for model in (llm, other))
        for token in range(first, end):
            row = token - 1 - begin
            kl.append(float((p[row] * np.log(p[row] / q[row])).sum()))
            agreed.append(p[row].argmax() == q[row].argmax())
            losses.append([-np.log(x[row, ids[token]]) for x in (p, q)])
    assert result.tokens == len(kl) == len(ids) - 1
    assert result.kl == pytest.approx(np.mean(kl), rel=1e-10) and result.kl > 0.1
    assert result.kl_max == pytest.approx(max(kl), rel=1e-10)
    assert result.agreement == np.mean(agreed) < 1
    mine, theirs = np.exp(np.mean(np.asarray(losses, np.float64), axis=0))
    assert result.perplexity == pytest.approx(mine, rel=1e-10)
    assert result.other_perplexity == pytest.approx(theirs, rel=1e-10)
    assert result.perplexity_ratio == pytest.approx(theirs / mine, rel=1e-10)
    alone = perplexity(other, TEXT, window=result.window, stride=result.stride)
    assert result.other_perplexity == pytest.approx(alone.perplexity, rel=1e-5)


def test_the_direction_is_from_model_to_other(llm: LLM, other: LLM) -> None:
    forth, back = compare(llm, other, TEXT, window=64), compare(other, llm, TEXT, window=64)
    assert forth.kl != pytest.approx(back.kl, rel=1e-3)
    assert forth.perplexity_ratio == pytest.approx(1 / back.perplexity_ratio)
    assert (forth.perplexity, forth.agreement) == (back.other_perplexity, back.agreement)


def test_a_model_is_no_distance_from_itself(llm: LLM) -> None:
    result = compare(llm, llm, TEXT, window=32)
    assert (result.kl, result.kl_max, result.agreement) == (0.0, 0.0, 1.0)
    assert result.perplexity_ratio == 1.0


def test_no_more_than_a_window_is_held(llm: LLM, other: LLM) -> None:
    recorders = Recorder(llm), Recorder(other)
    compare(*recorders, TEXT, window=24, stride=6)  # type: ignore[arg-type]
    for recorder in recorders:
        assert max(recorder.lengths) == 24 and len(recorder.lengths) > 5


def test_other_vocabularies_are_refused(llm: LLM, tmp_path: Path) -> None:
    write_model(tmp_path / "larger", llm.model_info.vocab_size + 1)
    with pytest.raises(ValueError, match="vocabularies: 4.. and 4.. tokens"):
        compare(llm, LLM(tmp_path / "larger", **ENGINE), TEXT)
    write_model(tmp_path / "renamed", write_tokenizer(tmp_path / "renamed"))
    file = tmp_path / "renamed" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = llm.get_tokenizer().tokenize(TEXT)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizers differ at token 0"):
        compare(llm, LLM(tmp_path / "renamed", **ENGINE), TEXT)


def test_bad_arguments(llm: LLM, other: LLM) -> None:
    for arguments in ({"window": 1}, {"window": 256}, {"window": 8, "stride": 8}):
        with pytest.raises(ValueError, match="window"):
            compare(llm, other, TEXT, **arguments)
    with pytest.raises(ValueError, match="tokens"):
        compare(llm, other, "")


def test_the_command(
    tiny_model: Path, lowrank_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    command = ["eval", str(tiny_model), "--text", str(file), "--num-threads", "1"]
    command += ["--kv-cache-bytes", str(1 << 22), "--window", "64"]
    both = [*command, "--compare", str(lowrank_model)]
    assert main([*both, "--speed-rounds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kl"] > 0 and report["model"] == str(tiny_model)
    assert report["other"] == str(lowrank_model) and len(report["speed"]) == 2
    assert report["speed"][0]["prefill"] > 0 and set(report["speed"][1]["decode"]) == {"1", "16"}
    assert report["weight_bytes"][1] < report["weight_bytes"][0]
    assert main([*both, "--speed-rounds", "0"]) == 0
    text = capsys.readouterr().out
    assert "KL(model || other)" in text and "perplexity" in text and "prefill" not in text
    for arguments, message in (
        ([*command, "--speed-rounds", "2"], "needs --compare"),
        ([*both, "--speed-rounds", "-1"], "-1 is negative"),
        ([*command, "--compare", "/nowhere"], "'/nowhere' is not a directory"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err

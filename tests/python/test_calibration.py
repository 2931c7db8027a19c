"""Calibration text, statistics and the batches of recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from decompose_helpers import random_sampler  # noqa: E402
from deinfer.decompose import METHODS, load_reference  # noqa: E402
from deinfer.decompose.calibration import (  # noqa: E402
    RuntimeSampler,
    packaged_lines,
    sample_calibration,
)
from deinfer.decompose.checkpoint import linear_names, read_config  # noqa: E402
from deinfer.decompose.factorize import compact_moments, shrink  # noqa: E402
from deinfer.decompose.method import INPUT_SHRINKAGE, OUTPUT_SHRINKAGE  # noqa: E402
from deinfer.decompose.source import SourceCheckpoint  # noqa: E402
from deinfer.decompose.statistics import LayerStatistics, Needs  # noqa: E402
from deinfer.decompose.streaming import StreamedModel  # noqa: E402
from deinfer.decompose.sweep import Sweep  # noqa: E402
from deinfer.decompose.texts import read_sequences  # noqa: E402
from deinfer.decompose.workdir import WorkDirectory  # noqa: E402
from torch import Tensor, nn  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_swept_statistics_match_autograd(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block come the same moments as from gradients of the whole model."""
    model = load_reference(dense, torch.float64)
    names = linear_names(read_config(dense))
    sequences = random_sampler(["a", "b", "c"])
    got: dict[str, LayerStatistics] = {}

    def keep_statistics(_: Sweep, index: int, block: Any, found: dict[str, Any]) -> None:
        got.update({f"model.layers.{index}.{leaf}": value for leaf, value in found.items()})

    monkeypatch.setattr(Sweep, "_factorize", keep_statistics)
    Sweep(
        StreamedModel(SourceCheckpoint(dense), torch.float64),
        WorkDirectory(tmp_path),
        sequences,
        method=METHODS["two_sided"],
        needs=Needs(inputs=True, outputs=True, powers=True),
        rank_multiple=4,
        keep_inputs=False,
        progress=False,
    ).run()
    assert sorted(got) == sorted(names)
    xs: dict[str, list[Tensor]] = {name: [] for name in names}
    gs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            xs[name].append(inputs[0][0].detach())
            output.register_hook(lambda grad: gs[name].append(grad[0]))

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    for sequence in sequences:
        ids = torch.tensor([sequence])
        embedded = model.get_input_embeddings()(ids).requires_grad_(True)
        logits = model(inputs_embeds=embedded).logits[0, :-1]
        nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    for name in names:
        x, g = torch.cat(xs[name]), torch.cat(gs[name])
        weight = model.get_submodule(name).weight
        want = compact_moments(weight, x.T @ x / len(x), g.T @ g / len(g))
        found = METHODS["two_sided"].moments(weight, got[name])
        shrunk = shrink(weight, want, INPUT_SHRINKAGE, OUTPUT_SHRINKAGE)
        for key in ("own", "seen", "own_power", "seen_power"):
            torch.testing.assert_close(
                torch.as_tensor(getattr(found, key)), torch.as_tensor(getattr(shrunk, key))
            )


class FakeRuntime:
    """Stands in for `deinfer.LLM`."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def chat(self, conversations: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        """Answer with as many tokens as the prompt has words."""
        return self.generate([c[0]["content"] for c in conversations], params, use_tqdm)

    def generate(self, prompts: list[str], params: list[Any], use_tqdm: bool) -> list[Any]:
        """Return vLLM-shaped outputs."""
        from types import SimpleNamespace as Box

        self.seeds += [p["seed"] for p in params]
        return [
            Box(prompt_token_ids=[1, 2], outputs=[Box(token_ids=[3] * len(p.split()))])
            for p in prompts
        ]


def test_runtime_sampler_mixes_chat_and_plain_text() -> None:
    sampler = RuntimeSampler.__new__(RuntimeSampler)
    sampler._llm, sampler._params, sampler._seed = FakeRuntime(), dict, 5
    sampler._progress = False
    calibration = sample_calibration(sampler, 600)
    assert 0.9 * 600 <= calibration.tokens <= 600
    assert calibration.source == "self-sampled"
    assert len(set(sampler._llm.seeds)) == len(sampler._llm.seeds)


class Words:
    """A tokenizer with a token a word."""

    chat_template = "present"

    def __init__(self, start: list[int]) -> None:
        self.start = start

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Number the words."""
        ids = [100 + i for i in range(len(text.split()))]
        return {"input_ids": [*self.start, *ids] if add_special_tokens else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        """Join role and content."""
        assert not tokenize
        return " ".join(f"{m['role']} {m['content']}" for m in messages)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Words:
    tokenizer = Words([])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: tokenizer)
    return tokenizer


def test_plain_text(dense: Path, tmp_path: Path, words: Words) -> None:
    file = tmp_path / "text.txt"
    file.write_text("word " * 2000)
    sequences = read_sequences(file, dense, 1100, 0)
    assert [len(s) for s in sequences] == [512, 512, 76]
    assert all(s[-1] - s[0] == len(s) - 1 for s in sequences)
    assert sequences[1][0] - sequences[0][-1] > 1  # spread over the file
    assert sum(map(len, read_sequences(file, dense, 2000, 0))) == 2000
    with pytest.raises(ValueError, match=r"2000 tokens.*2001"):
        read_sequences(file, dense, 2001, 0)
    with pytest.raises(ValueError, match="not a file"):
        read_sequences(tmp_path / "none.txt", dense, 10, 0)
    with pytest.raises(ValueError, match="calibration_tokens 1 "):
        read_sequences(file, dense, 1, 0)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_sequences(file, dense, 10, 0)


def test_sequences_start_as_the_tokenizer_starts_them(
    dense: Path, tmp_path: Path, words: Words
) -> None:
    words.start = [7]
    file = tmp_path / "text.txt"
    file.write_text("word " * 2000)
    sequences = read_sequences(file, dense, 1100, 0)
    assert [len(s) for s in sequences] == [512, 512, 76]
    assert all(s[0] == 7 and 7 not in s[1:] for s in sequences)


def test_json_lines(dense: Path, tmp_path: Path, words: Words) -> None:
    import json

    entries = [
        {"text": "a b c d"},
        {"messages": [{"role": "user", "content": "x y"}, {"role": "assistant", "content": "z"}]},
        {"prompt": "p q"},
        {"prompt": "p", "response": "q r s t"},
        {"text": "w " * 600},
    ]
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps(e) for e in entries) + "\n\n")
    sequences = read_sequences(file, dense, 619, 0)
    assert sorted(len(s) for s in sequences) == [3, 4, 5, 7, 88, 512]
    assert sequences == read_sequences(file, dense, 619, 0)
    assert sequences != read_sequences(file, dense, 619, 1)
    for line, message in (
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"body": "x"}', 'line 2: no "text"'),
        ('{"messages": [{"role": "user"}]}', 'line 2: no "text"'),
    ):
        file.write_text('{"text": "a b"}\n' + line)
        with pytest.raises(ValueError, match=message):
            read_sequences(file, dense, 2, 0)
    words.chat_template = ""
    file.write_text('{"prompt": "a b"}')
    with pytest.raises(ValueError, match="line 1: the model has no chat template"):
        read_sequences(file, dense, 2, 0)


def test_packaged_data() -> None:
    assert len(packaged_lines("calibration_prompts.txt")) >= 64
    assert 2500 <= sum(len(x.split()) for x in packaged_lines("heldout.txt")) <= 4000


def test_calibration_prompts_do_not_rehearse_the_demo() -> None:
    from deinfer.demo import QUESTIONS

    def content(text: str) -> set[str]:
        common = {
            "what",
            "which",
            "with",
            "that",
            "this",
            "from",
            "three",
            "explain",
            "give",
            "about",
        }
        words = {word.strip(".,?!'\"").lower() for word in text.split()}
        return (
            {word for word in words if len(word) > 2} - common - {"the", "and", "for", "why", "how"}
        )

    for line in [
        *packaged_lines("calibration_prompts.txt"),
        *packaged_lines("calibration_openers.txt"),
    ]:
        for question in QUESTIONS:
            assert not content(line) & content(question), (line, question)

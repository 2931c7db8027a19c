"""Calibration text, statistics and the batches of recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from decompose_helpers import random_sampler  # noqa: E402
from deinfer.decompose import load_reference  # noqa: E402
from deinfer.decompose.calibration import (  # noqa: E402
    RuntimeSampler,
    packaged_lines,
    sample_calibration,
    text_calibration,
)
from deinfer.decompose.checkpoint import linear_names, read_config  # noqa: E402
from deinfer.decompose.factorize import compact_moments  # noqa: E402
from deinfer.decompose.statistics import collect_moments  # noqa: E402
from torch import Tensor, nn  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_collected_moments_match_autograd(dense: Path) -> None:
    """Hooks give the same moments as per-token gradients taken one by one."""
    model = load_reference(dense, torch.float64)
    names = [n for n in linear_names(read_config(dense)) if "layers.1" in n]
    linears = {n: model.get_submodule(n) for n in names}
    sequences = random_sampler(["a", "b", "c"])
    got = collect_moments(model, linears, sequences, progress=False)
    xs: list[Tensor] = []
    gs: list[Tensor] = []

    def keep(_: nn.Module, inputs: Any, output: Any) -> None:
        xs.append(inputs[0][0].detach())
        output.register_hook(lambda grad: gs.append(grad[0]))

    for name, layer in linears.items():
        xs.clear()
        gs.clear()
        handle = layer.register_forward_hook(keep)
        for sequence in sequences:
            ids = torch.tensor([sequence])
            embedded = model.get_input_embeddings()(ids).requires_grad_(True)
            logits = model(inputs_embeds=embedded).logits[0, :-1]
            nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        handle.remove()
        x, g = torch.cat(xs), torch.cat(gs)
        want = compact_moments(layer.weight, x.T @ x / len(x), g.T @ g / len(g))
        for key in ("own", "seen", "own_power", "seen_power"):
            torch.testing.assert_close(
                torch.as_tensor(getattr(got[name], key)),
                torch.as_tensor(getattr(want, key)),
                rtol=1e-4,
                atol=1e-8,
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


def test_text_calibration(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text.split())))}

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: Words())
    file = tmp_path / "text.txt"
    file.write_text("word " * 2000)
    calibration = text_calibration(file, dense, 1100)
    assert [len(s) for s in calibration.sequences] == [512, 512, 76]
    assert all(s[-1] - s[0] == len(s) - 1 for s in calibration.sequences)
    with pytest.raises(ValueError, match="2000 tokens.*2001"):
        text_calibration(file, dense, 2001)
    with pytest.raises(ValueError, match="not a file"):
        text_calibration(tmp_path / "none.txt", dense, 10)


def test_packaged_data() -> None:
    assert len(packaged_lines("calibration_prompts.txt")) >= 64
    assert 2500 <= sum(len(x.split()) for x in packaged_lines("heldout.txt")) <= 4000


def test_recovery_batches_cover_the_sequences_in_order_of_the_seed() -> None:
    from deinfer.decompose.recover import STEP_TOKENS, batches

    sequences = [[i] * (40 + i) for i in range(1, 30)]
    groups = batches(sequences, 12, seed=3)
    assert len(groups) == 12
    for ids, valid in groups:
        assert int(valid.sum()) <= STEP_TOKENS
        for row, mask in zip(ids.tolist(), valid.tolist(), strict=True):
            tokens = [t for t, m in zip(row, mask, strict=True) if m]
            assert tokens == sequences[tokens[0] - 1]
    again = batches(sequences, 12, seed=3)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(groups, again, strict=True))


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

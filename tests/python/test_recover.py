"""Recovery: distillation of the dense model into its decomposed copy."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from checkpoints import write_model  # noqa: E402
from decompose_helpers import tiny_llama  # noqa: E402
from deinfer.decompose import decompose_model, load_reference  # noqa: E402
from deinfer.decompose import recover as recover_module  # noqa: E402
from deinfer.decompose.examples import Example, ExampleSampler, run_examples  # noqa: E402
from deinfer.decompose.recover import STEP_TOKENS, batches, recover  # noqa: E402
from deinfer.decompose.reference import install_factors  # noqa: E402
from deinfer.decompose.source import SourceCheckpoint  # noqa: E402
from deinfer.decompose.streaming import StreamedModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SEQUENCES = [[int(t) for t in np.random.default_rng(i).integers(3, 90, 60)] for i in range(24)]


def sampler(prompts: list[str]) -> list[list[int]]:
    return (SEQUENCES * (1 + len(prompts) // len(SEQUENCES)))[: len(prompts)]


def test_batches_use_all_text_once_and_then_ask_for_more() -> None:
    lengths = [40 + i * i % 90 for i in range(70)]
    states = torch.zeros(1, 4)
    rounds = [[Example([r, i] * (n // 2), states) for i, n in enumerate(lengths)] for r in range(3)]
    nothing = Example([7, 7], states[:0])

    def groups(seed: int) -> list[list[Example]]:
        made = iter(rounds)
        groups = batches(lambda: [nothing, *next(made)], seed)
        return list(itertools.islice(groups, 2 * sum(lengths) // STEP_TOKENS))

    taken = [example.ids[:2] for group in groups(3) for example in group]
    for r in range(len(taken) // len(lengths)):
        part = taken[r * len(lengths) : (r + 1) * len(lengths)]
        assert sorted(part) == [[r, i] for i in range(len(lengths))]
    assert len(taken) > len(lengths)
    valid = padded = 0
    for group in groups(3):
        assert sum(map(len, group)) <= STEP_TOKENS
        valid += sum(map(len, group))
        padded += len(group) * max(map(len, group))
    assert valid > 0.85 * padded
    order = [[example.ids for example in group] for group in groups(3)]
    assert order == [[example.ids for example in group] for group in groups(3)]
    assert order != [[example.ids for example in group] for group in groups(4)]
    with pytest.raises(ValueError, match="none of 1 sequences"):
        next(batches(lambda: [nothing], 0))


def test_an_example_is_cut_with_its_states() -> None:
    example = Example([5, 6, 7, 8, 9], torch.arange(3.0)[:, None])  # of 7, 8 and 9
    for tokens, states in ((5, 3), (4, 2), (3, 1), (2, 0), (1, 0)):
        cut = example[:tokens]
        assert cut.ids == [5, 6, 7, 8, 9][:tokens]
        assert cut.states.flatten().tolist() == [0.0, 1.0, 2.0][:states]


def test_the_runtime_s_states_are_those_of_the_dense_model(tiny_model: Path) -> None:
    model = StreamedModel(SourceCheckpoint(tiny_model), torch.float32)
    sampler = ExampleSampler(tiny_model, len(model.prefixes), seed=3)
    examples = sampler.sample(1500, seed=1)
    assert 0.9 * 1500 <= sum(map(len, examples)) <= 1500
    whole = run_examples(model, [example.ids for example in examples])
    answered = 0
    for example, want in zip(examples, whole, strict=True):
        assert len(example.states) <= len(example)
        want = want.states[len(want) - len(example.states) :]
        # The runtime's weights and sums are bf16's.
        distance = torch.linalg.vector_norm(example.states - want)
        assert distance <= 0.02 * torch.linalg.vector_norm(want) + 1e-9
        answered += len(example.states)
    assert answered > 0.5 * sum(map(len, examples))


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_gradient_is_that_of_the_divergence(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of the head, padding and soft caps change nothing."""
    # In float32, on CPUs with bf16 too.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    path = write_model(tmp_path / "dense", family=family)
    teacher = StreamedModel(SourceCheckpoint(path), torch.float32)
    dense, student = load_reference(path), load_reference(path)
    student.requires_grad_(False)
    weight = student.get_decoder().layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.requires_grad_()
    sequences = [s[:n] for s, n in zip(SEQUENCES, (50, 60, 23), strict=False)]
    examples = run_examples(teacher, sequences)
    examples[1] = Example(sequences[1], examples[1].states[-20:])
    ids, valid = recover_module._padded(examples)
    with teacher.ends():
        target = torch.cat([example.states for example in examples])
        got = recover_module._follow(student, teacher.head, ids, valid, target)
    gradient, weight.grad = weight.grad, None
    want = torch.zeros(())
    for example in examples:
        tokens, rows = torch.tensor([example.ids]), len(example.states)
        p, q = (model(tokens).logits[0, -rows:].log_softmax(-1) for model in (dense, student))
        want = want + (p.exp() * (p - q)).sum()
    want = want / len(target)
    want.backward()
    assert got == pytest.approx(want.item(), rel=1e-4)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)


def test_recovery_brings_the_factors_closer_to_the_dense_model(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense")

    def distance(path: Path) -> float:
        ids = torch.tensor(SEQUENCES[:8])
        with torch.no_grad():
            dense = load_reference(source)(ids).logits.log_softmax(-1)
            low = load_reference(path)(ids).logits.log_softmax(-1)
        return float((dense.exp() * (dense - low)).sum(-1).mean())

    options: Any = {"keep": 0.5, "rank_multiple": 4, "sampler": sampler, "progress": False}
    options["calibration_tokens"] = 600
    decompose_model(source, tmp_path / "plain", **options)
    report = decompose_model(source, tmp_path / "recovered", recover_steps=24, **options)
    assert distance(tmp_path / "recovered") < 0.98 * distance(tmp_path / "plain")
    written = json.loads((tmp_path / "recovered" / "config.json").read_text())["low_rank"]
    assert written["recovery_steps"] == 24
    assert report.recovery["steps"] == 24
    assert report.recovery["last_loss"] < report.recovery["first_loss"]
    decompose_model(source, tmp_path / "again", recover_steps=24, **options)
    files = [tmp_path / d / "model.safetensors" for d in ("recovered", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_biases_stay_and_norms_move(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense", attention_bias=True)
    options: Any = {"keep": 0.5, "rank_multiple": 4, "sampler": sampler, "progress": False}
    report = decompose_model(
        source, tmp_path / "low", recover_steps=80, calibration_tokens=600, **options
    )
    got, was = load_reference(tmp_path / "low"), load_reference(source)
    name = next(n for n, rank in report.ranks.items() if rank and "attn" in n)
    assert torch.equal(got.get_submodule(name).u.bias, was.get_submodule(name).bias)
    assert not torch.equal(got.model.norm.weight, was.model.norm.weight)
    assert torch.equal(got.model.embed_tokens.weight, was.model.embed_tokens.weight)


def test_minutes_end_when_they_are_over(tmp_path: Path) -> None:
    """The clock is the test's: every look at it takes a second."""
    from deinfer.decompose.checkpoint import Factors

    source = tiny_llama(tmp_path / "dense")
    name = "model.layers.0.mlp.up_proj"
    student = load_reference(source)
    install_factors(student, {name: Factors(torch.randn(80, 4), torch.randn(4, 48))}, torch.float32)
    teacher = StreamedModel(SourceCheckpoint(source), torch.float32)
    examples, asked = run_examples(teacher, SEQUENCES), []

    def text(tokens: int) -> list[Example]:
        asked.append(tokens)
        return examples[:16]

    with teacher.ends():
        made = recover(
            student,
            teacher.head,
            text,
            seconds=10.0,
            progress=False,
            clock=iter(range(100)).__next__,
        )
    assert 4 <= made.steps <= 10
    assert len(asked) >= 2 and asked[-1] < asked[1]  # less is wanted as the time runs out
    assert set(made.factors) == {name} and "model.norm.weight" in made.weights


def test_bad_arguments(tmp_path: Path) -> None:
    for changes in ({}, {"steps": 3, "seconds": 1.0}, {"steps": -1}):
        with pytest.raises(ValueError, match="recovery needs steps"):
            recover(None, lambda rows: rows, lambda tokens: [], **changes)
    source = tiny_llama(tmp_path / "dense")
    for changes, message in (
        ({"recover_steps": -1}, "-1 steps"),
        ({"recover_minutes": -2.0}, "-2.0 minutes"),
        ({"recover_minutes": 1.0, "recover_steps": 1}, "cannot both"),
    ):
        with pytest.raises(ValueError, match=message):
            decompose_model(source, tmp_path / "bad", **changes)

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
from deinfer.decompose.recover import STEP_TOKENS, batches, recover  # noqa: E402
from deinfer.decompose.reference import install_factors  # noqa: E402
from deinfer.decompose.source import SourceCheckpoint  # noqa: E402
from deinfer.decompose.streaming import StreamedModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SEQUENCES = [[int(t) for t in np.random.default_rng(i).integers(3, 90, 60)] for i in range(24)]


def sampler(prompts: list[str]) -> list[list[int]]:
    return (SEQUENCES * (1 + len(prompts) // len(SEQUENCES)))[: len(prompts)]


def test_batches_cover_the_sequences_in_order_of_the_seed() -> None:
    lengths = [40 + i * i % 90 for i in range(70)]
    groups = list(itertools.islice(batches(lengths, seed=3), 80))
    taken = [i for group in groups for i in group]
    for first in range(0, len(taken) - len(lengths), len(lengths)):
        assert sorted(taken[first : first + len(lengths)]) == list(range(len(lengths)))
    valid = padded = 0
    for group in groups:
        assert sum(lengths[i] for i in group) <= STEP_TOKENS
        valid += sum(lengths[i] for i in group)
        padded += len(group) * max(lengths[i] for i in group)
    assert valid > 0.85 * padded
    assert groups == list(itertools.islice(batches(lengths, seed=3), 80))
    assert groups != list(itertools.islice(batches(lengths, seed=4), 80))


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
    streams = teacher.run(teacher.embed_all(sequences))
    ids, valid = recover_module._padded(sequences)
    with teacher.ends():
        got = recover_module._follow(student, teacher.logits, ids, valid, torch.cat(streams))
    gradient, weight.grad = weight.grad, None
    want = torch.zeros(())
    for sequence in sequences:
        tokens = torch.tensor([sequence])
        p, q = (model(tokens).logits[0].log_softmax(-1) for model in (dense, student))
        want = want + (p.exp() * (p - q)).sum()
    want = want / sum(map(len, sequences))
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
    streams = teacher.run(teacher.embed_all(SEQUENCES))
    with teacher.ends():
        made = recover(
            student,
            teacher.logits,
            SEQUENCES,
            streams,
            seconds=10.0,
            progress=False,
            clock=iter(range(100)).__next__,
        )
    assert 8 <= made.steps <= 10
    assert set(made.factors) == {name} and "model.norm.weight" in made.weights


def test_bad_arguments(tmp_path: Path) -> None:
    for changes in ({}, {"steps": 3, "seconds": 1.0}, {"steps": -1}):
        with pytest.raises(ValueError, match="recovery needs steps"):
            recover(None, lambda rows: rows, SEQUENCES, [], **changes)
    source = tiny_llama(tmp_path / "dense")
    for changes, message in (
        ({"recover_steps": -1}, "-1 steps"),
        ({"recover_minutes": -2.0}, "-2.0 minutes"),
        ({"recover_minutes": 1.0, "recover_steps": 1}, "cannot both"),
    ):
        with pytest.raises(ValueError, match=message):
            decompose_model(source, tmp_path / "bad", **changes)

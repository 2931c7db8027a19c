"""Decomposing whole checkpoints; tiny random models only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoints import write_model  # noqa: E402
from decompose_helpers import decompose, random_sampler, tiny_llama  # noqa: E402
from deinfer.architectures import ARCHITECTURES  # noqa: E402
from deinfer.decompose import load_reference  # noqa: E402
from deinfer.decompose.calibration import (  # noqa: E402
    packaged_lines,
)
from deinfer.decompose.checkpoint import Factors, linear_names, read_config  # noqa: E402
from deinfer.decompose.directory import atomic_directory  # noqa: E402
from oracle import relative_error  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_factors_are_compensated_where_little_is_kept(dense: Path, tmp_path: Path) -> None:
    def made(**options: Any) -> tuple[bool, dict[str, Any]]:
        report = decompose(dense, tmp_path / "low", overwrite=True, **options)
        return report.compensated, load_reference(tmp_path / "low", torch.float64).state_dict()

    for keep, by_default in ((0.95, False), (0.7, True)):
        chosen, weights = made(keep=keep)
        assert chosen == by_default
        for compensate in (False, True):
            _, same = made(keep=keep, compensate=compensate)
            equal = all(torch.equal(weights[name], same[name]) for name in weights)
            assert equal == (compensate == by_default)
    assert made(keep=0.7, method="svd")[0] is False


@pytest.mark.parametrize("method", ["two_sided", "whitened", "svd"])
def test_round_trip(dense: Path, tmp_path: Path, method: str) -> None:
    report = decompose(dense, tmp_path / "low", keep=0.7, method=method)
    config = json.loads((tmp_path / "low/config.json").read_text())
    base = json.loads((dense / "config.json").read_text())
    assert config["model_type"] == "lowrank_llama"
    assert config["architectures"] == ["LowRankLlamaForCausalLM"]
    low_rank = config.pop("low_rank")
    assert low_rank["version"] == 1 and low_rank["base_model_type"] == "llama"
    assert low_rank["ranks"] == {n: r for n, r in report.ranks.items() if r is not None}
    assert {
        k: v for k, v in config.items() if k not in ("model_type", "architectures", "auto_map")
    } == {k: v for k, v in base.items() if k not in ("model_type", "architectures", "auto_map")}
    names = sorted(p.name for p in (tmp_path / "low").iterdir())
    assert "chat_template.jinja" in names and "pytorch_model.bin" not in names
    if method == "two_sided":
        assert report.keep <= 0.7
    reference = load_reference(tmp_path / "low", torch.float64)
    original = load_reference(dense, torch.float64)
    for name, rank in report.ranks.items():
        got, was = reference.get_submodule(name), original.get_submodule(name)
        if rank is None:
            assert torch.equal(got.weight, was.weight)
        else:
            assert got.u.weight.shape == (was.out_features, rank)
            assert got.v.weight.shape == (rank, was.in_features)
    with torch.no_grad():
        logits = reference(torch.arange(9)[None]).logits
    assert bool(torch.isfinite(logits).all())
    assert "kept" in report.summary()


def test_keep_one_changes_nothing(dense: Path, tmp_path: Path) -> None:
    report = decompose(dense, tmp_path / "low", keep=1.0)
    assert report.keep == 1.0 and set(report.ranks.values()) == {None}
    ids = torch.arange(9)[None]
    with torch.no_grad():
        got = load_reference(tmp_path / "low")(ids).logits
        want = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        assert torch.equal(got, want.eval()(ids).logits)


def test_two_sided_predicts_less_loss_than_svd(dense: Path, tmp_path: Path) -> None:
    """On its own calibration data the weighted optimum stays closer to the dense model."""
    errors = {}
    ids = torch.tensor(random_sampler(packaged_lines("calibration_prompts.txt")[:8]))
    want = load_reference(dense)(ids).logits
    for method in ("two_sided", "svd"):
        decompose(dense, tmp_path / method, method=method, keep=0.8, calibration_tokens=1500)
        errors[method] = (load_reference(tmp_path / method)(ids).logits - want).norm().item()
    assert errors["two_sided"] < errors["svd"]


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_family_decomposes_and_runs(family: str, tmp_path: Path) -> None:
    from deinfer import LLM

    source = write_model(tmp_path / "dense", family=family)
    report = decompose(source, tmp_path / "low", keep=0.7)
    assert report.keep <= 0.7
    tokens = random_sampler(["x"])[0]
    with torch.no_grad():
        want = load_reference(tmp_path / "low", torch.float64)(torch.tensor([tokens])).logits[0]
    llm = LLM(tmp_path / "low", num_threads=1, num_kv_blocks=8)
    assert llm.model_info.lowrank_matrices == sum(r is not None for r in report.ranks.values())
    assert llm.model_info.lowrank_matrices + llm.model_info.dense_matrices == len(report.ranks)
    assert relative_error(llm.prompt_logits(tokens), want.numpy()) < 2e-5


def test_biases_and_untied_head(tmp_path: Path) -> None:
    source = tiny_llama(
        tmp_path / "dense", attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    )
    report = decompose(source, tmp_path / "low", keep=0.7)
    reference, original = load_reference(tmp_path / "low"), load_reference(source)
    name = next(n for n, r in report.ranks.items() if r is not None)
    got = reference.get_submodule(name).u.bias
    assert torch.equal(got, original.get_submodule(name).bias)


def test_deterministic_and_overwrite(dense: Path, tmp_path: Path) -> None:
    decompose(dense, tmp_path / "a", seed=3)
    decompose(dense, tmp_path / "b", seed=3)
    files = [tmp_path / d / "model.safetensors" for d in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(FileExistsError, match="already exists"):
        decompose(dense, tmp_path / "a")
    decompose(dense, tmp_path / "a", overwrite=True, method="svd")
    assert json.loads((tmp_path / "a/config.json").read_text())["low_rank"]["method"] == "svd"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.0}, "keep 0.0"),
        ({"keep": 1.5}, "keep 1.5"),
        ({"keep": 1e-3}, "keep 0.001 is below"),
        ({"method": "magic"}, "'magic'"),
        ({"rank_multiple": 0}, "rank_multiple 0"),
        ({"calibration_tokens": 1}, "calibration_tokens 1"),
        ({"sampler": lambda prompts: []}, "gave 0 answers"),
        ({"sampler": lambda prompts: [[] for _ in prompts]}, "no answer"),
    ],
)
def test_bad_arguments(dense: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose(dense, tmp_path / "low", **changes)
    assert list(tmp_path.iterdir()) == []


def edited(source: Path, destination: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a checkpoint with an edited config."""
    destination.mkdir()
    for file in source.iterdir():
        (destination / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    edit(config)
    (destination / "config.json").write_text(json.dumps(config))
    return destination


def test_bad_sources(dense: Path, tmp_path: Path) -> None:
    gpt = edited(dense, tmp_path / "gpt", lambda c: c.update(model_type="gpt_neox"))
    with pytest.raises(ValueError, match="'gpt_neox'"):
        decompose(gpt, tmp_path / "low")
    packed = edited(dense, tmp_path / "q", lambda c: c.update(quantization_config={"bits": 4}))
    with pytest.raises(ValueError, match="quantized"):
        decompose(packed, tmp_path / "low")
    decompose(dense, tmp_path / "once")
    with pytest.raises(ValueError, match="already decomposed"):
        decompose(tmp_path / "once", tmp_path / "low")
    with pytest.raises(ValueError, match=r"config\.json"):
        decompose(tmp_path / "nowhere", tmp_path / "low")


def test_non_finite_weight(dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = edited(dense, tmp_path / "nan", lambda c: None)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*non-finite"):
        decompose(source, tmp_path / "low", method="svd")


def test_reference_checks_its_tensors(dense: Path, tmp_path: Path) -> None:
    decompose(dense, tmp_path / "low", keep=0.6)

    def one_rank_less(config: dict[str, Any]) -> None:
        ranks = config["low_rank"]["ranks"]
        ranks[next(iter(ranks))] += 1

    with pytest.raises(ValueError, match="size mismatch"):
        load_reference(edited(tmp_path / "low", tmp_path / "bad", one_rank_less))

    def forget(config: dict[str, Any]) -> None:
        ranks = config["low_rank"]["ranks"]
        ranks.pop(next(iter(ranks)))

    with pytest.raises(ValueError, match="missing"):
        load_reference(edited(tmp_path / "low", tmp_path / "worse", forget))


def test_atomic_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_factors_must_fit(dense: Path, tmp_path: Path) -> None:
    from deinfer.decompose.checkpoint import write_checkpoint

    name = linear_names(read_config(dense))[0]
    bad = Factors(torch.ones(48, 2), torch.ones(3, 48))
    with pytest.raises(ValueError, match=r"q_proj\.v.*\(3, 48\) does not fit \(2, 48\)"):
        write_checkpoint(dense, tmp_path / "low", {name: bad}, {})

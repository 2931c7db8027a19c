"""`deinfer info`, and that config parsing and Python's table of architectures agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deinfer
import pytest
import torch
from checkpoints import FAMILIES
from checkpoints import write_model as write_checkpoint
from conftest import write_model
from deinfer import _C
from deinfer.architectures import ARCHITECTURES
from deinfer.checkpoint_info import describe_checkpoint
from deinfer.cli import main
from safetensors.torch import load_file, save_file

# Whose text model runs, but is not decomposed.
MULTIMODAL = {"gemma3"}


def test_python_lists_what_the_registry_has() -> None:
    names = {prefix + name for name in ARCHITECTURES for prefix in ("", "lowrank_")}
    assert set(_C.supported_architectures()) == names | MULTIMODAL
    assert set(FAMILIES) == set(ARCHITECTURES)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_python_says_of_an_architecture_what_the_parser_does(family: str, tmp_path: Path) -> None:
    model = _C.describe_config(str(write_checkpoint(tmp_path, family=family)))
    architecture = ARCHITECTURES[family]
    assert [linear.name for linear in model.linears] == architecture.linear_names(2)
    assert model.activation == architecture.activations[0]
    assert model.norms_inputs == bool(architecture.attention_norm) == bool(architecture.mlp_norm)
    assert model.norms_outputs == bool(architecture.attention_output_norm)
    assert model.norms_outputs == bool(architecture.mlp_output_norm)
    config = json.loads((tmp_path / "config.json").read_text())
    for activation in architecture.activations:
        (tmp_path / "config.json").write_text(
            json.dumps({**config, architecture.activation: activation})
        )
        assert _C.describe_config(str(tmp_path)).activation == model.activation
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = f"{architecture.layers}.0."
    for norm in (
        architecture.attention_norm,
        architecture.attention_output_norm,
        architecture.mlp_norm,
        architecture.mlp_output_norm,
    ):
        assert not norm or f"{prefix}{norm}.weight" in tensors


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_family_is_described_as_the_runtime_loads_it(family: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", {"q_proj": 7}, family=family, dtype=torch.bfloat16)
    report = describe_checkpoint(path)
    assert report["supported"] and report["architecture"] == f"lowrank_{family}"
    model = deinfer.LLM(path, num_threads=1, num_kv_blocks=4, block_size=16).model_info
    assert model.parameters == report["parameters"]
    assert model.lowrank_matrices == report["decomposed_matrices"] == 2
    assert model.dense_matrices == report["dense_matrices"]
    assert model.kv_cache_bytes == 64 * report["kv_bytes_per_token"]
    assert (model.dtype, model.max_model_len) == (report["runs_as"], report["max_model_len"])
    assert model.weight_bytes == pytest.approx(report["memory_bytes"], rel=0.2)  # padding
    # From config.json alone: all but biases, which it need not mention.
    alone = describe_checkpoint(path / "config.json")
    assert alone == describe_checkpoint(path) | {"model": str(path / "config.json")}
    (path / "model.safetensors").unlink()
    alone = describe_checkpoint(path)
    assert alone["supported"] and not alone["weights_found"] and alone["runs_as"] is None
    biases = {"opt": 2 * (3 * 48 + 48 + 88 + 48), "qwen2": 2 * (48 + 2 * 24)}.get(family, 0)
    assert alone["parameters"] == report["parameters"] - biases
    assert (alone["ranks"], alone["features"]) == (report["ranks"], report["features"])
    assert any("no weights here" in note for note in alone["notes"])


def test_sizes(tiny_model: Path, lowrank_model: Path) -> None:
    dense = describe_checkpoint(tiny_model)
    assert dense["supported"] and dense["architecture"] == "llama" and dense["low_rank"] is None
    assert dense["parameters"] == dense["dense_parameters"]
    assert dense["bytes"] == dense["memory_bytes"] == 4 * dense["parameters"]
    assert (dense["decomposed_matrices"], dense["dense_matrices"]) == (0, 14)
    assert dense["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    low = describe_checkpoint(lowrank_model)
    assert low["dense_parameters"] == dense["parameters"] > low["parameters"]
    assert low["ranks"]["model.layers.0.mlp.down_proj"] == 13
    assert low["ranks"]["model.layers.1.mlp.down_proj"] is None
    assert low["low_rank"]["method"] == "two_sided"


def test_features_and_notes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "gemma2", family="gemma2", dtype=torch.float16)
    report = describe_checkpoint(path)
    assert report["features"] == [
        "4 heads on 2 KV heads of 16",
        "RMSNorm of what blocks read, what blocks add",
        "MLP gated by gelu_pytorch_tanh",
        "1 of 2: window of 50 tokens, default rope, theta 10000",
        "1 of 2: full attention, default rope, theta 10000",
        "attention scores capped at 2",
        "logits capped at 5",
        "tied embeddings",
    ]
    assert (report["runs_as"], report["dtypes"]) == ("float32", ["F16"])
    assert ["float16" in note for note in report["notes"]] == [True, False]
    assert "windows save time" in report["notes"][1]
    opt = describe_checkpoint(write_checkpoint(tmp_path / "opt", family="opt"))
    assert opt["features"][1:4] == [
        "LayerNorm of what blocks read",
        "MLP relu",
        "all layers: full attention, learned positions",
    ]
    qwen3 = describe_checkpoint(write_checkpoint(tmp_path / "qwen3", family="qwen3"))
    assert "RMSNorm of what blocks read, each head of q and k" in qwen3["features"]
    assert qwen3["notes"] == []


def test_problems_are_named(tmp_path: Path) -> None:
    write_model(tmp_path, 50, ranks={"model.layers.0.mlp.up_proj": 5})
    config = json.loads((tmp_path / "config.json").read_text())

    def problems(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        report = describe_checkpoint(tmp_path)
        assert report["supported"] is (not report["problems"])
        return "; ".join(report["problems"])

    assert problems() == ""
    unknown = problems(model_type="mamba")
    assert unknown.startswith('model_type "mamba" is not supported; supported are gemma, ')
    assert 'hidden_act "gelu" is not supported for lowrank_llama' in problems(hidden_act="gelu")
    assert "7 of 21 linear layers are missing" in problems(num_hidden_layers=3)
    assert "the weights are quantized" in problems(quantization_config={"bits": 4})
    assert "head_dim=15 must be even" in problems(head_dim=15)
    assert "q_proj.weight is [64, 64], config.json says [128, 64]" in problems(head_dim=32)
    ranks = {"version": 1, "ranks": {"model.layers.0.mlp.up_proj": 6}}
    assert "is 6, its tensors have 5" in problems(low_rank=ranks)
    ranks = {"version": 1, "ranks": {"model.layers.7.mlp.up_proj": 6}}
    assert "has 1 modules, of which the model has 0" in problems(low_rank=ranks)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.u.weight"
    save_file({**tensors, name: tensors[name][:5]}, tmp_path / "model.safetensors")
    assert f"{name} is [5, 5], config.json says [96, 5]" in problems()
    del tensors["model.embed_tokens.weight"]
    tensors["extra"] = torch.zeros(1, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "tensors are I8; the tensor model.embed_tokens.weight is missing" in problems()
    (tmp_path / "model.safetensors").unlink()
    assert problems() == ""
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pytorch_model.bin is no safetensors file" in problems()


def test_the_command(
    lowrank_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(lowrank_model)]) == 0
    text = capsys.readouterr().out
    assert "supported     yes" in text and "runs as       float32" in text
    assert "\nself_attn.q_proj" in text and "1 of 2         7       7       7" in text
    assert main(["info", str(lowrank_model / "config.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decomposed_matrices"] == 3
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 4}')
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "supported     no" in text and '"mamba"' in text
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    for content, message in (("{}", "malformed"), ("{", "not JSON"), ("[]", "not a JSON object")):
        (tmp_path / "config.json").write_text(content)
        assert main(["info", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["info", str(tmp_path)]) == 1
    assert "model-1.safetensors' is missing" in capsys.readouterr().err

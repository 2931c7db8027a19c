"""transformers loads decomposed directories through the modelling file that lies in them."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoints import FAMILIES, write_model  # noqa: E402
from deinfer import LLM, SamplingParams, modeling_lowrank  # noqa: E402
from deinfer.architectures import ARCHITECTURES  # noqa: E402
from deinfer.decompose import load_reference  # noqa: E402
from deinfer.decompose.checkpoint import copy_side_files, low_rank_config  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread", "modules_cache")
PROMPT = [5, 17, 101, 3, 64]


def canonical(path: Path, family: str = "llama", **fields: Any) -> Path:
    """A decomposed directory as deinfer writes it: factors of odd ranks, some linears dense."""
    attention_out = "out_proj" if family == "opt" else "o_proj"
    up = "fc1" if family == "opt" else "up_proj"
    ranks = {"self_attn.q_proj": 7, f"self_attn.{attention_out}": 11, up: 13}
    write_model(path, ranks, family=family, **fields)
    file = path / "config.json"
    config = json.loads(file.read_text())
    low_rank = config.pop("low_rank")
    config["model_type"] = low_rank["base_model_type"]
    config = low_rank_config(config, low_rank["ranks"], {"method": "random"})
    file.write_text(json.dumps(config))
    copy_side_files(path.parent, path)
    return path


def load(path: Path, **options: Any) -> Any:
    options = {"dtype": torch.float32, "trust_remote_code": True, **options}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def generate(model: Any) -> list[int]:
    model.generation_config.eos_token_id = None
    output = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_generates_the_same_tokens(family: str, tmp_path: Path) -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)
    path = canonical(tmp_path / "model", family)
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert config.model_type == f"lowrank_{family}"
    assert config.low_rank["base_model_type"] == family

    model = load(path)
    assert type(model).__name__ == f"LowRank{ARCHITECTURES[family].name}ForCausalLM"
    assert "deinfer" not in type(model).__module__
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        got = model(torch.tensor([PROMPT])).logits
        assert torch.equal(got, load_reference(path)(torch.tensor([PROMPT])).logits)

    llm = LLM(path, num_threads=1, num_kv_blocks=8, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    output = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)[0]
    assert generate(model) == list(output.outputs[0].token_ids)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_again(tmp_path: Path, tied: bool) -> None:
    path = canonical(tmp_path / "model", "qwen2", tie_word_embeddings=tied, dtype=torch.bfloat16)
    model = load(path)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["low_rank"] == json.loads((path / "config.json").read_text())["low_rank"]
    assert config["auto_map"]["AutoConfig"] == "modeling_lowrank.LowRankQwen2Config"
    again = load(tmp_path / "again")
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    with torch.no_grad():
        ids = torch.tensor([PROMPT])
        assert torch.equal(again(ids).logits, model(ids).logits)
    LLM(tmp_path / "again", num_threads=1, num_kv_blocks=8)


def test_fails_loudly_without_trust(tmp_path: Path) -> None:
    path = canonical(tmp_path / "model")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(path, trust_remote_code=False)
    (path / "modeling_lowrank.py").unlink()
    with pytest.raises(OSError, match="modeling_lowrank"):
        load(path)


def test_fails_loudly_without_its_tensors(tmp_path: Path) -> None:
    path = canonical(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.v.weight"
    save_file({**tensors, name: tensors[name][:5].clone()}, path / "model.safetensors")
    with pytest.raises(RuntimeError, match="mismatch"):
        load(path)
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 tensors, e.g. '{name}'"):
        load(path)


def test_config_errors(tmp_path: Path) -> None:
    path = canonical(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    for change, message in (
        ({"version": 2}, "low_rank.version 2 is not 1"),
        ({"ranks": {"model.layers.9.mlp.up_proj": 4}}, "'model.layers.9.mlp.up_proj'"),
    ):
        low_rank = {**config["low_rank"], **change}
        (path / "config.json").write_text(json.dumps({**config, "low_rank": low_rank}))
        with pytest.raises(ValueError, match=message):
            load(path)
    with pytest.raises(AttributeError, match="LowRankNoSuchConfig"):
        modeling_lowrank.LowRankNoSuchConfig  # noqa: B018


def test_the_file_stands_alone() -> None:
    tree = ast.parse(Path(modeling_lowrank.__file__).read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            modules |= {name.name.partition(".")[0] for name in node.names}
    assert modules == {"functools", "re", "typing", "torch", "transformers"}


def test_dense_copies_have_no_modelling_file(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    copy_side_files(tmp_path, tmp_path / "copy", low_rank=False)
    assert list((tmp_path / "copy").iterdir()) == []

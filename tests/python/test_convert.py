"""Importers and exporters on checkpoints in the exact layouts of other projects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import foreign_checkpoints as foreign  # noqa: E402
import foreign_parts  # noqa: E402
import foreign_pickles  # noqa: E402
from checkpoints import write_model  # noqa: E402
from deinfer import LLM  # noqa: E402
from deinfer.checkpoint_info import describe_checkpoint  # noqa: E402
from deinfer.convert import FORMATS, convert_checkpoint, detect_format  # noqa: E402
from deinfer.convert.dynamic_map import dynamic_map  # noqa: E402
from deinfer.decompose import load_reference  # noqa: E402
from oracle import relative_error  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
TOKENS = [5, 17, 101, 3, 64, 2, 99, 30, 1]
CASES = [
    ("svdllm", "llama"),
    ("svdllm", "mistral"),
    ("svdllm", "opt"),
    ("asvd", "llama"),
    ("asvd", "opt"),
    ("asvd", "qwen2"),
    ("dobi", "llama"),
    ("dobi", "opt"),
    ("dobi-remapped", "llama"),
    ("dobi-remapped", "qwen2"),
    ("deinfer", "llama"),
    ("deinfer", "opt"),
    ("kfac", "llama"),
    ("kfac", "mistral"),
    ("kfac", "qwen2"),
    ("kfac", "qwen3"),
    ("palu", "llama"),
    ("palu", "qwen2"),
    ("basis-sharing", "llama"),
    ("basis-sharing", "mistral"),
    ("basis-sharing", "opt"),
    ("aasvd", "llama"),
    ("aasvd", "qwen2"),
    ("lora", "llama"),
]


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].double().numpy()


def require_same(path: Path, source: foreign_parts.Foreign) -> None:
    """The directory at `path` computes what the source's torch model does."""
    want = logits(source.model)
    assert relative_error(logits(load_reference(path)), want) < 1e-5
    llm = LLM(path, num_threads=1, num_kv_blocks=8, dtype="float32")
    assert relative_error(llm.prompt_logits(TOKENS), want) < 1e-5


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_import_keeps_the_logits(layout: str, family: str, tmp_path: Path) -> None:
    source = foreign.LAYOUTS[layout](tmp_path, family)
    assert detect_format(source.path) == layout
    report = convert_checkpoint(source.path, tmp_path / "out", base=source.base)
    assert (report.source_format, report.target_format) == (layout, "canonical")
    assert report.ranks == source.ranks and report.model_type == family
    info = describe_checkpoint(tmp_path / "out")
    assert info["supported"], info["problems"]
    assert info["parameters"] == report.parameters
    assert info["dense_matrices"] == report.dense_matrices
    assert (tmp_path / "out" / "modeling_lowrank.py").is_file()
    require_same(tmp_path / "out", source)


@pytest.mark.usefixtures("modules_cache")
def test_transformers_loads_what_was_converted(tmp_path: Path) -> None:
    import transformers

    source = foreign.svdllm(tmp_path, "opt")
    convert_checkpoint(source.path, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32
    )
    assert type(model).__name__ == "LowRankOPTForCausalLM"
    assert relative_error(logits(model.eval()), logits(source.model)) < 1e-5


def test_training_state_beside_the_weights_is_ignored(tmp_path: Path) -> None:
    source = foreign.asvd(tmp_path, "llama")
    torch.save({"optimizer": torch.optim.SGD}, source.path / "optimizer.pt")
    assert detect_format(source.path) == "asvd"


def test_old_names_of_opt(tmp_path: Path) -> None:
    source = foreign.asvd(tmp_path, "opt")
    file = source.path / "model.safetensors"
    tensors = load_file(file)
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, file)
    convert_checkpoint(source.path, tmp_path / "out")
    require_same(tmp_path / "out", source)


def test_every_format_is_tested() -> None:
    assert {layout for layout, _ in CASES} | {"canonical", "dense", "gguf"} == {
        entry.name for entry in FORMATS
    }


@pytest.mark.parametrize(
    ("layout", "family"), [("asvd", "qwen2"), ("deinfer", "opt"), ("kfac", "qwen2")]
)
def test_export_and_import_again(layout: str, family: str, tmp_path: Path) -> None:
    source = foreign.LAYOUTS[layout](tmp_path, family)
    convert_checkpoint(source.path, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", target_format=layout)
    assert detect_format(tmp_path / "theirs") == layout
    assert not (tmp_path / "theirs" / "modeling_lowrank.py").exists()
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    original = json.loads((source.path / "config.json").read_text())
    for field in ("model_type", "architectures", "auto_map", "truncation_ranks", "rank_dict"):
        if field in original:
            assert theirs[field] == original[field], field

    def weights(path: Path) -> dict[str, Any]:
        return {k: v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}

    was, now = weights(source.path), weights(tmp_path / "theirs")
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "again")
    require_same(tmp_path / "again", source)


def test_exported_ranks_unpickle_to_integers(tmp_path: Path) -> None:
    import pickle

    source = foreign.deinfer(tmp_path, "llama")
    convert_checkpoint(source.path, tmp_path / "theirs", target_format="deinfer")
    ranks = pickle.loads((tmp_path / "theirs" / "desired_r.pkl").read_bytes())
    assert ranks == source.ranks and all(type(rank) is int for rank in ranks.values())


def test_dense_export_multiplies(tmp_path: Path) -> None:
    import transformers

    source = foreign.kfac(tmp_path, "qwen2")
    report = convert_checkpoint(
        source.path, tmp_path / "dense-out", target_format="dense", dtype=torch.float32
    )
    assert report.target_format == "dense"
    config = json.loads((tmp_path / "dense-out" / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["dtype"] == "float32"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense-out")
    # bfloat16 products are rounded before they become float32.
    assert relative_error(logits(model.eval()), logits(source.model)) < 0.02
    require_same(tmp_path / "dense-out", foreign_parts.Foreign(source.path, model, {}))


def test_dtype(tmp_path: Path) -> None:
    source = foreign.asvd(tmp_path, "llama")
    convert_checkpoint(source.path, tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_safetensors_with_shared_bases(tmp_path: Path) -> None:
    source = foreign.basis_sharing(tmp_path, "llama", safetensors=True)
    convert_checkpoint(source.path, tmp_path / "out")
    require_same(tmp_path / "out", source)


def test_bytes_of_aasvd(tmp_path: Path) -> None:
    source = foreign.aasvd(tmp_path, "llama", quantized=True)
    convert_checkpoint(source.path, tmp_path / "out", base=source.base)
    require_same(tmp_path / "out", source)


def test_dynamic_map() -> None:
    values = dynamic_map()
    assert values.shape == (256,) and values.dtype == torch.float32
    torch.testing.assert_close(
        values.double(), torch.tensor(foreign_parts.byte_values()), rtol=1e-6, atol=0
    )


def test_pickled_tokenizer_becomes_files(tmp_path: Path) -> None:
    from deinfer.tokenizer import load_tokenizer

    source = foreign.svdllm(tmp_path, "llama")
    convert_checkpoint(source.path, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.encode("hello world") == [3, 4]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_tokenizer_of_the_base(tmp_path: Path) -> None:
    source = foreign.svdllm(tmp_path, "llama")
    foreign_pickles.fast_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "chat_template.jinja").write_text("{{ messages }}")
    convert_checkpoint(source.path, tmp_path / "out", base=tmp_path / "dense")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    require_same(tmp_path / "out", source)


def test_dense_directories_with_torch_files(tmp_path: Path) -> None:
    """A dense pytorch_model.bin becomes safetensors that the runtime reads."""
    model = load_reference(write_model(tmp_path / "dense", family="opt"))
    out = tmp_path / "bin"
    foreign_parts.write_json(out / "config.json", foreign_parts.foreign_config(model))
    state = {name.removeprefix("model."): t for name, t in model.state_dict().items()}
    torch.save(state, out / "pytorch_model.bin")
    report = convert_checkpoint(out, tmp_path / "out")
    assert (report.source_format, report.target_format) == ("dense", "dense")
    require_same(tmp_path / "out", foreign_parts.Foreign(out, model, {}))


def test_square_factors_of_full_rank_follow_the_names(tmp_path: Path) -> None:
    """Where shapes fit either way, the format's names decide."""
    source = foreign.asvd(tmp_path, "llama")
    name = "model.layers.1.self_attn.q_proj"
    file = source.path / "model.safetensors"
    tensors, config = load_file(file), json.loads((source.path / "config.json").read_text())
    for factor in ("ALinear", "BLinear"):
        square = torch.randn(48, 48).half() / 7
        tensors[f"{name}.{factor}.weight"] = square
        foreign_parts.replace(
            source.model, f"{name}.{factor}", foreign_parts.linear(square.float())
        )
    save_file(tensors, file)
    config["truncation_ranks"][name] = 48
    foreign_parts.write_json(source.path / "config.json", config)
    convert_checkpoint(source.path, tmp_path / "out")
    require_same(tmp_path / "out", source)


def test_other_orientations_are_told_by_shapes(tmp_path: Path) -> None:
    """Factors of square weights, which fit in several ways, are read as those of the others are."""
    source = foreign.asvd(tmp_path, "llama")
    file = source.path / "model.safetensors"
    tensors = load_file(file)
    for i, change in enumerate(("swapped", "first turned", "both")):
        changed = dict(tensors)
        for module in source.ranks:
            u, v = (tensors[f"{module}.{x}Linear.weight"] for x in "AB")
            if change != "swapped":
                v = v.t()
            if change != "first turned":
                u, v = v, u
            changed[f"{module}.ALinear.weight"] = u.clone().contiguous()
            changed[f"{module}.BLinear.weight"] = v.clone().contiguous()
        save_file(changed, file)
        convert_checkpoint(source.path, tmp_path / f"out{i}")
        require_same(tmp_path / f"out{i}", source)


def test_one_factor_in_another_orientation(tmp_path: Path) -> None:
    source = foreign.asvd(tmp_path, "llama")
    file = source.path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.BLinear.weight"
    tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, file)
    convert_checkpoint(source.path, tmp_path / "out")
    require_same(tmp_path / "out", source)
    name = "model.layers.1.self_attn.q_proj"
    one, other = (f"{name}.{x}Linear.weight" for x in "AB")
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{name}: factors .* fit in several ways"):
        convert_checkpoint(source.path, tmp_path / "again")


def test_lm_head_is_multiplied(tmp_path: Path) -> None:
    """The runtime needs the output head dense."""
    model = foreign_parts.dense_model(tmp_path, "llama", tie_word_embeddings=False)
    u, v = foreign_parts.factors(131, 48, 20)
    foreign_parts.replace(model, "lm_head", foreign_parts.SVDLinear(u, v, None))
    out = tmp_path / "asvd"
    ranks = {"lm_head": 20}
    foreign_parts.write_json(
        out / "config.json", foreign_parts.foreign_config(model, truncation_ranks=ranks)
    )
    save_file(foreign_parts.stored(model, torch.float32), out / "model.safetensors")
    report = convert_checkpoint(out, tmp_path / "out")
    assert report.ranks == {} and "lm_head" in report.notes[0]
    require_same(tmp_path / "out", foreign_parts.Foreign(out, model, {}))

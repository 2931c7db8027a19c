"""Bad checkpoints: a clear error that names the value, and nothing half-written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import foreign_checkpoints as foreign  # noqa: E402
import foreign_parts  # noqa: E402
import foreign_pickles  # noqa: E402
from checkpoints import write_model  # noqa: E402
from deinfer.convert import convert_checkpoint, detect_format  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(autouse=True)
def nothing_half_written(tmp_path: Path) -> Iterator[None]:
    yield
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(source: foreign_parts.Foreign, tmp_path: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source.path, tmp_path / "out", base=source.base, **options)


def test_missing_shard(tmp_path: Path) -> None:
    source = foreign.kfac(tmp_path, "llama")
    (source.path / "model-00002-of-00002.safetensors").unlink()
    refused(source, tmp_path, "'model-00002-of-00002.safetensors', which is missing")


@pytest.mark.parametrize(
    ("layout", "field", "where"),
    [
        ("asvd", "truncation_ranks", "truncation_ranks"),
        ("kfac", "rank_dict", "rank_dict"),
        ("deinfer", None, "desired_r.pkl"),
    ],
)
def test_ranks_that_contradict_tensors(
    layout: str, field: str | None, where: str, tmp_path: Path
) -> None:
    source = foreign.LAYOUTS[layout](tmp_path, "llama")
    rank = source.ranks[Q]

    def write(ranks: dict[str, Any]) -> None:
        if field:
            edit_json(source.path / "config.json", lambda config: config.update({field: ranks}))
        else:
            (source.path / where).write_bytes(pickle.dumps(ranks))

    write({**source.ranks, Q: 77})
    refused(source, tmp_path, f"{where} says rank 77 for {Q}, its tensors have {rank}")
    write({name: r for name, r in source.ranks.items() if name != Q})
    refused(source, tmp_path, f"{where} says rank None for {Q}, its tensors have {rank}")
    write({**source.ranks, "model.layers.0.self_attn.o_proj": 3})
    refused(source, tmp_path, "says rank 3 for .*o_proj, its tensors have None")
    write({**source.ranks, "model.layers.9.mlp.up_proj": 3})
    refused(source, tmp_path, f"{where} names 'model.layers.9.mlp.up_proj'")


def test_ranks_of_groups(tmp_path: Path) -> None:
    palu = foreign.palu(tmp_path / "palu", "llama")
    name = "model.layers.0.self_attn.k_proj"
    edit_json(palu.path / "config.json", lambda c: c["head_wise_ranks"].update({name: [3, 7]}))
    refused(palu, tmp_path, rf"head_wise_ranks says \[3, 7\] for {name}, its tensors have \[3, 6\]")
    basis = foreign.basis_sharing(tmp_path / "basis", "llama")
    edit_json(basis.path / "config.json", lambda config: config.update(num_basis_q=9))
    refused(basis, tmp_path, "num_basis says rank 9 for .*q_proj, its tensors have 5")


def test_desired_r_that_is_no_dictionary_of_integers(tmp_path: Path) -> None:
    source = foreign.deinfer(tmp_path, "opt")
    for ranks, message in (([1], "holds no dictionary but a list"), ({"a": 1.5}, "1.5 of 'a'")):
        (source.path / "desired_r.pkl").write_bytes(pickle.dumps(ranks))
        refused(source, tmp_path, message)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    source = foreign.asvd(tmp_path, "llama")
    file = source.path / "model.safetensors"
    edit_tensors(file, lambda tensors: tensors[f"{Q}.BLinear.weight"][0, 3].fill_(float("nan")))
    refused(source, tmp_path, f"tensor '{Q}.v.weight' has a value that is not finite")
    large = foreign.kfac(tmp_path / "kfac", "llama")
    edit_tensors(
        large.path / "model-00001-of-00002.safetensors",
        lambda tensors: next(iter(tensors.values())).fill_(1e6),
    )
    refused(large, tmp_path, "not finite in torch.float16", dtype=torch.float16)


def test_unknown_architectures(tmp_path: Path) -> None:
    source = foreign.asvd(tmp_path, "llama")
    edit_json(source.path / "config.json", lambda config: config.update(model_type="gpt_neox"))
    refused(source, tmp_path, "architecture 'gpt_neox' is not supported, only")
    edit_json(
        source.path / "config.json",
        lambda config: config.update(model_type="llama", quantization_config={"bits": 4}),
    )
    refused(source, tmp_path, "quantized")
    edit_json(
        source.path / "config.json",
        lambda config: config.update(quantization_config=None, num_attention_heads=0),
    )
    refused(source, tmp_path, "config.json describes no model")


def test_pickles_that_cannot_be_read(tmp_path: Path) -> None:
    source = foreign.svdllm(tmp_path, "llama")
    data = source.path.read_bytes()
    for broken in (data[:1000], data[: len(data) // 2], b"PK\x03\x04", b""):
        source.path.write_bytes(broken)
        refused(source, tmp_path, f"{source.path.name}' cannot be read")
    torch.save({"model": torch.ones(3)}, source.path)
    refused(source, tmp_path, "no format that can be read")


def test_pickled_modules_without_what_is_needed(tmp_path: Path) -> None:
    model = foreign_parts.dense_model(tmp_path, "llama")
    u, v = foreign_parts.factors(48, 48, 4)
    foreign_parts.replace(model, Q, foreign_pickles.SVDTransformLayer(u, v, None))
    del model.config
    with foreign_parts.importable(foreign_pickles.SVDTransformLayer):
        torch.save({"model": model}, tmp_path / "DobiSVD_Model.pt")
    source = foreign_parts.Foreign(tmp_path / "DobiSVD_Model.pt", model, {Q: 4})
    refused(source, tmp_path, "no config; name the dense model with --base")
    convert_checkpoint(source.path, tmp_path / "fine", base=tmp_path / "dense")
    config = json.loads((tmp_path / "fine" / "config.json").read_text())
    assert config["low_rank"]["ranks"] == {Q: 4}


def test_factors_that_do_not_fit(tmp_path: Path) -> None:
    source = foreign.asvd(tmp_path, "llama")
    file = source.path / "model.safetensors"
    original = load_file(file)
    one, other = f"{Q}.ALinear.weight", f"{Q}.BLinear.weight"
    for change, message in (
        ({one: torch.ones(47, source.ranks[Q])}, rf"{Q}: factors \[9, 48\] and \[47, 9\]"),
        ({one: torch.ones(48, 3)}, f"{Q}: factors .* do not fit a weight"),
        ({one: torch.ones(48)}, "are no matrices"),
        ({one: None}, f"{Q} has BLinear.weight but no ALinear.weight"),
        ({other: None}, f"{Q} has ALinear.weight but no BLinear.weight"),
        ({f"{Q}.ALinear.bias": torch.ones(48)}, f"{Q} has a bias, which the config contradicts"),
        ({f"{Q}.weight": torch.ones(48, 48)}, f"'{Q}.weight' and factors"),
        ({"model.norm.weight": torch.ones(47)}, r"shape \[47\], the config says \[48\]"),
        ({"model.norm.weight": None}, "1 tensors are missing, e.g. 'model.norm.weight'"),
        ({"model.extra.weight": torch.ones(4)}, "'model.extra.weight' belongs to no llama model"),
        ({"model.norm.weight": torch.ones(48, dtype=torch.int32)}, "dtype torch.int32"),
    ):
        changed = {**original, **change}
        save_file({name: t for name, t in changed.items() if t is not None}, file)
        refused(source, tmp_path, message)


def test_dobi_entries(tmp_path: Path) -> None:
    source = foreign.dobi_remapped(tmp_path, "llama")
    file = source.path / "remapping_weight.pt"
    original = torch.load(file, weights_only=True)
    name = "model.layers.0.mlp.up_proj"
    entry = original[name]
    for change, message in (
        ({"us_quan": None}, f"{name} lacks one of us_quan"),
        ({"vt_absmax": torch.ones(2)}, "and 2 scales"),
        ({"vt_quan": entry["vt_quan"].int()}, "torch.int32"),
        ({"tuple_info": ("xx", torch.ones(3, 3))}, "malformed tuple_info"),
        ({"tuple_info": ("us", torch.ones(40, 1))}, r"a tail \[1, 40\] for"),
        ({"tuple_info": None}, f"{name}: factors .* do not fit"),
    ):
        torch.save({**original, name: {**entry, **change}}, file)
        refused(source, tmp_path, message)


def test_groups_of_palu(tmp_path: Path) -> None:
    source = foreign.palu(tmp_path, "llama")
    file = source.path / "model.safetensors"
    original = load_file(file)
    name = "model.layers.0.self_attn.k_proj"
    for lacking, message in (
        ((f"{name}.U.0.weight",), r"U of groups \[1\], some are missing"),
        ((f"{name}.VT.weight",), "no VT.weight"),
        ((f"{name}.U.0.weight", f"{name}.U.1.weight"), "VT.weight but no U.0.weight"),
    ):
        save_file({n: t for n, t in original.items() if n not in lacking}, file)
        refused(source, tmp_path, message)


def test_shared_bases_that_are_missing(tmp_path: Path) -> None:
    source = foreign.basis_sharing(tmp_path, "opt")
    file = source.path / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    for layer in (0, 1):
        del state[f"model.decoder.k_basis.{layer}.weight"]
    torch.save(state, file)
    refused(source, tmp_path, r"the basis of k of layers \[0, 1\] is missing")


def test_a_base_is_asked_for(tmp_path: Path) -> None:
    tree = foreign.aasvd(tmp_path / "aasvd", "llama")
    tree.base = None
    refused(tree, tmp_path, "factors only; name the dense model's directory with --base")
    adapter = foreign.lora(tmp_path / "lora", "llama")
    adapter.base = None
    refused(adapter, tmp_path, "perception merge.*--base")
    adapter.base = tmp_path / "nowhere"
    refused(adapter, tmp_path, "nowhere' has no config.json")


def test_adapters_that_are_changes_are_refused(tmp_path: Path) -> None:
    adapter = foreign.lora(tmp_path, "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "dense" / "model.safetensors", lambda t: t[name][0, 0].fill_(1e-3))
    refused(adapter, tmp_path, f"{name} is not zero.*perception merge")


def test_trees_with_other_modules(tmp_path: Path) -> None:
    tree = foreign.aasvd(tmp_path, "llama")
    (tree.path / "model_layers_7_mlp_up_proj").mkdir()
    refused(tree, tmp_path, "'model_layers_7_mlp_up_proj' is no module")


def test_formats_that_are_not_told_apart(tmp_path: Path) -> None:
    source = foreign.asvd(tmp_path, "llama")
    (source.path / "desired_r.pkl").write_bytes(pickle.dumps(source.ranks))
    with pytest.raises(ValueError, match="looks like asvd and deinfer; choose with --format"):
        detect_format(source.path)
    refused(source, tmp_path, "choose with --format")
    convert_checkpoint(source.path, tmp_path / "fine", source_format="asvd")


def test_sources_of_no_format(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert detect_format(tmp_path / "empty") is None
    refused(foreign_parts.Foreign(tmp_path / "empty", torch.nn.Module(), {}), tmp_path, "no format")
    refused(
        foreign_parts.Foreign(tmp_path / "none", torch.nn.Module(), {}), tmp_path, "does not exist"
    )
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(
        foreign_parts.Foreign(tmp_path / "empty", torch.nn.Module(), {}), tmp_path, "cannot be read"
    )


def test_targets(tmp_path: Path) -> None:
    source = foreign.kfac(tmp_path, "qwen2")
    refused(source, tmp_path, "'svdllm' cannot be written: its scripts", target_format="svdllm")
    refused(source, tmp_path, "'palu' cannot be written: only canonical", target_format="palu")
    refused(source, tmp_path, "format 'nothing' is not one of", target_format="nothing")
    refused(source, tmp_path, "no model for 'qwen2'", target_format="deinfer")
    qwen3 = foreign.kfac(tmp_path / "3", "qwen3")
    refused(qwen3, tmp_path, "ASVD has no model for 'qwen3'", target_format="asvd")
    llama = foreign.kfac(tmp_path / "l", "llama")
    refused(llama, tmp_path, "layers.0.self_attn.o_proj is dense and", target_format="deinfer")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there"):
        convert_checkpoint(source.path, tmp_path / "there")
    convert_checkpoint(source.path, tmp_path / "there", overwrite=True)


def test_unequal_ranks_are_not_for_deinfer(tmp_path: Path) -> None:
    source = foreign.deinfer(tmp_path, "llama")
    name = "model.layers.1.self_attn.k_proj"
    edit_tensors(
        source.path / "model.safetensors",
        lambda tensors: tensors.update(
            {f"{name}.u.weight": torch.ones(24, 4), f"{name}.v.weight": torch.ones(4, 48)}
        ),
    )
    (source.path / "desired_r.pkl").unlink()
    message = f"{name} has 4 and model.layers.1.self_attn.v_proj has 10"
    refused(source, tmp_path, message, target_format="deinfer")


def test_canonical_version(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", {"self_attn.q_proj": 7})
    source = foreign_parts.Foreign(path, torch.nn.Module(), {})
    edit_json(path / "config.json", lambda config: config["low_rank"].update(version=2))
    refused(source, tmp_path, "low_rank.version 2 is not 1")
    edit_json(path / "config.json", lambda config: config["low_rank"].update(version=1))
    edit_json(path / "config.json", lambda config: config["low_rank"]["ranks"].update({Q: 8}))
    refused(source, tmp_path, f"low_rank.ranks says rank 8 for {Q}, its tensors have 7")

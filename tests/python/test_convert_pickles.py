"""Pickles are read without executing anything: tensors, containers, inert records, or nothing."""

from __future__ import annotations

import codecs
import collections
import functools
import importlib
import io
import operator
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import foreign_checkpoints as foreign  # noqa: E402
import foreign_parts  # noqa: E402
from deinfer.convert import convert_checkpoint, detect_format  # noqa: E402
from deinfer.convert.pickles import (  # noqa: E402
    Record,
    load_objects,
    load_tensors,
    module_tensors,
)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def attacks(proof: Path) -> dict[str, Any]:
    """Objects that create `proof` when unpickled, by the name that has to be refused."""
    command = f"touch {proof}"
    code = f"open({str(proof)!r}, 'w')"
    return {
        "posix.system": Call(os.system, command),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "builtins.__import__": Call(__import__, "os"),
        "builtins.getattr": Call(getattr, os.system, "__call__"),
        "io.open": Call(open, str(proof), "w"),
        "functools.partial": Call(functools.partial(os.system, command)),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(proof)]),
        "importlib.import_module": Call(importlib.import_module, "antigravity"),
        "operator.attrgetter": Call(operator.attrgetter, "system"),
        "_pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, command))),
        "torch.serialization.load": Call(torch.load, "file"),
        "torch.hub.load": Call(torch.hub.load, "owner/repository", "model"),
        "builtins.map": Call(list, Call(map, os.system, [command])),
        "collections.UserList": Call(collections.UserList),
        "_codecs.lookup": Call(codecs.lookup, "zip"),
    }


def save_zip(entry: Any, path: Path) -> None:
    torch.save(entry, path)


def save_legacy(entry: Any, path: Path) -> None:
    torch.save(entry, path, _use_new_zipfile_serialization=False)


def save_plain(entry: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(entry))


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_plain])
def test_calls_are_refused_by_name(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for name, attack in attacks(proof).items():
        for entry in (attack, {"model": {"weights": [attack]}}):
            save(entry, tmp_path / "evil.pt")
            for reader in (load_objects, load_tensors):
                with pytest.raises(ValueError, match=r"evil\.pt' cannot be read: ") as info:
                    reader(tmp_path / "evil.pt")
                if reader is load_objects:
                    assert f"{name.lstrip('_')}, which is neither" in str(info.value)
    assert not proof.exists()
    assert "antigravity" not in sys.modules
    # The attacks are real: an ordinary unpickler falls for them.
    pickle.loads(pickle.dumps(attacks(proof)["posix.system"]))
    assert proof.exists()


def test_converting_a_malicious_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    evil = {"tokenizer": 1, "model": Call(os.system, f"touch {proof}")}
    torch.save(evil, tmp_path / "evil.pt")
    for action in (
        lambda: detect_format(tmp_path / "evil.pt"),
        lambda: convert_checkpoint(tmp_path / "evil.pt", tmp_path / "out"),
        lambda: convert_checkpoint(tmp_path / "evil.pt", tmp_path / "out", source_format="svdllm"),
    ):
        with pytest.raises(ValueError, match=r"posix\.system"):
            action()
    deinfer = foreign.deinfer(tmp_path, "opt")
    save_plain({"model": Call(os.system, f"touch {proof}")}, deinfer.path / "desired_r.pkl")
    with pytest.raises(ValueError, match=r"posix\.system"):
        convert_checkpoint(deinfer.path, tmp_path / "out")
    basis = foreign.basis_sharing(tmp_path / "b", "opt")
    torch.save({"x": Call(os.system, f"touch {proof}")}, basis.path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        convert_checkpoint(basis.path, tmp_path / "out")
    assert not proof.exists() and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def name_of(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def load_bytes(data: bytes, path: Path) -> Any:
    path.write_bytes(data)
    return load_objects(path)


def test_names_of_known_packages_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their code does not run: not at import, not in constructors, not in __setstate__."""
    (tmp_path / "component.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\n"
        "class Layer:\n"
        "    def __init__(self, *a): raise SystemExit\n"
        "    def __setstate__(self, state): raise SystemExit\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    layer = name_of("component", "Layer")
    data = opcodes(layer, b"(K\x01tR", b"}(X\x01\x00\x00\x00aK\x02ub")
    record = load_bytes(data, tmp_path / "evil.pkl")
    assert isinstance(record, Record)
    assert record.class_name == "component.Layer"
    assert record.arguments == (1,) and record.get("a") == 2
    assert not (tmp_path / "imported").exists() and "component" not in sys.modules
    # Functions below known packages are records, too.
    called = load_bytes(
        opcodes(name_of("torch.nn.init", "normal_"), b"(K\x01tR"), tmp_path / "evil.pkl"
    )
    assert isinstance(called, Record) and called.arguments == (1,)


def test_functions_cannot_be_changed(tmp_path: Path) -> None:
    """BUILD on a function would change it for the whole process."""
    rebuild = torch._utils._rebuild_tensor_v2
    before = rebuild.__defaults__, dict(rebuild.__dict__)
    state = b"}X\x0c\x00\x00\x00__defaults__NsX\x01\x00\x00\x00aK\x01s"
    for module, name in (
        ("torch._utils", "_rebuild_tensor_v2"),
        ("collections", "OrderedDict"),
        ("torch.nn", "Linear"),
    ):
        for built in (state + b"b", b"N" + state + b"\x86b"):
            data = opcodes(name_of(module, name), built)
            with pytest.raises(ValueError, match="cannot be read"):
                load_bytes(data, tmp_path / "evil.pkl")
    assert (rebuild.__defaults__, dict(rebuild.__dict__)) == before
    assert isinstance(torch.nn.Linear(1, 1), torch.nn.Module)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (opcodes(b"X\x01\x00\x00\x00aQ"), "persistent"),  # a persistent id outside of torch.save
        (opcodes(name_of("builtins", "eval"), b"X\x01\x00\x00\x001\x85R"), "builtins.eval"),
        (opcodes(name_of("__builtin__", "eval"), b"X\x01\x00\x00\x001\x85R"), "builtins.eval"),
        (b"(S'1'\nibuiltins\neval\n.", "builtins.eval"),  # INST
        (opcodes(b"(", name_of("builtins", "eval"), b"X\x01\x00\x00\x001o"), "builtins.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
        (b"\x80\x04\x8c\x05torch\x8c\x08hub.load\x93.", "torch.hub.load"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "fromkeys"),
        (opcodes(b"\x82\x01"), "extension"),  # EXT1
        (
            opcodes(name_of("_codecs", "encode"), b"X\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R"),
            "zip",
        ),
        (b"\x80\x02", "cannot be read"),
        (b"", "cannot be read"),
        (b"no pickle at all", "cannot be read"),
    ],
)
def test_raw_pickles(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read") as info:
        load_bytes(data, tmp_path / "evil.pkl")
    assert message in str(info.value)


def test_persistent_ids_in_torch_files(tmp_path: Path) -> None:
    """torch's storages are found by (tag, type, key, location, size); nothing else passes."""
    for pid in (
        b"X\x01\x00\x00\x00a",
        b"(X\x07\x00\x00\x00storage" + name_of("builtins", "eval") + b"X\x01\x00\x00\x000NNt",
        b"(X\x06\x00\x00\x00module" + name_of("os", "system") + b"X\x01\x00\x00\x000NNt",
    ):
        with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
            archive.writestr("evil/data.pkl", opcodes(pid, b"Q"))
            archive.writestr("evil/version", "3\n")
            archive.writestr("evil/data/0", bytes(8))
        with pytest.raises(ValueError, match="cannot be read"):
            load_objects(tmp_path / "evil.pt")


def test_tensors_outside_of_their_storage_are_refused(tmp_path: Path) -> None:
    data = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, data)
    archive = zipfile.ZipFile(data)
    files = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in files if name.endswith("data.pkl"))
    for old, new in (
        (b"K\x00K\x04\x85", b"K\x00K\x64\x85"),
        (b"K\x00K\x04\x85", b"K\x63K\x04\x85"),
    ):
        assert old in files[name]
        with zipfile.ZipFile(tmp_path / "evil.pt", "w") as changed:
            for file, content in files.items():
                changed.writestr(file, content.replace(old, new) if file == name else content)
        with pytest.raises(ValueError, match="cannot be read"):
            load_objects(tmp_path / "evil.pt")


def test_tar_archives_are_not_unpacked(tmp_path: Path) -> None:
    """One whose first name is what torch's files begin with."""
    save_legacy(1, tmp_path / "old.pt")
    start = (tmp_path / "old.pt").read_bytes()[:15].decode("utf-8", "surrogateescape")
    with tarfile.open(tmp_path / "evil.pt", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in (start, "storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match="tar archive"):
        load_objects(tmp_path / "evil.pt")


def test_torchscript_is_a_program(tmp_path: Path) -> None:
    module = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(module, tmp_path / "script.pt")
    with pytest.raises(ValueError, match="TorchScript"):
        load_objects(tmp_path / "script.pt")


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_modules_become_records(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(3, 4)
            self.rest = torch.nn.ModuleList([torch.nn.LayerNorm(4), torch.nn.Embedding(5, 2)])
            self.shared = self.first
            self.register_buffer("kept", torch.arange(3))
            self.register_buffer("lost", torch.arange(3), persistent=False)
            self.first.weight.attribute = {"an": "attribute"}
            self.settings = collections.defaultdict(list, a=np.float32(0.5), b={1, 2})
            self.dtype, self.size = torch.bfloat16, torch.Size([2, 3])

    Net.__module__, Net.__qualname__ = "component.net", "Net"
    net = Net().to(torch.bfloat16)
    with foreign_parts.importable(Net):
        save(net, tmp_path / "net.pt")
    record = load_objects(tmp_path / "net.pt")
    assert record.class_name == "component.net.Net"
    assert record.get("settings") == {"a": 0.5, "b": {1, 2}}
    assert record.get("dtype") is torch.bfloat16 and record.get("size") == (2, 3)
    got, want = module_tensors(record), net.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not any(tensor.requires_grad for tensor in got.values())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numbers_of_all_protocols(protocol: int, tmp_path: Path) -> None:
    ranks = {"a": 7, "b": np.int64(9), "c": np.int32(11), "d": np.uint8(200), "e": True}
    (tmp_path / "ranks.pkl").write_bytes(pickle.dumps(ranks, protocol=protocol))
    if protocol < 2:  # numpy types go through copyreg there
        ranks = {"a": 7, "e": True}
        (tmp_path / "ranks.pkl").write_bytes(pickle.dumps(ranks, protocol=protocol))
    loaded = load_objects(tmp_path / "ranks.pkl")
    assert loaded == ranks
    assert all(type(value) in (int, bool) for value in loaded.values())


def test_attributes_of_state_dicts_are_ignored(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    assert state._metadata
    save_zip(state, tmp_path / "state.pt")
    assert load_objects(tmp_path / "state.pt").keys() == {"weight", "bias"}


def test_modules_that_contain_themselves(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    module._modules["self"] = module
    torch.save(module, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="contains itself"):
        module_tensors(load_objects(tmp_path / "net.pt"))
    with pytest.raises(ValueError, match="no torch module"):
        module_tensors(Record())

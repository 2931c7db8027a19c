"""Interrupted runs: killed, out of disk space, resumed with the same or with other arguments."""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from decompose_helpers import decompose, random_sampler, tiny_llama  # noqa: E402
from deinfer.decompose import directory as directory_module  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def kill_after(files: int, source: Path, destination: Path, **options: Any) -> int:
    """Decompose in a child that is killed when it has completed so many files.

    Returns the signal that ended it, 0 if it came to its end before.
    """
    child = os.fork()
    if child == 0:
        done = 0
        replace = os.replace

        def counted(old: Any, new: Any) -> None:
            nonlocal done
            replace(old, new)
            done += 1
            if done == files:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            directory_module.os.replace = counted
            decompose(source, destination, **options)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return status & 0x7F


OPTIONS: list[dict[str, Any]] = [
    {"keep": 0.7},
    {"target_ppl_increase": 1.05, "compensate": False},
    {"keep": 0.6, "method": "whitened", "compensate": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["two_sided", "ppl", "whitened"])
def test_killed_anywhere_and_resumed(dense: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """A run that is killed after some files, again and again, gets there with the same bits."""
    options = {**options, "calibration_tokens": 400}
    decompose(dense, tmp_path / "whole", **options)
    kills = 0
    while kill_after(3 + kills, dense, tmp_path / "low", resume=True, **options) == signal.SIGKILL:
        kills += 1
        if (tmp_path / "low").exists():  # killed between the renaming and the removal of the rest
            break
    assert kills >= 4
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "low" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {p.name for p in tmp_path.iterdir()} <= {"low", "whole", "low.partial"}


def test_a_kill_loses_one_block_at_most(dense: Path, tmp_path: Path) -> None:
    assert kill_after(9, dense, tmp_path / "low", keep=0.7) == signal.SIGKILL
    partial = tmp_path / "low.partial"
    before = {p: p.stat().st_mtime_ns for p in partial.rglob("*") if p.is_file()}
    kill_after(3, dense, tmp_path / "low", keep=0.7, resume=True)
    after = {p: p.stat().st_mtime_ns for p in partial.rglob("*") if p.is_file()}
    assert any(p.parent.name == "inputs" for p in before)
    again = {
        path.name
        for path, time in before.items()
        if path.suffix == "" and path in after and after[path] != time
    }
    assert len(again) <= 1, again


def test_other_arguments_and_sources_are_refused(dense: Path, tmp_path: Path) -> None:
    low = tmp_path / "low"
    assert kill_after(6, dense, low, keep=0.7) == signal.SIGKILL
    with pytest.raises(FileExistsError, match=r"low\.partial.*unfinished.*--resume"):
        decompose(dense, low, keep=0.7)
    for changes, message in (
        ({"keep": 0.6}, "target 'keep 0.7', not 'keep 0.6'"),
        ({"keep": 0.7, "method": "svd"}, "compensate 'by keep', not False"),
        ({"keep": 0.7, "seed": 1}, "seed 0, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            decompose(dense, low, resume=True, **changes)
    other = tiny_llama(tmp_path / "other", rms_norm_eps=1e-4)
    with pytest.raises(ValueError, match=r"source .*config\.json"):
        decompose(other, low, resume=True, keep=0.7)
    assert (tmp_path / "low.partial" / "state.json").is_file()
    decompose(dense, low, resume=True, keep=0.7)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writes beyond a size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [3000, 60_000])
def test_full_disk(dense: Path, tmp_path: Path, size: int) -> None:
    """Neither the first spool nor the spectra fit; nothing half-written is left."""
    low = tmp_path / "low"
    with largest_file(size), pytest.raises(OSError, match=r"make room and go on.*--resume"):
        decompose(dense, low, keep=0.7)
    assert not low.exists()
    left = [p.name for p in (tmp_path / "low.partial").rglob("*")]
    assert "state.json" in left and not any(name.endswith(".writing") for name in left)
    decompose(dense, low, keep=0.7, resume=True)
    decompose(dense, tmp_path / "whole", keep=0.7)
    assert (low / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_bad_sources(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_llama(tmp_path / "dense")
    # Copies: what is mapped is gone when the file is cut.
    tensors = {n: t.clone() for n, t in load_file(source / "model.safetensors").items()}
    whole = (source / "model.safetensors").read_bytes()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {"weight_map": {name: first for name in tensors}}
    index["weight_map"]["model.norm.weight"] = second
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"shard '{first}'.*not in"):
        decompose(source, tmp_path / "low")
    (source / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="no index"):
        decompose(source, tmp_path / "low")
    (source / "model.safetensors.index.json").unlink()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        decompose(source, tmp_path / "low")
    norm = tensors.pop("model.layers.1.input_layernorm.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.1\.input_layernorm"):
        decompose(source, tmp_path / "low")
    tensors["model.layers.1.input_layernorm.weight"] = norm[:7].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"input_layernorm.*\(7,\).*\(48,\)"):
        decompose(source, tmp_path / "low")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_too_few_tokens_leave_nothing(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one sequence"):
        decompose(dense, tmp_path / "low", target_ppl_increase=1.2, calibration_tokens=20)
    assert list(tmp_path.iterdir()) == []
    assert random_sampler(["x"])

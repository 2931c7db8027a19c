"""`deinfer convert` as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import foreign_checkpoints as foreign  # noqa: E402
from deinfer.cli import main  # noqa: E402
from deinfer.convert import FORMATS  # noqa: E402


def test_converts_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = foreign.asvd(tmp_path, "llama")
    assert main(["convert", str(source.path), str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source_format"] == "asvd" and report["target_format"] == "canonical"
    assert report["ranks"] == source.ranks and report["dense_matrices"] == 2
    options = ["--to", "deinfer", "--overwrite"]
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "out"), *options]) == 1
    assert "DeInfer" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    options = ["--to", "asvd", "--dtype", "float32"]
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back"), *options]) == 0
    output = capsys.readouterr().out
    assert "note: put configuration_asvd_llama.py" in output
    assert f"{len(source.ranks)} decomposed and 2 dense matrices, written as asvd" in output


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [entry.name for entry in FORMATS]
    assert main(["convert", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    written = {row["name"] for row in rows if row["writes"]}
    assert written == {"canonical", "dense", "asvd", "deinfer", "kfac"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give SRC and DST"),
        (["here"], "give SRC and DST"),
        (["nowhere", "out"], "SRC 'nowhere' does not exist"),
        (["here", "out", "--format", "x"], "--format 'x' is not one of canonical"),
        (["here", "out", "--to", "x"], "--to 'x' is not one of canonical"),
        (["here", "out", "--dtype", "int8"], "--dtype 'int8' is not one of float32"),
        (["here", "there"], "DST 'there' exists; see --overwrite"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    assert main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_project(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    for name in ("SVD-LLM", "ASVD", "Dobi-SVD", "Basis Sharing", "Palu", "AA-SVD", "LEMS", "GGUF"):
        assert name in text

"""_C.pyi says what the native module has, no more and no less."""

from __future__ import annotations

import ast
from pathlib import Path

import deinfer
from deinfer import _C

STUB = Path(deinfer.__file__).parent / "_C.pyi"


def stub_members() -> tuple[set[str], dict[str, set[str]]]:
    names: set[str] = set()
    classes: dict[str, set[str]] = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ClassDef):
            members = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            members |= {
                n.target.id
                for n in node.body
                if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            }
            classes[node.name] = members - {"__init__"}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names, classes


def test_the_stub_matches_the_module() -> None:
    names, classes = stub_members()
    public = {name for name in dir(_C) if not name.startswith("_")} | {"__version__"}
    assert public == names | set(classes)
    for name, members in classes.items():
        actual = {m for m in vars(getattr(_C, name)) if not m.startswith("_")}
        assert actual == members, name


def test_defaults_are_those_of_the_structs() -> None:
    for node in ast.parse(STUB.read_text()).body:
        if not isinstance(node, ast.ClassDef) or node.name not in (
            "SamplingParams",
            "EngineConfig",
            "PlannerConfig",
        ):
            continue
        init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
        given = {} if node.name == "SamplingParams" else {"model": "x"}
        value = getattr(_C, node.name)(**given)
        for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
            if default is not None:
                expected = ast.literal_eval(default)
                found = getattr(value, argument.arg)
                assert found == (list(expected) if isinstance(found, list) else expected), (
                    argument.arg
                )

"""The include rules of csrc/README.md: downward only, and no torch or Python in the core."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

# What a folder may include, besides itself and the public headers.
ALLOWED = {
    "base": set(),
    "kernels": {"base"},
    "comm": {"base", "kernels"},
    "scheduler": {"base"},
    "io": {"base"},
    "plan": {"base", "kernels", "comm", "scheduler", "io"},
    "ops": {"base", "kernels", "comm", "scheduler", "io", "plan"},
    "model": {"base", "kernels", "comm", "scheduler", "io", "plan", "ops"},
    "engine": {"base", "kernels", "comm", "scheduler", "io", "plan", "ops", "model"},
    "include": set(),
    "functional": {"base", "kernels", "comm", "scheduler", "io", "plan", "ops"},
    "capi": set(),  # public headers only
    "torch": set(),  # public headers only
    "python": set(),  # public headers only
}
QUOTED = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)
FOREIGN = re.compile(r"^\s*#include <(torch|ATen|c10|pybind11|Python\.h)", re.MULTILINE)
FOREIGN_LINE = re.compile(r"^\s*#include (<(?:torch|ATen|c10|pybind11|Python\.h).*)", re.MULTILINE)


def sources() -> list[Path]:
    return [p for p in sorted(CSRC.rglob("*")) if p.suffix in {".h", ".cc", ".cu", ".cuh"}]


def test_every_folder_has_a_rule() -> None:
    assert {p.name for p in CSRC.iterdir() if p.is_dir()} == set(ALLOWED)


def test_includes_go_only_downward() -> None:
    wrong = []
    for path in sources():
        folder = path.relative_to(CSRC).parts[0]
        for include in QUOTED.findall(path.read_text()):
            target = include.split("/")[0]
            if target != "deinfer" and target != folder and target not in ALLOWED[folder]:
                wrong.append(f"{path.relative_to(ROOT)}: {include}")
    assert len(sources()) > 40
    assert not wrong


def test_the_core_knows_neither_torch_nor_python() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.relative_to(CSRC).parts[0] not in ("python", "torch")
        and FOREIGN.search(path.read_text())
    ]
    assert not wrong


def test_torch_ops_use_the_stable_abi_only() -> None:
    stable = re.compile(r"<torch/(csrc/stable|headeronly)/")
    wrong = [
        f"{path.name}: {include}"
        for path in sorted((CSRC / "torch").iterdir())
        for include in FOREIGN_LINE.findall(path.read_text())
        if not stable.search(include)
    ]
    assert not wrong


def test_cuda_sources_include_only_kernels_and_tensor_h() -> None:
    for path in sources():
        if path.suffix in {".cu", ".cuh"}:
            for include in QUOTED.findall(path.read_text()):
                assert include.startswith("kernels/") or include == "deinfer/tensor.h", path

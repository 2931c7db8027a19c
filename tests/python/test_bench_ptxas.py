"""The report of what CUDA kernels use."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import ptxas

SYMBOL = "_ZN7deinfer4cuda41_GLOBAL__N__58ed91bf_9_linear_cu_8fb0c264"
LOG = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SYMBOL}18linear_many_kernelILi2ELb0EEEvNS0_E' for 'sm_80'
ptxas info    : Function properties for {SYMBOL}
    64 bytes stack frame, 420 bytes spill stores, 492 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 64 bytes cumulative stack size
ptxas info    : Compiling entry function '{SYMBOL}11norm_kernelENS0_E' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 5120 bytes smem
"""


def test_the_assemblers_words_become_numbers() -> None:
    kernels = ptxas.parse(LOG)
    assert kernels["sm_80"]["linear_many_kernel<2, 0>"] == {
        "stack_bytes": 64,
        "spill_store_bytes": 420,
        "spill_load_bytes": 492,
        "registers": 255,
        "shared_bytes": 0,
    }
    assert kernels["sm_90a"]["norm_kernel"]["shared_bytes"] == 5120
    assert ptxas.spilling(kernels) == ["linear_many_kernel<2, 0> (sm_80) spills 420 bytes"]


def test_other_names_stay() -> None:
    assert ptxas.kernel_name("main") == "main"


def test_a_spill_fails_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.json"
    assert ptxas.main(["report", str(tmp_path), str(out)]) == 1
    assert "no CUDA kernels" in capsys.readouterr().err
    (tmp_path / "a.cu.o.ptxas").write_text(LOG)
    assert ptxas.main(["report", str(tmp_path), str(out)]) == 1
    assert "spills 420 bytes" in capsys.readouterr().err
    clean = LOG.replace("420 bytes", "0 bytes").replace("492 bytes", "0 bytes")
    (tmp_path / "a.cu.o.ptxas").write_text(clean)
    assert ptxas.main(["report", str(tmp_path), str(out)]) == 0
    assert set(json.loads(out.read_text())) == {"sm_80", "sm_90a"}
    assert ptxas.main(["unknown"]) == 2


def test_the_compilers_own_words_are_passed_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.cu.o"
    script = f"import sys; sys.stderr.write({LOG!r} + 'a warning\\n'); sys.exit(0)"
    assert ptxas.main(["compile", sys.executable, "-c", script, "-o", str(target)]) == 0
    assert capfd.readouterr().err == "a warning\n"
    assert ptxas.parse((tmp_path / "a.cu.o.ptxas").read_text()) == ptxas.parse(LOG)
    assert ptxas.main(["compile", sys.executable, "-c", "import sys; sys.exit(3)"]) == 3

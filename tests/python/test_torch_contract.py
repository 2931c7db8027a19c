"""Everything that torch asks of a custom op, and of the library that brings it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("deinfer.torch_ops", reason="built without torch ops", exc_type=ImportError)

from deinfer import torch_ops  # noqa: E402
from torch_helpers import DTYPES, Paged, exact, factors, randn  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- what torch asks of an op ---------------------------------------------------------------------


def _calls(dtype: torch.dtype, *, grad: bool = False) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every op with arguments that it takes."""
    k, n = 10, 12

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) / 3).to(dtype).requires_grad_(grad)

    x, v, u, w, bias = leaf(3, k), leaf(4, k), leaf(n, 4), leaf(n, k), leaf(n)
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "lowrank_linear": (torch_ops.lowrank_linear, (x, v, u, bias)),
        "lowrank_linear without bias": (torch_ops.lowrank_linear, (x, v, u)),
        "lowrank_gated_mlp": (torch_ops.lowrank_gated_mlp, (x, v, u, None, w, None, bias)),
        "lowrank_qkv": (torch_ops.lowrank_qkv, (x, v, u, None, w, v, u, bias, None, None)),
    }
    if grad:
        return calls
    one = torch_ops.lowrank_pack([v], [u], [bias])
    two = torch_ops.lowrank_pack([v, None], [u, w], [None, bias])
    three = torch_ops.lowrank_pack([v, None, v], [u, w, u], [bias, None, None])
    paged = Paged([40, 30], [2, 1], dtype=dtype)
    key = randn(2, 2, 20, dtype=dtype)
    slots = torch.tensor([3, 17])
    return calls | {
        "lowrank_pack": (torch_ops.lowrank_pack, ([v, None], [u, w], [bias, None])),
        "lowrank_linear_packed": (torch_ops.lowrank_linear_packed, (x, one, n)),
        "lowrank_gated_mlp_packed": (torch_ops.lowrank_gated_mlp_packed, (x, two, n)),
        "lowrank_qkv_packed": (torch_ops.lowrank_qkv_packed, (x, three, n, n, n)),
        "kv_cache_write": (torch_ops.kv_cache_write, (key, key.clone(), *paged.caches, slots)),
        "paged_attention": (torch_ops.paged_attention, paged.arguments()),
    }


CALLS = list(_calls(torch.float32))
GRADIENTS = list(_calls(torch.float64, grad=True))


def test_every_op_is_checked() -> None:
    ops = {name for name in torch_ops.__all__ if name != "new_kv_cache"}
    assert {name.split()[0] for name in CALLS} == ops


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op, arguments = _calls(dtype)[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", GRADIENTS)
def test_opcheck_with_gradients(name: str) -> None:
    op, arguments = _calls(torch.float32, grad=True)[name]
    torch.library.opcheck(op, arguments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name: str) -> None:
    op, arguments = _calls(torch.float64, grad=True)[name]
    assert torch.autograd.gradcheck(op, arguments)


def test_gradients_by_the_kernels() -> None:
    (v, u), x, bias = factors(12, 10, 4, torch.float32), randn(2, 3, 10), randn(12)
    leaves = [t.requires_grad_() for t in (x, v, u, bias)]
    torch_ops.lowrank_linear(*leaves).square().sum().backward()
    actual = [t.grad for t in leaves]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact(*doubles).square().sum().backward()
    for a, b in zip(actual, doubles, strict=True):
        assert torch.allclose(a.double(), b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    op, arguments = _calls(torch.float32)[name]
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True)
    expected, actual = op(*arguments), compiled(*arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_compiled_for_any_batch() -> None:
    torch._dynamo.reset()
    v, u = factors(12, 10, 4, torch.float32)
    packed = torch_ops.lowrank_pack([v], [u], [None])
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    def f(x: Tensor) -> Tensor:
        y = torch_ops.lowrank_linear(x.relu(), v, u) + 1
        return y + torch_ops.lowrank_linear_packed(x, packed, 12)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for m in (2, 5, 64):
        x = randn(m, 10)
        assert torch.equal(compiled(x), f(x))
    assert compilations == 1


def test_mutation_survives_compilation() -> None:
    torch._dynamo.reset()
    caches = torch_ops.new_kv_cache(2, 1, 8, dtype=torch.float32)
    k, slots = randn(1, 1, 8), torch.tensor([17])

    def f() -> Tensor:
        torch_ops.kv_cache_write(k, k, *caches, slots)
        return caches[1].sum() * 1

    out = torch.compile(f, fullgraph=True)()
    torch.testing.assert_close(out, k.sum())
    assert torch.equal(caches[1][1, 0, 1], k[0, 0])


def test_autocast() -> None:
    (v, u), x = factors(12, 10, 4, torch.float32), randn(3, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch_ops.lowrank_linear(x, v, u)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch_ops.lowrank_linear(x.bfloat16(), v.bfloat16(), u.bfloat16()))


# --- the library ----------------------------------------------------------------------------------

# Versions of the symbols of glibc, libstdc++ and libgcc.
RUNTIME = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|^(_ITM_\w+|__gmon_start__)$")
DEINFER = re.compile(r"^_ZNK?7deinfer4v\d+_\d+")


def test_library_needs_the_stable_abi_only() -> None:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(torch_ops._LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = {line.split()[-1] for line in listing.splitlines()}
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    # What these declare is torch's stable interface; nothing else of torch may be needed.
    shims = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h")
    stable = set(re.findall(r"\w+", " ".join((include / name).read_text() for name in shims)))
    of_torch = {s for s in symbols if re.match(r"(aoti_)?torch_", s)}
    assert len(of_torch) > 20
    assert not sorted(of_torch - stable)
    others = symbols - of_torch
    assert not sorted(s for s in others if not RUNTIME.search(s) and not DEINFER.match(s))


def test_import_deinfer_does_not_import_torch() -> None:
    code = "import deinfer, sys; assert 'torch' not in sys.modules; deinfer.nn; deinfer.torch_ops"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_forked_process_has_threads_of_its_own() -> None:
    code = """
import os, torch
from deinfer import torch_ops
v, u, x = torch.randn(512, 1024), torch.randn(1024, 512), torch.randn(4, 1024)
torch.set_num_threads(2)
wanted = torch_ops.lowrank_linear(x, v, u)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(torch_ops.lowrank_linear(x, v, u), wanted) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

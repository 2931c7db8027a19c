"""torch.ops.deinfer against float64, and everything that torch asks of a custom op."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("deinfer.torch_ops", reason="built without torch ops", exc_type=ImportError)

from deinfer import torch_ops  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
# Of results that are sums of some hundred products of about 1: rounding of z and of the output.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float64: 1e-12}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def factors(n: int, k: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(r, k, dtype=dtype, scale=k**-0.5), randn(n, r, dtype=dtype, scale=r**-0.5)


def exact(x: Tensor, v: Tensor | None, u: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() if v is None else x.double() @ v.double().T
    y = y @ u.double().T
    return y if bias is None else y + bias.double()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected).abs() / (1 + expected.abs())
    assert error.max() < TOLERANCE[actual.dtype]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m, k, r, n", [(1, 64, 16, 48), (5, 37, 13, 29), (600, 96, 40, 130)])
def test_lowrank_linear_is_two_products(dtype: torch.dtype, m: int, k: int, r: int, n: int) -> None:
    x, (v, u), bias = randn(m, k, dtype=dtype), factors(n, k, r, dtype), randn(n, dtype=dtype)
    y = torch_ops.lowrank_linear(x, v, u, bias)
    assert y.dtype == dtype and y.shape == (m, n)
    assert_near(y, exact(x, v, u, bias))
    if dtype in DTYPES:
        packed = torch_ops.lowrank_pack([v], [u], [bias])
        assert torch.equal(torch_ops.lowrank_linear_packed(x, packed, n), y)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dense", [(), (0,), (1,), (0, 1, 2)])
def test_gated_mlp_and_qkv_take_dense_and_low_rank(
    dtype: torch.dtype, dense: tuple[int, ...]
) -> None:
    k, sizes, ranks = 48, (80, 80, 16), (20, 9, 7)
    x = randn(2, 3, k, dtype=dtype)
    v, u, bias = [], [], []
    for i, (n, r) in enumerate(zip(sizes, ranks, strict=True)):
        first, second = factors(n, k, r, dtype)
        v.append(None if i in dense else first)
        u.append(randn(n, k, dtype=dtype, scale=k**-0.5) if i in dense else second)
        bias.append(None if i == 1 else randn(n, dtype=dtype))
    outs = torch_ops.lowrank_qkv(x, v[0], u[0], v[1], u[1], v[2], u[2], *bias)
    for i, out in enumerate(outs):
        assert_near(out, exact(x, v[i], u[i], bias[i]))
    gate, up = (exact(x, v[i], u[i], bias[i]) for i in (0, 1))
    y = torch_ops.lowrank_gated_mlp(x, v[0], u[0], v[1], u[1], bias[0], bias[1])
    assert_near(y, torch.nn.functional.silu(gate) * up)
    if dtype in DTYPES:
        packed = torch_ops.lowrank_pack(v, u, bias)
        again = torch_ops.lowrank_qkv_packed(x, packed, *sizes)
        assert all(torch.equal(a, b) for a, b in zip(again, outs, strict=True))
        packed = torch_ops.lowrank_pack(v[:2], u[:2], bias[:2])
        assert torch.equal(torch_ops.lowrank_gated_mlp_packed(x, packed, 80), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_strided_and_by_any_number_of_threads(
    dtype: torch.dtype,
) -> None:
    k, n = 640, 704
    (v, u), wide = factors(n, k, 320, dtype), randn(40, 2 * k, dtype=dtype)
    packed, x = torch_ops.lowrank_pack([v], [u], [None]), wide[:, k:]
    whole = torch_ops.lowrank_linear_packed(x, packed, n)
    assert torch.equal(torch_ops.lowrank_linear_packed(x.contiguous(), packed, n), whole)
    assert torch.equal(torch_ops.lowrank_linear_packed(x[7], packed, n), whole[7])
    x3 = x.reshape(4, 10, k).transpose(0, 1)
    assert torch.equal(
        torch_ops.lowrank_linear_packed(x3, packed, n), whole.reshape(4, 10, n).transpose(0, 1)
    )
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(torch_ops.lowrank_linear_packed(x, packed, n), whole)
            assert torch.equal(torch_ops.lowrank_linear(x, v, u), whole)
    finally:
        torch.set_num_threads(threads)


def test_calls_of_several_threads_take_turns() -> None:
    k, n = 256, 512
    cases = [(randn(3 + i, k), *factors(n, k, 64 + i, torch.float32)) for i in range(4)]
    wanted = [torch_ops.lowrank_linear(*case) for case in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(torch_ops.lowrank_linear(*cases[index]), wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_packed_weights_can_be_stored_and_moved(tmp_path: Path) -> None:
    (v, u), x = factors(40, 24, 9, torch.bfloat16), randn(4, 24, dtype=torch.bfloat16)
    packed = torch_ops.lowrank_pack([v], [u], [None])
    torch.save(packed, tmp_path / "packed.pt")
    moved = torch.load(tmp_path / "packed.pt")
    assert torch.equal(
        torch_ops.lowrank_linear_packed(x, moved, 40),
        torch_ops.lowrank_linear_packed(x, packed, 40),
    )


def test_no_rows() -> None:
    v, u = factors(8, 6, 3, torch.float32)
    assert torch_ops.lowrank_linear(randn(0, 6), v, u).shape == (0, 8)


# --- bad input ------------------------------------------------------------------------------------


def _refusals() -> dict[str, tuple[Callable[[], Any], str]]:
    v, u = factors(8, 6, 3, torch.float32)
    x = randn(2, 6)
    packed = torch_ops.lowrank_pack([v], [u], [None])
    damaged = packed.clone()
    damaged[30] ^= 1
    version = packed.clone()
    version[8] = 99
    linear, with_packed = torch_ops.lowrank_linear, torch_ops.lowrank_linear_packed
    return {
        "x": (lambda: linear(randn(2, 5), v, u), "x has 5 columns, the linears take 6"),
        "factors": (lambda: linear(x, v[:2], u), r"v of linear 0 is \[2, 6\] and u \[8, 3\]"),
        "bias": (lambda: linear(x, v, u, randn(7)), r"bias of linear 0 is \[1, 7\], not \[1, 8\]"),
        "dtype": (lambda: linear(x, v.bfloat16(), u), "v is BFloat16 where Float is wanted"),
        "dims": (lambda: linear(x, v[0], u), r"v has shape \[6\], not 2 dimensions"),
        "number": (lambda: with_packed(torch.tensor(1.0), packed, 8), "x must have a dimension"),
        "outputs": (lambda: with_packed(x, packed, 9), "has 8 outputs, not 9"),
        "packed dtype": (lambda: with_packed(x.bfloat16(), packed, 8), "x is bfloat16"),
        "not packed": (lambda: with_packed(x, randn(9), 8), "packed is Float where Byte"),
        "zeros": (lambda: with_packed(x, torch.zeros_like(packed), 8), "no packed linears"),
        "short": (lambda: with_packed(x, packed[:-1].clone(), 8), f"need {len(packed)} bytes"),
        "misaligned": (
            lambda: with_packed(x, torch.cat([packed, packed])[1:], 8),
            "multiple of 64",
        ),
        "damaged": (lambda: with_packed(x, damaged, 8), "header of packed linears is damaged"),
        "version": (lambda: with_packed(x, version, 8), "layout version 99, this deinfer reads 1"),
        "one for two": (
            lambda: torch_ops.lowrank_gated_mlp_packed(x, packed, 8),
            "takes 2 packed linears, not 1",
        ),
        "too many": (lambda: torch_ops.lowrank_pack([v] * 4, [u] * 4, [None] * 4), "not 4"),
        "no u": (lambda: torch_ops.lowrank_pack([v], [], [None]), "not of 1, 0 and 1"),
        "lists": (lambda: torch_ops.lowrank_pack([v], [u], []), "not of 1, 1 and 0"),
        "pack dtype": (
            lambda: torch_ops.lowrank_pack([v.double()], [u.double()], [None]),
            "float32 or bfloat16, not Double",
        ),
        "gate and up": (
            lambda: torch_ops.lowrank_gated_mlp(x, v, u, v, u[:5]),
            "linear 1 of the packed weights has 5 outputs, not 8",
        ),
    }


@pytest.mark.parametrize("name", _refusals())
def test_bad_input_is_named(name: str) -> None:
    call, message = _refusals()[name]
    with pytest.raises(RuntimeError, match=message):
        call()


# --- paged attention ------------------------------------------------------------------------------


class Paged:
    """Sequences with random K and V, scattered over a cache."""

    def __init__(
        self,
        lengths: list[int],
        queries: list[int],
        *,
        heads: int = 6,
        kv_heads: int = 2,
        head_dim: int = 20,
        block_size: int = 32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        blocks = [-(-length // block_size) for length in lengths]
        self.caches = torch_ops.new_kv_cache(
            sum(blocks) + 3, kv_heads, head_dim, block_size=block_size, dtype=dtype
        )
        order = torch.randperm(sum(blocks) + 3, dtype=torch.int32)
        self.table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        self.k, self.v = [], []
        for s, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
            self.table[s, :count], order = order[:count], order[count:]
            k, v = (randn(length, kv_heads, head_dim, dtype=dtype) for _ in range(2))
            places = torch.arange(length)
            slots = self.table[s].long()[places // block_size] * block_size + places % block_size
            torch_ops.kv_cache_write(k, v, *self.caches, slots)
            self.k.append(k)
            self.v.append(v)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.q = randn(sum(queries), heads, head_dim, dtype=dtype)
        self.scale = head_dim**-0.5

    def arguments(self, window: int = 0) -> tuple[Any, ...]:
        return (
            self.q, *self.caches, self.table, self.starts, self.lengths, self.scale, window
        )  # fmt: skip

    def exact(self, window: int = 0) -> Tensor:
        outs = []
        group = self.q.shape[1] // self.k[0].shape[1]
        for s, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            q = self.q[self.starts[s] : self.starts[s + 1]].double()
            k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
            position = torch.arange(len(k))
            row = position[len(k) - len(q) :, None]
            visible = position <= row
            if window:
                visible &= position > row - window
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(outs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 40])
def test_paged_attention_of_prefill_and_decode(dtype: torch.dtype, window: int) -> None:
    paged = Paged([1, 70, 300, 33], [1, 1, 50, 0], dtype=dtype)
    out = torch_ops.paged_attention(*paged.arguments(window))
    assert out.dtype == dtype
    assert_near(out, paged.exact(window))


def test_slots_of_minus_one_are_not_written() -> None:
    paged = Paged([20], [1])
    before = [cache.clone() for cache in paged.caches]
    k = randn(2, 2, 20)
    torch_ops.kv_cache_write(k, k, *paged.caches, torch.tensor([-1, -1]))
    assert all(torch.equal(a, b) for a, b in zip(before, paged.caches, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.table.fill_(99), r"block_table\[0, 0\] is 99, the cache has 6 blocks"),
        (lambda p: p.lengths.fill_(200), "needs 7 blocks, block_table has columns for 2"),
        (lambda p: p.lengths.fill_(1), "sequence 0 has 2 queries and length 1"),
        (lambda p: p.starts.fill_(0), "query_starts must go from 0 to 3, not from 0 to 0"),
        (lambda p: setattr(p, "q", randn(3, 5, 20)), "a multiple of 2 kv heads"),
        (lambda p: setattr(p, "q", randn(3, 6, 16)), "the cache head_dim 20"),
        (lambda p: setattr(p, "lengths", p.lengths.long()), "lengths is Long where Int is wanted"),
    ],
)
def test_bad_sequences_are_named(change: Callable[[Paged], Any], message: str) -> None:
    paged = Paged([40, 30], [2, 1])
    change(paged)
    with pytest.raises(RuntimeError, match=message):
        torch_ops.paged_attention(*paged.arguments())


def test_bad_slots_are_named() -> None:
    k, v = torch_ops.new_kv_cache(2, 1, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"slots\[0\] is 32, the cache has 32 places"):
        torch_ops.kv_cache_write(randn(1, 1, 8), randn(1, 1, 8), k, v, torch.tensor([32]))
    with pytest.raises(ValueError, match="got 24"):
        torch_ops.new_kv_cache(1, 1, 8, block_size=24)


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


def test_readme_example() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (code,) = [example for example in examples if "deinfer.accelerate" in example]
    assert len(code.splitlines()) < 15
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["y"].shape == (4, 32)
    # And these are the model's and the layer's own factors.
    first, second = names["model"]
    with torch.no_grad():
        z = torch.randn(2, 64)
        expected = z @ first.weight.T @ second.weight.T + second.bias
        torch.testing.assert_close(names["model"](z), expected)

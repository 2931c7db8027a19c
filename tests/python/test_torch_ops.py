"""torch.ops.deinfer against float64: values, bad input, paged attention."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deinfer.torch_ops", reason="built without torch ops", exc_type=ImportError)

from deinfer import torch_ops  # noqa: E402
from torch_helpers import DTYPES, TOLERANCE, Paged, assert_near, exact, factors, randn  # noqa: E402


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

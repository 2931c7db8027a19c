"""deinfer's kernels as torch custom ops (`torch.ops.deinfer.*`).

Importing this module loads the library and registers the ops; the names below are their overloads,
which can be called directly and inside `torch.compile(fullgraph=True)`. x is [..., k]; a linear is
low-rank, V [r, k] and U [n, r], or dense, V None and U = W [n, k]; a bias is [n].

    lowrank_linear(x, v, u, bias=None) -> x V^T U^T + bias [..., n]
    lowrank_gated_mlp(x, gate_v, gate_u, up_v, up_u, gate_bias=None, up_bias=None)
        -> silu(gate) * up [..., n]
    lowrank_qkv(x, q_v, q_u, k_v, k_u, v_v, v_u, q_bias=None, k_bias=None, v_bias=None)
        -> (q, k, v): all V in one pass over x, then all U
    lowrank_pack(v, u, bias) of lists, of one to three linears -> packed weights, uint8 [bytes]
    lowrank_linear_packed(x, packed, out_features, ranks=[])
    lowrank_gated_mlp_packed(x, packed, out_features, ranks=[]), packed: gate, up
    lowrank_qkv_packed(x, packed, q_features, k_features, v_features, ranks=[])
    kv_cache_write(k, v, k_cache, v_cache, slots), which writes the caches
    paged_attention(q, k_cache, v_cache, block_table, query_starts, lengths, scale, window=0)
        -> as q

float32 and bfloat16 run on deinfer's kernels: float32 sums, z = V x rounded once to the dtype of
x; any other dtype (float64, float16) of the unpacked linears is aten's. The tensors of a call have
one dtype. Unpacked ops pack their weights in every call: they are for training and large batches.
Packed ones are for inference: they have no gradients, and read packed weights where they lie.
Packed bytes hold no addresses and may be stored; a library that lays weights out otherwise refuses
them. `ranks` are those of the packed linears (0: dense), which a CPU tensor knows by itself.

All take CUDA tensors, too, where deinfer is built with CUDA, in bfloat16, on torch's current stream
of their device: nothing waits, so CUDA graphs may capture them. Weights are packed on the device,
in another order than on the CPU; those bytes do not say what they are, so that `ranks` must be
given with them, and they are not to be stored. float32 of the unpacked linears is aten's there.
Slots, lengths and block tables in device memory are not checked; slots outside of the caches are
skipped. (None of this has run on a GPU yet.)

The unpacked linears have gradients of everything, and autocast to bfloat16.

Paged attention is causal and float32 or bfloat16. k_cache is [blocks, kv_heads, block_size / 16,
head_dim, 16 tokens], v_cache [blocks, kv_heads, block_size, head_dim] (`new_kv_cache`), block_size
a multiple of 16; on CUDA devices [blocks, kv_heads, block_size, width] and [blocks, kv_heads,
width, block_size], width the next of 64, 96, 128 and 256 from head_dim on, zero beyond that.
`kv_cache_write` takes k, v [tokens, kv_heads, head_dim] and distinct slots int64 [tokens]: block *
block_size + place in it, or -1: nowhere. `paged_attention` takes q [tokens, heads, head_dim], in
which rows query_starts[s] to query_starts[s + 1] (int32 [sequences + 1]) are the last tokens of
sequence s, of lengths[s] (int32 [sequences]) tokens, whose blocks are block_table[s] (int32
[sequences, most blocks]). `window`: positions that a token sees, itself included; 0: all.

Errors are RuntimeErrors that name the operand and its value. Ops use `torch.get_num_threads()`
threads at most, and may be called from any thread; calls take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

_LIBRARY = Path(__file__).parent / "libdeinfer_torch.so"

if not _LIBRARY.is_file():
    raise ImportError(
        "this deinfer was built without torch's custom ops: build it with torch >= 2.11 installed "
        "(pip install --no-build-isolation)"
    )
torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]

_ops = torch.ops.deinfer
lowrank_pack = _ops.lowrank_pack.default
lowrank_linear = _ops.lowrank_linear.default
lowrank_linear_packed = _ops.lowrank_linear_packed.default
lowrank_gated_mlp = _ops.lowrank_gated_mlp.default
lowrank_gated_mlp_packed = _ops.lowrank_gated_mlp_packed.default
lowrank_qkv = _ops.lowrank_qkv.default
lowrank_qkv_packed = _ops.lowrank_qkv_packed.default
kv_cache_write = _ops.kv_cache_write.default
paged_attention = _ops.paged_attention.default

__all__ = [
    "kv_cache_write",
    "lowrank_gated_mlp",
    "lowrank_gated_mlp_packed",
    "lowrank_linear",
    "lowrank_linear_packed",
    "lowrank_pack",
    "lowrank_qkv",
    "lowrank_qkv_packed",
    "new_kv_cache",
    "paged_attention",
]


_HEAD_WIDTHS = (64, 96, 128, 256)  # that the CUDA kernels are compiled for


def new_kv_cache(
    num_blocks: int,
    kv_heads: int,
    head_dim: int,
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Make empty caches of one attention layer.

    Args:
        num_blocks: Blocks of tokens.
        kv_heads: Heads of K and V.
        head_dim: Elements of a head.
        block_size: Tokens of a block, a multiple of 16.
        dtype: float32 or bfloat16; bfloat16 on CUDA devices.
        device: Where they are.

    Returns:
        k_cache and v_cache, as `kv_cache_write` and `paged_attention` take them.

    Raises:
        ValueError: `block_size` is no positive multiple of 16, or `head_dim` more than the 256 of
            the CUDA kernels.
    """
    if block_size <= 0 or block_size % 16:
        raise ValueError(f"block_size must be a positive multiple of 16, got {block_size}")
    zeros = partial(torch.zeros, dtype=dtype, device=device)
    if torch.device(device).type != "cuda":
        k = zeros(num_blocks, kv_heads, block_size // 16, head_dim, 16)
        return k, zeros(num_blocks, kv_heads, block_size, head_dim)
    width = next((width for width in _HEAD_WIDTHS if head_dim <= width), None)
    if width is None:
        raise ValueError(f"head_dim must be at most {_HEAD_WIDTHS[-1]}, got {head_dim}")
    k = zeros(num_blocks, kv_heads, block_size, width)
    return k, zeros(num_blocks, kv_heads, width, block_size)


# --- shapes, for tracing --------------------------------------------------------------------------


def _up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def _packed_bytes(v: Sequence[Tensor | None], u: Sequence[Tensor], bias: Sequence[Any]) -> int:
    """The size of csrc/functional/packed_format.h; for CUDA devices of cuda_ops.cc there."""
    if u[0].device.type == "cuda":
        return sum(map(_cuda_bytes, v, u))
    size = 128
    for first, second, b in zip(v, u, bias, strict=True):
        for matrix in (first, second):
            if matrix is not None:
                rows, cols = matrix.shape
                size += _up(_up(rows, 8) * _up(cols, 2) * matrix.element_size(), 64)
        if b is not None:
            size += 4 * _up(second.shape[0], 32)
    return size


def _cuda_bytes(v: Tensor | None, u: Tensor) -> int:
    """Bytes of one packed linear: tiles of V and U, and a bias."""
    n = _up(u.shape[0], 16)
    inner = _up(u.shape[1], 32)
    return 2 * n * inner + 4 * n + (0 if v is None else 2 * inner * _up(v.shape[1], 32))


def _rows(x: Tensor, cols: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], cols))


def _fake_pack(
    v: Sequence[Tensor | None], u: Sequence[Tensor], bias: Sequence[Tensor | None]
) -> Tensor:
    return u[0].new_empty((_packed_bytes(v, u, bias),), dtype=torch.uint8)


def _fake_linear(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    return _rows(x, u.shape[0])


def _fake_packed(x: Tensor, packed: Tensor, out_features: int, ranks: Sequence[int] = ()) -> Tensor:
    return _rows(x, out_features)


def _fake_gated_mlp(
    x: Tensor,
    gate_v: Tensor | None,
    gate_u: Tensor,
    up_v: Tensor | None,
    up_u: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    return _rows(x, gate_u.shape[0])


def _fake_qkv(
    x: Tensor,
    q_v: Tensor | None,
    q_u: Tensor,
    k_v: Tensor | None,
    k_u: Tensor,
    v_v: Tensor | None,
    v_u: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(x, q_u.shape[0]), _rows(x, k_u.shape[0]), _rows(x, v_u.shape[0])


def _fake_qkv_packed(
    x: Tensor,
    packed: Tensor,
    q_features: int,
    k_features: int,
    v_features: int,
    ranks: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(x, q_features), _rows(x, k_features), _rows(x, v_features)


def _fake_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    return None


def _fake_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    return q.new_empty(q.shape)


for _name, _fake in (
    ("lowrank_pack", _fake_pack),
    ("lowrank_linear", _fake_linear),
    ("lowrank_linear_packed", _fake_packed),
    ("lowrank_gated_mlp", _fake_gated_mlp),
    ("lowrank_gated_mlp_packed", _fake_packed),
    ("lowrank_qkv", _fake_qkv),
    ("lowrank_qkv_packed", _fake_qkv_packed),
    ("kv_cache_write", _fake_write),
    ("paged_attention", _fake_attention),
):
    torch.library.register_fake(f"deinfer::{_name}", _fake)


# --- gradients ------------------------------------------------------------------------------------

_Gradients = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def _gradients(
    x: Tensor, v: Tensor | None, u: Tensor, bias: Tensor | None, grad: Tensor
) -> _Gradients:
    """The gradients of x, v, u and bias, for `grad` of the output of one linear."""
    rows, outer = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    z = rows if v is None else rows @ v.T
    grad_z = outer @ u
    grad_x = (grad_z if v is None else grad_z @ v).reshape(x.shape)
    grad_v = None if v is None else grad_z.T @ rows
    return grad_x, grad_v, outer.T @ z, None if bias is None else outer.sum(0)


def _product(x: Tensor, v: Tensor | None, u: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x if v is None else linear(x, v), u, bias)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, grad: Tensor) -> _Gradients:
    x, v, u, bias = ctx.saved_tensors
    return _gradients(x, v, u, bias, grad)


def _gated_mlp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, gate_v, gate_u, up_v, up_u, gate_bias, up_bias = ctx.saved_tensors
    gate = _product(x, gate_v, gate_u, gate_bias)
    up = _product(x, up_v, up_u, up_bias)
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    x1, v1, u1, b1 = _gradients(x, gate_v, gate_u, gate_bias, grad * up * slope)
    x2, v2, u2, b2 = _gradients(x, up_v, up_u, up_bias, grad * silu(gate))
    return x1 + x2, v1, u1, v2, u2, b1, b2


def _qkv_backward(
    ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor | None, ...]:
    x, q_v, q_u, k_v, k_u, v_v, v_u, q_bias, k_bias, v_bias = ctx.saved_tensors
    x1, v1, u1, b1 = _gradients(x, q_v, q_u, q_bias, grad_q)
    x2, v2, u2, b2 = _gradients(x, k_v, k_u, k_bias, grad_k)
    x3, v3, u3, b3 = _gradients(x, v_v, v_u, v_bias, grad_v)
    return x1 + x2 + x3, v1, u1, v2, u2, v3, u3, b1, b2, b3


for _name, _backward in (
    ("lowrank_linear", _linear_backward),
    ("lowrank_gated_mlp", _gated_mlp_backward),
    ("lowrank_qkv", _qkv_backward),
):
    torch.library.register_autograd(f"deinfer::{_name}", _backward, setup_context=_save)
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"deinfer::{_name}", _device, torch.bfloat16)

"""torch.ops.deinfer on CUDA tensors; skipped where torch sees no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("deinfer.torch_ops", reason="built without torch ops", exc_type=ImportError)

from deinfer import nn, torch_ops  # noqa: E402
from torch_helpers import Paged, assert_near, exact, factors, randn  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")
pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def linear(n: int, k: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    v, u = factors(n, k, r, torch.bfloat16)
    return v.cuda(), u.cuda(), randn(n, dtype=torch.bfloat16).cuda()


@needs_gpu
@pytest.mark.parametrize("m, k, r, n", [(1, 64, 16, 48), (5, 37, 13, 29), (600, 96, 40, 130)])
def test_lowrank_linear_is_two_products(m: int, k: int, r: int, n: int) -> None:
    v, u, bias = linear(n, k, r)
    x = randn(m, 2 * k, dtype=torch.bfloat16).cuda()[:, k:]
    y = torch_ops.lowrank_linear(x, v, u, bias)
    assert y.device == x.device and y.dtype == torch.bfloat16
    assert_near(y, exact(x, v, u, bias))
    packed = torch_ops.lowrank_pack([v], [u], [bias])
    assert packed.device == x.device
    again = torch_ops.lowrank_linear_packed(x, packed, n, [r])
    assert torch.equal(again, y)
    assert torch.equal(torch_ops.lowrank_linear_packed(x[-1], packed, n, [r]), y[-1])


@needs_gpu
def test_gated_mlp_and_qkv_take_dense_and_low_rank() -> None:
    k, n = 48, 80
    x = randn(2, 3, k, dtype=torch.bfloat16).cuda()
    v, u, bias = linear(n, k, 20)
    w = randn(n, k, dtype=torch.bfloat16, scale=k**-0.5).cuda()
    q, key, value = torch_ops.lowrank_qkv(x, v, u, None, w, v, u, bias, None, None)
    for out, wanted in ((q, exact(x, v, u, bias)), (key, exact(x, None, w))):
        assert_near(out, wanted)
    assert_near(value, exact(x, v, u))
    y = torch_ops.lowrank_gated_mlp(x, v, u, None, w, None, bias)
    assert_near(y, torch.nn.functional.silu(exact(x, v, u)) * exact(x, None, w, bias))
    assert torch_ops.lowrank_linear(x[:0, 0], v, u).shape == (0, n)


@needs_gpu
def test_any_stream_and_graphs() -> None:
    v, u, bias = linear(48, 64, 16)
    packed = torch_ops.lowrank_pack([v], [u], [bias])
    x = randn(4, 64, dtype=torch.bfloat16).cuda()
    wanted = torch_ops.lowrank_linear_packed(x, packed, 48, [16])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = torch_ops.lowrank_linear_packed(x, packed, 48, [16])
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(other, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch_ops.lowrank_linear_packed(x, packed, 48, [16])
    x.neg_()
    graph.replay()
    assert torch.equal(captured, torch_ops.lowrank_linear_packed(x, packed, 48, [16]))


@needs_gpu
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_paged_attention_of_prefill_and_decode(window: int, head_dim: int) -> None:
    lengths, queries = [1, 70, 300, 33], [1, 1, 50, 0]
    paged = Paged(lengths, queries, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    out = torch_ops.paged_attention(*paged.arguments(window))
    assert_near(out.cpu(), paged.exact(window))


@needs_gpu
def test_modules_move_train_and_compile() -> None:
    layer = nn.LowRankLinear(64, 48, rank=16).to("cuda", torch.bfloat16)
    x = randn(3, 64, dtype=torch.bfloat16).cuda()
    layer(x).float().square().sum().backward()
    assert layer.v.weight.grad is not None
    with torch.inference_mode():
        y = layer(x)
        assert_near(y, exact(x, layer.v.weight, layer.u.weight, layer.u.bias))
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), y)


@needs_gpu
def test_what_is_unsupported_is_named() -> None:
    v, u, _ = linear(8, 6, 3)
    x = randn(2, 6, dtype=torch.bfloat16).cuda()
    packed = torch_ops.lowrank_pack([v], [u], [None])
    with pytest.raises(RuntimeError, match="on a CUDA device are bfloat16, not Float"):
        torch_ops.lowrank_pack([v.float()], [u.float()], [None])
    with pytest.raises(RuntimeError, match="x is float32: on CUDA devices"):
        torch_ops.lowrank_linear_packed(x.float(), packed, 8, [3])
    with pytest.raises(RuntimeError, match="ranks must be those of the 1 linears"):
        torch_ops.lowrank_linear_packed(x, packed, 8)
    with pytest.raises(RuntimeError, match="u must be on cuda:0, as the other tensors"):
        torch_ops.lowrank_linear(x, v, u.cpu())
    y = torch_ops.lowrank_linear(x.float(), v.float(), u.float())  # aten's
    assert_near(y, exact(x, v, u))


def test_packed_sizes_are_known_without_a_device() -> None:
    """What tracing says of packed weights is the layout of csrc/functional/cuda_ops.cc."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False):
        v = torch.empty(13, 37, device="cuda", dtype=torch.bfloat16)
        u = torch.empty(29, 13, device="cuda", dtype=torch.bfloat16)
        packed = torch_ops.lowrank_pack([v, None], [u, u.new_empty(50, 37)], [None, None])
        # Tiles of 16 x 32 bf16: V 2 x 2, U 2 x 1, W 4 x 2; biases of 32 and 64 floats.
        assert packed.shape == (1024 * (4 + 2 + 8) + 4 * (32 + 64),)
        x = torch.empty(5, 37, device="cuda", dtype=torch.bfloat16)
        assert torch_ops.lowrank_linear_packed(x, packed, 29, [13]).shape == (5, 29)

"""deinfer.nn and deinfer.accelerate: the same tokens as plain transformers, and the same names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("deinfer.torch_ops", reason="built without torch ops", exc_type=ImportError)

import deinfer  # noqa: E402
from checkpoints import write_model  # noqa: E402
from deinfer.decompose.reference import load_reference  # noqa: E402
from deinfer.nn import InnerFactor, LowRankLinear, OuterFactor, accelerate  # noqa: E402
from smollm2 import MODEL, chat_prompts, needs_model, write_decomposed  # noqa: E402

RANKS = {"q_proj": 24, "o_proj": 13, "gate_proj": 40, "down_proj": 21}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def generate(model: Any, prompt: list[int], count: int = 24) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


# --- the layouts of public formats (names as in their repositories) -------------------------------


class AsvdLinear(nn.Module):
    """ASVD: y = ALinear(BLinear(x))."""

    def __init__(self, v: nn.Linear, u: nn.Linear) -> None:
        super().__init__()
        self.BLinear, self.ALinear = v, u

    def forward(self, x: Tensor) -> Tensor:
        return self.ALinear(self.BLinear(x))


class DobiLinear(nn.Module):
    """Dobi-SVD: the same names, the other way round."""

    def __init__(self, v: nn.Linear, u: nn.Linear) -> None:
        super().__init__()
        self.ALinear, self.BLinear = v, u

    def forward(self, x: Tensor) -> Tensor:
        return self.BLinear(self.ALinear(x))


class KfacLinear(nn.Module):
    """KFAC-SVD: mod_a, mod_b."""

    def __init__(self, v: nn.Linear, u: nn.Linear) -> None:
        super().__init__()
        self.mod_a, self.mod_b = v, u

    def forward(self, x: Tensor) -> Tensor:
        return self.mod_b(self.mod_a(x))


class SvdLlmMlp(nn.Module):
    """SVD-LLM's MLP: factors are siblings, gate_u_proj and gate_v_proj."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        for name in ("gate", "up", "down"):
            pair = getattr(mlp, f"{name}_proj")
            if hasattr(pair, "v"):
                setattr(self, f"{name}_u_proj", pair.u)
                setattr(self, f"{name}_v_proj", pair.v)
            else:
                setattr(self, f"{name}_proj", pair)
        self.act_fn = mlp.act_fn

    def _linear(self, name: str, x: Tensor) -> Tensor:
        if hasattr(self, f"{name}_proj"):
            return getattr(self, f"{name}_proj")(x)
        return getattr(self, f"{name}_u_proj")(getattr(self, f"{name}_v_proj")(x))

    def forward(self, x: Tensor) -> Tensor:
        return self._linear("down", self.act_fn(self._linear("gate", x)) * self._linear("up", x))


PAIRS = {"asvd": AsvdLinear, "dobi": DobiLinear, "kfac": KfacLinear, "sequential": nn.Sequential}


def in_layout(model: Any, layout: str) -> Any:
    """A copy of one of our models, in another format's modules."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        if layout == "svd_llm":
            layer.mlp = SvdLlmMlp(layer.mlp)
        elif layout in PAIRS:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if hasattr(child, "v"):
                        setattr(parent, name, PAIRS[layout](child.v, child.u))
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return load_reference(write_model(path, RANKS))


@pytest.mark.parametrize("layout", ["ours", "svd_llm", *PAIRS])
def test_the_same_tokens_and_names_in_every_layout(tiny: Any, layout: str) -> None:
    plain = in_layout(tiny, layout)
    fast = accelerate(copy.deepcopy(plain))
    found = [m for m in fast.modules() if isinstance(m, OuterFactor)]
    # SVD-LLM's layout is that of the MLP here, where attention keeps ours.
    assert len(found) == len(RANKS) * len(fast.model.layers)
    assert generate(fast, [5, 17, 90]) == generate(plain, [5, 17, 90])
    before, after = plain.state_dict(), fast.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(m._packed is not None for m in found)


def test_accelerate_is_in_place_and_reads_new_weights(tiny: Any) -> None:
    model = copy.deepcopy(tiny)
    assert deinfer.accelerate(model) is model
    generate(model, [3], 2)
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.load_state_dict(other.state_dict())
    assert generate(model, [5, 17]) == generate(other, [5, 17])


def test_models_without_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="Sequential holds no pair"):
        accelerate(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)))  # the first has a bias
    square = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match="no pair"):
        accelerate(nn.Sequential(square, nn.ReLU(), square))


def test_square_matrices_are_told_apart_by_their_rank() -> None:
    v, u = nn.Linear(8, 3, bias=False), nn.Linear(3, 8)
    x = torch.randn(2, 8)
    for kind in (AsvdLinear, DobiLinear):
        model = kind(v, u)
        wanted = model(x)
        accelerate(model)
        torch.testing.assert_close(model(x), wanted)
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted)


# --- the module -----------------------------------------------------------------------------------


def module(dtype: torch.dtype = torch.float32) -> LowRankLinear:
    return LowRankLinear(24, 40, 9, dtype=dtype)


def plain(layer: LowRankLinear, x: Tensor) -> Tensor:
    z = nn.functional.linear(x, layer.v.weight)
    return nn.functional.linear(z, layer.u.weight, layer.u.bias)


def test_module_computes_trains_and_repacks() -> None:
    layer, x = module(), torch.randn(3, 24)
    assert list(layer.state_dict()) == ["v.weight", "u.weight", "u.bias"]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), plain(layer, x))
        before = layer.u._packed
        with torch.no_grad():
            assert layer(x) is not None and layer.u._packed is before
        loss = layer(x).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        optimizer.step()
        optimizer.zero_grad()


def test_module_follows_dtype_copies_and_files(tmp_path: Path) -> None:
    layer = module().eval()
    x = torch.randn(3, 24)
    with torch.inference_mode():
        wanted = layer(x)
        assert layer.u._packed is not None
        twin = copy.deepcopy(layer)
        assert twin.u._packed is None
        twin.v.weight.zero_()
        assert torch.equal(layer(x), wanted)
        assert not torch.equal(twin(x), wanted)
        torch.save(layer, tmp_path / "layer.pt")
        loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
        assert torch.equal(loaded(x), wanted)
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(half(x.bfloat16()).float(), wanted, rtol=0.03, atol=0.03)
        double = copy.deepcopy(layer).double()
        torch.testing.assert_close(double(x.double()).float(), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_module_from_factors() -> None:
    v, u, bias = torch.randn(3, 6), torch.randn(5, 3), torch.randn(5)
    layer = LowRankLinear.from_factors(v, u, bias)
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), x @ v.T @ u.T + bias)
    assert isinstance(layer.v, InnerFactor)
    with pytest.raises(ValueError, match=r"v \[3, 6\] and u \[5, 4\]"):
        LowRankLinear.from_factors(v, torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"bias has shape \[4\], not \[5\]"):
        LowRankLinear.from_factors(v, u, torch.randn(4))


def test_compiled_module() -> None:
    torch._dynamo.reset()
    layer, x = module().eval(), torch.randn(3, 24)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):  # packs in the first call
            torch.testing.assert_close(compiled(x), plain(layer, x))
        assert layer.u._packed is not None
        other = module().state_dict()
        layer.load_state_dict(other)
        torch.testing.assert_close(compiled(x), plain(layer, x))
    compiled.train()
    compiled(x).square().sum().backward()
    assert layer.v.weight.grad is not None


def test_compiled_model(tiny: Any) -> None:
    torch._dynamo.reset()
    model = accelerate(copy.deepcopy(tiny))
    ids = torch.tensor([[5, 17, 90, 4]])
    # What inductor makes of the ops is test_compiled_module's.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = tiny(ids, use_cache=False).logits
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, wanted, rtol=1e-3, atol=1e-3
        )


# --- SmolLM2 --------------------------------------------------------------------------------------


@needs_model
def test_smollm2_says_the_same(tmp_path: Path) -> None:
    path = MODEL.with_name(f"{MODEL.name}-keep0.8")  # of `make demo`
    if not (path / "config.json").is_file():
        path = write_decomposed(
            tmp_path / "decomposed", keep=None, which=lambda i, name: i % 3 == 0
        )
    prompts = chat_prompts(["What is the capital of France?", "Count to ten."])
    ours = load_reference(path)
    wanted = [generate(ours, prompt, 16) for prompt in prompts]
    for layout in ("ours", "svd_llm", "asvd"):
        model = accelerate(in_layout(ours, layout))
        assert [generate(model, prompt, 16) for prompt in prompts] == wanted, layout

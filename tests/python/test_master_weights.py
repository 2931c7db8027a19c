"""The optimizer of recovery: float32 weights behind a model that computes in another type."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from deinfer.decompose.master_weights import MasterWeights  # noqa: E402


def layer() -> Any:
    generator = torch.Generator().manual_seed(3)
    made = torch.nn.Linear(12, 7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def inputs(step: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(step)).to(dtype)


@pytest.mark.parametrize("size", [0.01, 3.0])  # gradients below and above the clipped norm
def test_in_float32_it_is_torch_s_adamw(size: float) -> None:
    ours, theirs = layer(), layer()
    theirs.bias.requires_grad_(False)
    master = MasterWeights(ours, {"weight": ours.weight}, torch.float32)
    optimizer = torch.optim.AdamW([theirs.weight], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(6):
        for model in (ours, theirs):
            (size * model(inputs(step)).square().sum()).backward()
        master.step(1e-2)
        torch.nn.utils.clip_grad_norm_([theirs.weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(master.values["weight"], ours.weight.detach())
    assert ours.weight.grad is None
    assert torch.equal(ours.bias, layer().bias)


def test_steps_too_small_for_bf16_add_up() -> None:
    model, before = layer(), layer().weight.detach()
    master = MasterWeights(model, {"weight": model.weight}, torch.bfloat16)
    assert model.weight.dtype == model.bias.dtype == torch.bfloat16
    for step in range(40):
        model(inputs(step, torch.bfloat16)).square().sum().backward()
        master.step(1e-5)
        assert torch.equal(model.weight, master.values["weight"].bfloat16())
    moved = (master.values["weight"] - before).abs().max()
    assert 1e-4 < moved <= 4.1e-4  # one step changes no number of this size in bf16

"""AdamW on float32 weights of a model that computes in bf16 (mixed precision, arXiv 1710.03740)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_BETAS = (0.9, 0.98)
_MAX_NORM = 1.0  # of the gradient of all weights together


def bf16_is_native() -> bool:
    """Whether the CPU multiplies bf16."""
    native: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(native())


class MasterWeights:
    """The weights of a model that move, and their optimizer.

    Args:
        model: Model in float32. All its parameters become `dtype`, in place; buffers stay.
        moving: Those of its parameters that move, by name.
        dtype: To compute in.

    Attributes:
        values: The weights in float32, by name.
    """

    def __init__(
        self, model: nn.Module, moving: Mapping[str, nn.Parameter], dtype: torch.dtype
    ) -> None:
        """Take the values."""
        self._moving = moving
        self.values = {name: parameter.detach() for name, parameter in moving.items()}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        self._optimizer = torch.optim.AdamW(
            list(self.values.values()), betas=_BETAS, weight_decay=0.0, fused=True
        )

    def step(self, rate: float) -> None:
        """Follow the gradients that the parameters have, and clear them.

        Args:
            rate: Learning rate.
        """
        gradients = [p.grad for p in self._moving.values() if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        for name, parameter in self._moving.items():
            value, gradient = self.values[name], parameter.grad
            if gradient is None:
                value.grad = None
                continue
            if value.grad is None:
                value.grad = torch.empty_like(value)
            value.grad.copy_(gradient)
            if norm > _MAX_NORM:
                value.grad *= _MAX_NORM / norm
            parameter.grad = None
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        for name, parameter in self._moving.items():
            if parameter.dtype != torch.float32:  # else they share memory
                parameter.data.copy_(self.values[name])

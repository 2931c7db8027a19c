"""AdamW on float32 weights of a model that computes in bf16 (mixed precision, arXiv 1710.03740)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_BETAS = (0.9, 0.98)
_MAX_NORM = 1.0  # of the gradient of all weights together


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
        for name, parameter in self._moving.items():
            gradient, parameter.grad = parameter.grad, None
            self.values[name].grad = None if gradient is None else gradient.float()
        torch.nn.utils.clip_grad_norm_(self.values.values(), _MAX_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, parameter in self._moving.items():
            if parameter.dtype != torch.float32:  # else they share memory
                parameter.data.copy_(self.values[name])

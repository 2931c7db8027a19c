"""Second moments of the linears of a block, summed up while it runs forwards and backwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_GRAM_TOKENS = 512


@dataclass(frozen=True)
class Needs:
    """Which statistics are wanted.

    Attributes:
        inputs: Second moments of the inputs.
        outputs: Second moments of the gradients of the outputs.
        powers: Mean squares of both.
    """

    inputs: bool
    outputs: bool
    powers: bool

    @property
    def forward(self) -> bool:
        """Whether inputs have to be seen."""
        return self.inputs or self.outputs or self.powers

    @property
    def backward(self) -> bool:
        """Whether gradients have to be seen."""
        return self.outputs or self.powers


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a linear W[n, k] with inputs x and output gradients g, means over tokens.

    Moments are on the shorter side, s = min(n, k), float64; what was not asked for is None or 1.

    Attributes:
        inputs: E[x xᵀ] [s, s] if n > k, else E[(Wx)(Wx)ᵀ].
        outputs: E[g gᵀ] [s, s] if n <= k, else E[(Wᵀg)(Wᵀg)ᵀ].
        input_power: Mean squared entry of x.
        output_power: Mean squared entry of g.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    input_power: float = 1.0
    output_power: float = 1.0


class BlockStatistics:
    """Listens to the linears of a block.

    Gradients are those of the negative log-likelihood of each next token, in nats, summed over a
    sequence. Grams over some hundred tokens are computed in float32 (of gradients: in the model's
    dtype, since their moments are shrunk anyway) and summed in float64.

    Args:
        linears: Layers of the block by name.
        needs: What to sum up.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], needs: Needs) -> None:
        """Start listening."""
        self._needs = needs
        self._sums = {name: _Sums(layer, needs) for name, layer in linears.items()}
        self._handles = [
            layer.register_forward_hook(_hook(self._sums[name], needs))
            for name, layer in linears.items()
        ]

    def finish(self) -> dict[str, LayerStatistics]:
        """Stop listening and return what was found, by name.

        Raises:
            ValueError: A moment is not finite.
        """
        for handle in self._handles:
            handle.remove()
        return {name: s.means(name) for name, s in self._sums.items()}


def _hook(sums: _Sums, needs: Needs) -> Any:
    """Make a forward hook that adds x at once and g when it arrives."""

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sums.add_forward(inputs[0].detach().flatten(0, -2), output.detach().flatten(0, -2))
        if needs.backward:
            handle: Any = output
            handle.register_hook(lambda g: sums.add_backward(g.flatten(0, -2)))

    return forward


class _Gram:
    """Sum of a aᵀ over many vectors a, float64."""

    def __init__(self, side: int) -> None:
        self.total = torch.zeros(side, side, dtype=torch.float64)
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Add rows [tokens, side]; they are kept until a Gram of them is worth computing."""
        self._waiting.append(rows)
        if sum(len(r) for r in self._waiting) >= _GRAM_TOKENS:
            self.flush()

    def flush(self) -> Tensor:
        """Bring the sum up to date and return it."""
        if self._waiting:
            rows = torch.cat(self._waiting)
            self.total += rows.T @ rows
            self._waiting.clear()
        return self.total


class _Sums:
    """Running sums of one layer W[n, k] over tokens; s = min(n, k)."""

    def __init__(self, layer: nn.Linear, needs: Needs) -> None:
        self.weight = layer.weight.detach()
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.needs = needs
        n, k = self.weight.shape
        self.wide = n <= k
        self.forward = _Gram(min(n, k)) if needs.inputs else None
        self.backward = _Gram(min(n, k)) if needs.outputs else None
        self.inputs = self.outputs = 0.0  # sums of |x|^2 and |g|^2
        self.tokens = 0

    def add_forward(self, x: Tensor, y: Tensor) -> None:
        """Add x [tokens, k] with y = W x + bias [tokens, n]."""
        if self.forward is not None:
            kept = x if not self.wide else y if self.bias is None else y - self.bias
            self.forward.add(kept.to(torch.promote_types(kept.dtype, torch.float32)))
        self.inputs += _power(x)
        self.tokens += len(x)

    def add_backward(self, g: Tensor) -> None:
        """Add output gradients g [tokens, n]."""
        if self.backward is not None:
            self.backward.add(g if self.wide else g @ self.weight)
        self.outputs += _power(g)

    def means(self, name: str) -> LayerStatistics:
        """Return means over tokens."""
        n, k = self.weight.shape
        found = LayerStatistics(
            inputs=None if self.forward is None else self.forward.flush() / self.tokens,
            outputs=None if self.backward is None else self.backward.flush() / self.tokens,
            input_power=self.inputs / self.tokens / k if self.needs.forward else 1.0,
            output_power=self.outputs / self.tokens / n if self.needs.backward else 1.0,
        )
        for moment in (found.inputs, found.outputs):
            if moment is not None and not bool(torch.isfinite(moment).all()):
                raise ValueError(f"activations or gradients of {name!r} are not finite")
        return found


def _power(rows: Tensor) -> float:
    """Sum of squares, with the sum over rows in float64."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return float(wide.square().sum(dim=1).double().sum())

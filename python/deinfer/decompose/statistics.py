"""Second moments of a model's linear layers, from one forward and backward pass per sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deinfer.decompose.factorize import Moments

_GRAM_TOKENS = 512


def collect_moments(
    model: Any,
    linears: Mapping[str, nn.Linear],
    sequences: Sequence[Sequence[int]],
    *,
    gradients: bool = True,
    progress: bool = True,
) -> dict[str, Moments]:
    """Collect the compact moments (see `factorize.Moments`) of every given layer.

    The gradient is that of the negative log-likelihood of each next token, in nats, summed over a
    sequence; moments are means over tokens. Grams over some hundred tokens are computed in float32
    (of gradients: in the model's dtype, since their moments are shrunk anyway) and summed in
    float64. Weights get no gradients, so the backward pass costs about one forward pass.

    Args:
        model: A transformers causal LM; its parameters' `requires_grad` is cleared.
        linears: Layers of that model by name.
        sequences: Token ids, each sequence at least two long; the statistics see no padding.
        gradients: Collect output-gradient moments too; otherwise they are the identity.
        progress: Show a progress bar.

    Returns:
        Moments by layer name, float64.

    Raises:
        ValueError: No sequence is given, one is too short, or the loss is not finite.
    """
    if not sequences or min(len(s) for s in sequences) < 2:
        raise ValueError("calibration needs sequences of at least 2 tokens")
    model.requires_grad_(False)
    sums = {name: _Sums(layer) for name, layer in linears.items()}
    handles = [
        layer.register_forward_hook(_hook(sums[name], gradients)) for name, layer in linears.items()
    ]
    try:
        bar = tqdm(sequences, desc="calibrate", unit="seq", disable=not progress)
        with torch.set_grad_enabled(gradients):
            for index, sequence in enumerate(bar):
                _run(model, sequence, index, gradients)
    finally:
        for handle in handles:
            handle.remove()
    return {name: s.moments(gradients) for name, s in sums.items()}


def _run(model: Any, sequence: Sequence[int], index: int, gradients: bool) -> None:
    ids = torch.tensor([list(sequence)])
    # With frozen weights the graph has to start somewhere: at the embedded tokens.
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(gradients)
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    if not gradients:
        return
    loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss of calibration sequence {index} is {loss.item()}")
    torch.autograd.backward(loss)


def _hook(sums: _Sums, gradients: bool) -> Any:
    """Make a forward hook that adds x at once and g when it arrives."""

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sums.add_forward(inputs[0].detach().flatten(0, -2), output.detach().flatten(0, -2))
        if gradients:
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

    def __init__(self, layer: nn.Linear) -> None:
        self.weight = layer.weight.detach()
        self.bias = None if layer.bias is None else layer.bias.detach()
        n, k = self.weight.shape
        self.wide = n <= k
        self.forward, self.backward = _Gram(min(n, k)), _Gram(min(n, k))
        self.inputs = self.outputs = 0.0  # sums of |x|^2 and |g|^2
        self.tokens = 0

    def add_forward(self, x: Tensor, y: Tensor) -> None:
        """Add x [tokens, k] with y = W x + bias [tokens, n]."""
        kept = x if not self.wide else y if self.bias is None else y - self.bias
        self.forward.add(kept.to(torch.promote_types(kept.dtype, torch.float32)))
        self.inputs += _power(x)
        self.tokens += len(x)

    def add_backward(self, g: Tensor) -> None:
        """Add output gradients g [tokens, n]."""
        self.backward.add(g if self.wide else g @ self.weight)
        self.outputs += _power(g)

    def moments(self, gradients: bool) -> Moments:
        """Return means over tokens."""
        n, k = self.weight.shape
        forward, input_power = self.forward.flush() / self.tokens, self.inputs / self.tokens / k
        if gradients:
            backward = self.backward.flush() / self.tokens
            output_power = self.outputs / self.tokens / n
        elif self.wide:
            backward, output_power = torch.eye(n, dtype=torch.float64), 1.0
        else:
            w = self.weight.double()
            backward, output_power = w.T @ w, 1.0
        if self.wide:
            return Moments(backward, forward, output_power, input_power)
        return Moments(forward, backward, input_power, output_power)


def _power(rows: Tensor) -> float:
    """Sum of squares, with the sum over rows in float64."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return float(wide.square().sum(dim=1).double().sum())

"""Adapt the second factors to the activations that the decomposed model itself produces.

Each layer's factors are optimal for inputs from the dense model, but at run time its inputs carry
the errors of all layers before it. Going through the blocks in order, with the dense and the
decomposed activations side by side, `u` is fitted again by least squares. Its target mixes what
the dense weight makes of the actual input with what it makes of the clean one: the first alone
never corrects an error, the second alone overfits (mixed targets: SAES-SVD, arXiv 2602.03051).
The output-gradient weights do not enter: the best `u` for a given `v` does not depend on them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deinfer.decompose.checkpoint import Factors
from deinfer.decompose.reference import install_factors
from deinfer.decompose.streaming import StreamedModel
from deinfer.decompose.sweep import cut_factors
from deinfer.decompose.workdir import RowReader, RowWriter, WorkDirectory, write_factors
from deinfer.progress import progress_bar

CLEAN_SHARE = 0.75
RIDGE = 0.03


def compensate(
    model: StreamedModel,
    work: WorkDirectory,
    ranks: dict[str, int | None],
    sequences: Sequence[Sequence[int]],
    *,
    progress: bool = True,
) -> None:
    """Leave the factors of every block, with each `u` fitted again, in the work directory.

    Args:
        model: Dense model.
        work: Where the spectra are, and the inputs of all blocks.
        ranks: By module name; None means dense.
        sequences: Those that the inputs are of.
        progress: Show a progress bar.
    """
    fit = _Fit(model, work, [len(s) for s in sequences])
    count = len(model.prefixes)
    bar = progress_bar(progress, iterable=range(count), desc="compensate", unit="block")
    for index in bar:
        if not any(work.has("low", later) for later in range(index + 1, count + 1)):
            fit.block(index, cut_factors(work, index, model.prefixes[index], ranks))


class _Reached(Exception):
    """The forward pass has come to where it was to stop."""


class _Fit:
    """Fits block after block."""

    def __init__(self, model: StreamedModel, work: WorkDirectory, lengths: Sequence[int]) -> None:
        self._model, self._work = model, work
        self._lengths = lengths

    def block(self, index: int, factors: dict[str, Factors]) -> None:
        """Fit a block, and run it on the decomposed model's activations."""
        dense = self._model.block(index)
        # The low-rank block shares with the dense one what stays as it is.
        shared: dict[int, Any] = {id(p): p for p in dense.parameters()}
        low = copy.deepcopy(dense, shared)
        install_factors(low, factors, self._model.dtype)
        with torch.no_grad():
            fitted = dict(factors)
            for leaves in _groups(self._model.linears, factors):
                pairs = self._group(index, dense, low, leaves, factors)
                fitted |= pairs
                for leaf, pair in pairs.items():
                    layer: Any = low.get_submodule(leaf)
                    layer.u.weight.copy_(pair.u)
            self._finish(index, low, fitted)

    def _finish(self, index: int, low: nn.Module, fitted: dict[str, Factors]) -> None:
        """Write factors and what comes out of the block."""
        write_factors(self._work, "factors", index, fitted)
        with self._work.writing("low", index + 1) as file, open(file, "wb") as out:
            rows = RowWriter(out)
            for _, x in self._pairs(index):
                rows.write(self._model.call(index, low, x))
        self._work.remove("low", index)

    def _group(
        self,
        index: int,
        dense: nn.Module,
        low: nn.Module,
        leaves: tuple[str, ...],
        factors: dict[str, Factors],
    ) -> dict[str, Factors]:
        """Fit linears that share an input."""
        sums = {}
        for leaf in leaves:
            layer: Any = dense.get_submodule(leaf)
            sums[leaf] = _LeastSquares(layer.weight, factors[leaf])
        for clean, actual in self._pairs(index):
            wanted = self._input_of(index, dense, leaves[0], clean)
            x = self._input_of(index, low, leaves[0], actual)
            target = torch.lerp(x, wanted, CLEAN_SHARE)
            for leaf in leaves:
                sums[leaf].add(x, target)
        return {leaf: s.solve() for leaf, s in sums.items()}

    def _input_of(self, index: int, block: nn.Module, leaf: str, hidden: Tensor) -> Tensor:
        """Run a block until a linear is reached; return that one's input [tokens, k]."""
        found: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0].flatten(0, -2))
            raise _Reached

        handle = block.get_submodule(leaf).register_forward_pre_hook(stop)
        try:
            self._model.call(index, block, hidden)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]

    def _pairs(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the dense and the decomposed model's residual stream before a block."""
        with open(self._work.file("inputs", index), "rb") as file, self._low(index) as low:
            dense = RowReader(file, self._model.hidden_size, self._model.dtype)
            for length in self._lengths:
                x = dense.read(length)
                yield x, x if low is None else low.read(length)

    @contextmanager
    def _low(self, index: int) -> Iterator[RowReader | None]:
        if index == 0:  # nothing has been decomposed yet
            yield None
            return
        with open(self._work.file("low", index), "rb") as file:
            yield RowReader(file, self._model.hidden_size, self._model.dtype)


class _LeastSquares:
    """Minimizes sum |u v x - W target|^2 + rho |u - u0|^2 over u."""

    def __init__(self, weight: Tensor, pair: Factors) -> None:
        self.weight, self.pair = weight, pair
        rank, k = pair.v.shape
        self.v = pair.v.float()
        self.gram = torch.zeros(rank, rank, dtype=torch.float64)
        self.cross = torch.zeros(k, rank, dtype=torch.float64)

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add inputs [tokens, k] and the targets before W."""
        z = x.float() @ self.v.T
        self.gram += z.T @ z
        self.cross += target.float().T @ z

    def solve(self) -> Factors:
        """Return the pair with the best u."""
        cross = self.weight.double() @ self.cross
        rho = RIDGE * self.gram.diagonal().mean()
        self.gram.diagonal().add_(rho.clamp_min(torch.finfo(torch.float64).tiny))
        u = torch.linalg.solve(self.gram, (cross + rho * self.pair.u).T).T.float()
        return Factors(u, self.pair.v) if bool(torch.isfinite(u).all()) else self.pair


def _groups(linears: Sequence[str], factors: dict[str, Factors]) -> list[tuple[str, ...]]:
    """Group decomposed linears by the input that they share, in the order in which they run."""
    qkv, output, inner, down = linears[:3], linears[3:4], linears[4:-1], linears[-1:]
    groups = [tuple(x for x in group if x in factors) for group in (qkv, output, inner, down)]
    return [group for group in groups if group]

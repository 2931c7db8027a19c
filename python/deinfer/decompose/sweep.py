"""Gather statistics of all blocks and factorize them, with one block in memory.

Forwards, the input of every block goes to disk; then the loss's gradient at the last output goes
backwards, each block being run again from its input. A block that has its statistics is factorized
for all ranks at once, and the factors go to disk as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from deinfer.decompose.allocate import candidate_ranks
from deinfer.decompose.checkpoint import Factors
from deinfer.decompose.factorize import Spectrum, factorize
from deinfer.decompose.method import Method
from deinfer.decompose.statistics import BlockStatistics, LayerStatistics, Needs
from deinfer.decompose.streaming import StreamedModel
from deinfer.decompose.workdir import RowReader, RowWriter, WorkDirectory
from deinfer.progress import progress_bar


class Sweep:
    """The way from a model and sequences to the spectra of its linears.

    Every step is found done or is done, so that a run goes on where another has ended.

    Args:
        model: Dense model.
        work: Where the state is.
        sequences: Token ids to calibrate on, at least two each.
        method: What the factors are to be optimal for.
        needs: Statistics for that and for the allocation of ranks.
        rank_multiple: Granularity of the ranks.
        keep_inputs: Leave the inputs of all blocks on disk.
        progress: Show progress bars.
    """

    def __init__(
        self,
        model: StreamedModel,
        work: WorkDirectory,
        sequences: Sequence[Sequence[int]],
        *,
        method: Method,
        needs: Needs,
        rank_multiple: int,
        keep_inputs: bool,
        progress: bool,
    ) -> None:
        """Bind to a run."""
        self._model, self._work, self._sequences = model, work, sequences
        self._method, self._needs, self._multiple = method, needs, rank_multiple
        self._keep_inputs, self._progress = keep_inputs, progress

    def run(self) -> None:
        """Leave the spectra of every block in the work directory.

        Raises:
            ValueError: A weight, an activation or the loss is not finite.
        """
        work, count = self._work, len(self._model.prefixes)
        if not self._needs.forward and not self._keep_inputs:
            for index in self._bar(range(count), "factorize"):
                if not work.has("spectra", index):
                    self._factorize(index, self._model.block(index), {})
            return
        if work.has("spectra", 0 if self._needs.backward else count - 1) and (
            self._needs.backward or work.has("inputs", count)
        ):
            return
        if not any(work.has("inputs", index) for index in range(count + 1)):
            self._embed()
        for index in self._bar(range(count), "forward"):
            if not any(work.has("inputs", later) for later in range(index + 1, count + 1)):
                self._forward(index)
        if self._needs.backward:
            if not any(work.has("gradients", index) for index in range(1, count + 1)):
                self._differentiate_head()
            for index in self._bar(range(count - 1, -1, -1), "backward"):
                if not any(work.has("gradients", before) for before in range(1, index + 1)):
                    self._backward(index)

    def _bar(self, indices: range, name: str) -> Iterable[int]:
        bar: Iterable[int] = progress_bar(self._progress, iterable=indices, desc=name, unit="block")
        return bar

    def _embed(self) -> None:
        """Write what the first block gets."""
        with self._model.ends(), self._writer("inputs", 0) as rows, torch.no_grad():
            for sequence in self._sequences:
                rows.write(self._model.embed(sequence))

    def _forward(self, index: int) -> None:
        """Run a block; its statistics are complete here if no gradients are needed."""
        block, only = self._model.block(index), not self._needs.backward
        listener = self._listen(block) if only else None
        with self._reader("inputs", index) as before, self._writer("inputs", index + 1) as after:
            with torch.no_grad():
                for sequence in self._sequences:
                    x = before.read(len(sequence))
                    after.write(self._model.call(index, block, x))
            if listener is not None:
                self._factorize(index, block, listener.finish())
        if not self._keep_inputs and only:
            self._work.remove("inputs", index)

    def _differentiate_head(self) -> None:
        """Write the gradient of the loss at the output of the last block."""
        last = len(self._model.prefixes)
        with (
            self._model.ends(),
            self._reader("inputs", last) as inputs,
            self._writer("gradients", last) as gradients,
        ):
            for number, sequence in enumerate(self._sequences):
                x = inputs.read(len(sequence)).requires_grad_()
                logits = self._model.logits(x)[:-1].float()
                targets = torch.tensor(list(sequence[1:]))
                loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
                if not bool(torch.isfinite(loss)):
                    raise ValueError(f"the loss of calibration sequence {number} is {loss.item()}")
                gradients.write(torch.autograd.grad(loss, x)[0])

    def _backward(self, index: int) -> None:
        """Run a block and send the gradient back through it; factorize it."""
        block = self._model.block(index)
        listener = self._listen(block)
        with (
            self._reader("inputs", index) as inputs,
            self._reader("gradients", index + 1) as after,
            self._writer("gradients", index) as before,
        ):
            for sequence in self._sequences:
                # With frozen weights the graph has to start at the input.
                x = inputs.read(len(sequence)).requires_grad_()
                y = self._model.call(index, block, x)
                before.write(torch.autograd.grad(y, x, after.read(len(sequence)))[0])
            self._factorize(index, block, listener.finish())
        self._work.remove("gradients", index + 1)
        if index == 0:
            self._work.remove("gradients")
        if not self._keep_inputs:
            self._work.remove("inputs", index + 1)

    def _listen(self, block: nn.Module) -> BlockStatistics:
        linears: dict[str, Any] = {leaf: block.get_submodule(leaf) for leaf in self._model.linears}
        return BlockStatistics(linears, self._needs)

    def _factorize(
        self, index: int, block: nn.Module, statistics: dict[str, LayerStatistics]
    ) -> None:
        """Write the spectra of a block."""
        tensors = {}
        for leaf in self._model.linears:
            layer: Any = block.get_submodule(leaf)
            weight = layer.weight.detach()
            moments = self._method.moments(weight, statistics.pop(leaf, LayerStatistics()))
            spectrum = factorize(weight, moments)
            n, k = weight.shape
            most = max(candidate_ranks(n, k, self._multiple), default=1)
            tensors[f"{leaf}.energies"] = spectrum.energies
            tensors[f"{leaf}.left"] = spectrum.left[:, :most].float()
            tensors[f"{leaf}.right"] = spectrum.right[:most].float()
        self._work.write_tensors("spectra", index, tensors)

    @contextmanager
    def _writer(self, stage: str, index: int) -> Iterator[RowWriter]:
        with self._work.writing(stage, index) as file, open(file, "wb") as out:
            yield RowWriter(out)

    @contextmanager
    def _reader(self, stage: str, index: int) -> Iterator[RowReader]:
        with open(self._work.file(stage, index), "rb") as file:
            yield RowReader(file, self._model.hidden_size, self._model.dtype)


def read_spectra(work: WorkDirectory, index: int) -> dict[str, Spectrum]:
    """Read the spectra of a block that a sweep has left.

    Args:
        work: Where the state is.
        index: 0 is the first block.

    Returns:
        Spectra by name within the block; factors are float32 and end at the largest useful rank.
    """
    tensors = work.read_tensors("spectra", index)
    leaves = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {
        leaf: Spectrum(*(tensors[f"{leaf}.{part}"] for part in ("energies", "left", "right")))
        for leaf in leaves
    }


def read_energies(work: WorkDirectory, index: int) -> dict[str, Tensor]:
    """Read the energies alone of what `read_spectra` reads."""
    with safe_open(work.file("spectra", index), framework="pt") as reader:
        names = [name for name in reader.keys() if name.endswith(".energies")]  # noqa: SIM118
        return {name.removesuffix(".energies"): reader.get_tensor(name) for name in names}


def cut_factors(
    work: WorkDirectory, index: int, prefix: str, ranks: Mapping[str, int | None]
) -> dict[str, Factors]:
    """Cut the spectra of a block at the ranks that were chosen.

    Args:
        work: Where the spectra are.
        index: 0 is the first block.
        prefix: Module name of the block, with a dot at the end.
        ranks: By module name; None means dense.

    Returns:
        Factors of the decomposed linears by name within the block.
    """
    pairs = {}
    for leaf, spectrum in read_spectra(work, index).items():
        rank = ranks[prefix + leaf]
        if rank is not None:
            pairs[leaf] = Factors(*spectrum.factors(rank))
    return pairs

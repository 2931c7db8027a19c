"""What a decomposition method is: the objective that the factors of one matrix are optimal for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from deinfer.decompose.factorize import Moments
from deinfer.decompose.statistics import LayerStatistics

INPUT_SHRINKAGE = 0.1
OUTPUT_SHRINKAGE = 0.2


@dataclass(frozen=True)
class Method:
    """A decomposition method.

    Attributes:
        name: Its name on the command line.
        inputs: Whether it needs second moments of the inputs.
        outputs: Whether it needs second moments of the gradients of the outputs.
        ranks: How it distributes ranks by default, see `allocate.RANKS`.
        compensate: Whether its factors are by default fitted to the decomposed model's activations,
            where little enough is kept.
        scales: By which the energies of some linears are multiplied where ranks are allocated.
        moments: Makes the moments that its factors are optimal for of a weight [n, k] and its
            statistics.
    """

    name: str
    inputs: bool
    outputs: bool
    ranks: str
    compensate: bool
    moments: Callable[[Tensor, LayerStatistics], Moments]
    scales: Mapping[str, float] = field(default_factory=dict)

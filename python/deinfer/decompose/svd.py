"""Plain truncated SVD: the smallest |W - W'|, whatever goes in. A baseline.

It leaves no usable language model. Given powers of inputs and gradients, its energies are in nats
like those of the other methods, so that ranks can be allocated; its factors do not depend on them.
"""

from __future__ import annotations

from torch import Tensor

from deinfer.decompose.factorize import Moments, assemble_moments
from deinfer.decompose.method import Method
from deinfer.decompose.statistics import LayerStatistics


def _moments(weight: Tensor, statistics: LayerStatistics) -> Moments:
    s = statistics
    return assemble_moments(weight, None, None, s.input_power, s.output_power)


METHOD = Method(
    "svd", inputs=False, outputs=False, ranks="uniform", compensate=False, moments=_moments
)

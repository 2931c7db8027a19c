"""Activation whitening: the smallest E|(W - W') x|² over calibration inputs x.

The objective of SVD-LLM (arXiv 2403.07378), whose optimum comes here from the eigenvectors of
W A Wᵀ or A^½ Wᵀ W A^½ (as in Swift-SVD, arXiv 2604.01609): A = E[x xᵀ] is not inverted and may be
singular.
"""

from __future__ import annotations

from torch import Tensor

from deinfer.decompose.factorize import Moments, assemble_moments, shrink
from deinfer.decompose.method import INPUT_SHRINKAGE, Method
from deinfer.decompose.statistics import LayerStatistics


def _moments(weight: Tensor, statistics: LayerStatistics) -> Moments:
    s = statistics
    moments = assemble_moments(weight, s.inputs, None, s.input_power, s.output_power)
    return shrink(weight, moments, INPUT_SHRINKAGE, 0.0)


METHOD = Method(
    "whitened", inputs=True, outputs=False, ranks="uniform", compensate=False, moments=_moments
)

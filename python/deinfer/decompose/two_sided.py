"""Two-sided whitening: the smallest E|B^½ (W - W') x|² with B = E[g gᵀ] of the output gradients g.

To second order this is the loss in nats that truncation costs, under KFAC's approximation of the
curvature; used by KFAC-SVD / LEMS (ICML 2026).
"""

from __future__ import annotations

from torch import Tensor

from deinfer.decompose.factorize import Moments, assemble_moments, shrink
from deinfer.decompose.method import INPUT_SHRINKAGE, OUTPUT_SHRINKAGE, Method
from deinfer.decompose.statistics import LayerStatistics


def _moments(weight: Tensor, statistics: LayerStatistics) -> Moments:
    s = statistics
    moments = assemble_moments(weight, s.inputs, s.outputs, s.input_power, s.output_power)
    return shrink(weight, moments, INPUT_SHRINKAGE, OUTPUT_SHRINKAGE)


# Truncating one kind of linear costs about this many times what the curvature predicts. Tokens are
# taken to be independent: softmax forgives errors of queries and keys, while the gate multiplies
# its own. Chosen by the held-out perplexity of SmolLM2-135M-Instruct, of few values; what another
# model would want has not been measured (bench/decompose.py --parts kinds does it).
_SCALES = {"q_proj": 0.5, "k_proj": 0.3, "gate_proj": 1.5}

METHOD = Method(
    "two_sided",
    inputs=True,
    outputs=True,
    ranks="allocated",
    compensate=True,
    moments=_moments,
    scales=_SCALES,
)

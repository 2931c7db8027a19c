"""Low-rank decomposition of language models, training-free or with recovery by distillation.

`decompose_model` is the entry point; `load_reference` reads its result with plain torch. Importing
this package loads torch, which `import deinfer` alone does not.
"""

from deinfer.decompose.allocate import RANKS
from deinfer.decompose.calibration import Sampler
from deinfer.decompose.methods import METHODS
from deinfer.decompose.pipeline import decompose_model
from deinfer.decompose.reference import load_reference
from deinfer.decompose.report import DecompositionReport

__all__ = [
    "METHODS",
    "RANKS",
    "DecompositionReport",
    "Sampler",
    "decompose_model",
    "load_reference",
]

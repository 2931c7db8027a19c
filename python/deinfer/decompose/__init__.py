"""Training-free low-rank decomposition of language models.

`decompose_model` is the entry point; `load_reference` reads its result with plain torch. Importing
this package loads torch, which `import deinfer` alone does not.
"""

from deinfer.decompose.calibration import Sampler
from deinfer.decompose.pipeline import METHODS, DecompositionReport, decompose_model
from deinfer.decompose.reference import load_reference

__all__ = ["METHODS", "DecompositionReport", "Sampler", "decompose_model", "load_reference"]

"""What transformers says, and how far something is from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from deinfer.decompose.reference import load_reference


def reference_logits(path: Path, tokens: list[int], dtype: torch.dtype) -> np.ndarray:
    with torch.no_grad():
        logits = load_reference(path, dtype)(torch.tensor([tokens])).logits[0]
    return np.asarray(logits.double().numpy())


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))

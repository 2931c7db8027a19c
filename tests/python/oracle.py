"""What transformers says, and how far something is from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from deinfer.decompose.reference import load_reference


def reference_logits(path: Path, tokens: list[int], dtype: torch.dtype) -> np.ndarray:
    with torch.no_grad():
        logits = load_reference(path, dtype)(torch.tensor([tokens])).logits[0]
    return np.asarray(logits.double().numpy())


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def greedy_tokens(model: Any, prompt: list[int], answer: list[int]) -> list[int]:
    """What transformers' greedy search would choose at each place of `answer`.

    One forward pass over prompt and answer: when the result equals `answer`, then by induction it
    is what token-by-token greedy search gives.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    return [int(token) for token in logits.argmax(-1)]

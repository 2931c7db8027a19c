"""SmolLM2-135M-Instruct in build/, and decompositions of it, for the tests that run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from deinfer.decompose.checkpoint import (
    Factors,
    linear_names,
    read_config,
    read_tensors,
    write_checkpoint,
)
from transformers import AutoTokenizer

MODEL = Path(__file__).resolve().parents[2] / "build" / "smollm2-135m-instruct"
needs_model = pytest.mark.skipif(
    not (MODEL / "config.json").is_file(), reason="needs `make build/smollm2-135m-instruct`"
)


def chat_prompts(questions: Sequence[str]) -> list[list[int]]:
    """The questions as a chat puts them to the model."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]


def truncated_svd(
    weight: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, s and V^T by the Gram matrix: a third of the time, and exact enough here."""
    if weight.shape[0] > weight.shape[1]:
        v, s, uh = truncated_svd(weight.T, rank)
        return uh.T, s, v.T
    squares, u = torch.linalg.eigh(weight @ weight.T)
    u, s = u[:, -rank:], squares[-rank:].clamp_min(1e-12).sqrt()
    return u, s, (u.T @ weight) / s[:, None]


def write_decomposed(
    path: Path, *, keep: float | None, which: Callable[[int, str], bool] = lambda index, name: True
) -> Path:
    """Decompose the linears of which `which(index, name)` holds, by a truncated SVD.

    `keep`: the share of the parameters that stays; None: all but a few singular values, which
    hardly changes the model. Ranks are odd and even.
    """
    tensors = read_tensors(MODEL)
    torch.manual_seed(0)
    factors = {}
    for i, name in enumerate(linear_names(read_config(MODEL))):
        if not which(i, name):
            continue
        weight = tensors[f"{name}.weight"].float()
        n, k = weight.shape
        if keep is None:
            u, s, vh = truncated_svd(weight, min(n, k) - 7 - i % 5)
        else:
            u, s, vh = truncated_svd(weight, int(keep * n * k / (n + k)))
        root = s.sqrt()
        factors[name] = Factors(u=u * root, v=root[:, None] * vh)
    write_checkpoint(MODEL, path, factors, {"method": "svd"})
    return path

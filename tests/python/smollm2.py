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


def write_decomposed(
    path: Path, *, keep: float | None, which: Callable[[int, str], bool] = lambda index, name: True
) -> Path:
    """Decompose the linears of which `which(index, name)` holds, by a quick truncated SVD.

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
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            rank = len(s) - 7 - i % 5
            u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        else:
            u, s, v = torch.svd_lowrank(weight, q=int(keep * n * k / (n + k)), niter=1)
            vh = v.T
        root = s.sqrt()
        factors[name] = Factors(u=u * root, v=root[:, None] * vh)
    write_checkpoint(MODEL, path, factors, {"method": "svd"})
    return path

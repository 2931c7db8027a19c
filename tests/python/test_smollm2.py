"""The native runtime against transformers on the real SmolLM2-135M-Instruct.

`make test` converts the model into build/ first; without it these tests skip.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deinfer import LLM, SamplingParams
from deinfer.decompose import load_reference
from deinfer.evaluate import perplexity
from oracle import greedy_tokens, relative_error
from smollm2 import MODEL, chat_prompts, needs_model, write_decomposed

pytestmark = needs_model

QUESTIONS = [
    "What is the capital of France?",
    "Give three tips for staying healthy.",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "What is 17 plus 25?",
    "Name four animals that live in Africa.",
    "Explain photosynthesis in two sentences.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "How do I boil an egg?",
    "List the primary colours.",
    "What does a software engineer do?",
    "Tell me a fact about the moon.",
    "Write a polite email asking for a day off.",
    "What is the difference between a frog and a toad?",
    "Summarize the story of Cinderella.",
    "How many minutes are in three hours?",
    "Suggest a name for a small bakery.",
    "What causes the tides?",
    "Write a Python function that adds two numbers.",
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return chat_prompts(QUESTIONS)


@dataclass
class Reference:
    """A model and what transformers gives in float32, computed once."""

    path: Path
    model: Any
    logits: list[np.ndarray]


@pytest.fixture(scope="module", params=["dense", "decomposed"])
def reference(
    request: pytest.FixtureRequest,
    prompts: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Reference:
    path = MODEL
    if request.param == "decomposed":  # half of the matrices, near their full rank
        path = write_decomposed(
            tmp_path_factory.mktemp("decomposed") / "model",
            keep=None,
            which=lambda i, name: i % 2 == 0,
        )
    model = load_reference(path, torch.float32)
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]
    return Reference(path, model, logits)


def test_float32(reference: Reference, prompts: list[list[int]]) -> None:
    llm = LLM(str(reference.path), dtype="float32", num_kv_blocks=1024)
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    answers = llm.generate(prompts, params, use_tqdm=False)
    errors = []
    for prompt, answer, expected in zip(prompts, answers, reference.logits, strict=True):
        tokens = answer.outputs[0].token_ids
        assert len(tokens) == 32
        assert tokens == greedy_tokens(reference.model, prompt, tokens)
        errors.append(relative_error(llm.prompt_logits(prompt), expected))
    assert max(errors) < 2e-4


def test_bfloat16(reference: Reference, prompts: list[list[int]]) -> None:
    # Seconds a prompt where the CPU has no bf16 products for torch.
    count = 8
    bf16_model = load_reference(reference.path, torch.bfloat16)
    llm = LLM(str(reference.path), dtype="bfloat16", num_kv_blocks=1024)
    ours, theirs = [], []
    for prompt, exact in zip(prompts[:count], reference.logits, strict=False):
        with torch.no_grad():
            rounded = bf16_model(torch.tensor([prompt])).logits[0].float().numpy()
        ours.append(relative_error(llm.prompt_logits(prompt), exact))
        theirs.append(relative_error(rounded, exact))
    assert np.mean(ours) <= np.mean(theirs)
    assert sum(o <= t for o, t in zip(ours, theirs, strict=True)) >= count - 1


def test_int8_perplexity_is_within_a_percent_of_bfloat16() -> None:
    text = (resources.files("deinfer") / "data" / "heldout.txt").read_text()[:5000]
    measured = {}
    for dtype in ("bfloat16", "int8"):
        llm = LLM(str(MODEL), dtype=dtype, num_kv_blocks=1024)
        measured[dtype] = perplexity(llm, text, window=512).perplexity
    assert measured["int8"] <= 1.01 * measured["bfloat16"]

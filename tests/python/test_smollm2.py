"""The native runtime against transformers on the real SmolLM2-135M-Instruct.

`make test` converts the model into build/ first; without it these tests skip.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

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


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the matrices, near their full rank."""
    path = tmp_path_factory.mktemp("decomposed") / "model"
    return write_decomposed(path, keep=None, which=lambda i, name: i % 2 == 0)


def check_float32(path: Path, prompts: list[list[int]]) -> None:
    model = load_reference(path, torch.float32)
    llm = LLM(str(path), dtype="float32", num_kv_blocks=1024)
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    answers = llm.generate(prompts, params, use_tqdm=False)
    errors = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0].numpy()
        tokens = answer.outputs[0].token_ids
        assert len(tokens) == 64
        assert tokens == greedy_tokens(model, prompt, tokens)
        errors.append(relative_error(llm.prompt_logits(prompt), expected))
    assert max(errors) < 2e-4


def check_bfloat16(path: Path, prompts: list[list[int]]) -> None:
    exact_model = load_reference(path, torch.float32)
    bf16_model = load_reference(path, torch.bfloat16)
    llm = LLM(str(path), dtype="bfloat16", num_kv_blocks=1024)
    ours, theirs = [], []
    for prompt in prompts:
        with torch.no_grad():
            exact = exact_model(torch.tensor([prompt])).logits[0].numpy()
            rounded = bf16_model(torch.tensor([prompt])).logits[0].float().numpy()
        ours.append(relative_error(llm.prompt_logits(prompt), exact))
        theirs.append(relative_error(rounded, exact))
    assert np.mean(ours) <= np.mean(theirs)
    assert sum(o <= t for o, t in zip(ours, theirs, strict=True)) >= 18


def test_dense_float32(prompts: list[list[int]]) -> None:
    check_float32(MODEL, prompts)


def test_dense_bfloat16(prompts: list[list[int]]) -> None:
    check_bfloat16(MODEL, prompts)


def test_decomposed_float32(prompts: list[list[int]], decomposed: Path) -> None:
    check_float32(decomposed, prompts)


def test_decomposed_bfloat16(prompts: list[list[int]], decomposed: Path) -> None:
    check_bfloat16(decomposed, prompts)


def test_int8_perplexity_is_within_a_percent_of_bfloat16() -> None:
    text = (resources.files("deinfer") / "data" / "heldout.txt").read_text()
    measured = {}
    for dtype in ("bfloat16", "int8"):
        llm = LLM(str(MODEL), dtype=dtype, num_kv_blocks=1024)
        measured[dtype] = perplexity(llm, text).perplexity
    assert measured["int8"] <= 1.01 * measured["bfloat16"]

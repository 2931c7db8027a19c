"""Ranks and plans on the real SmolLM2-135M-Instruct, decomposed: the tokens of one rank.

tests/cpp/tensor_parallel_test.cc has the plans on small models of every kind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from deinfer import LLM, SamplingParams
from deinfer.decompose import load_reference
from oracle import relative_error
from smollm2 import MODEL, chat_prompts, needs_model, write_decomposed

pytestmark = needs_model

PLANS = [
    "dense",
    "naive",
    "rank_gather",
    "hidden_sharded",
    "two_collective",
    "token_sharded",
]
TOKENS = 16
QUESTIONS = ["What is the capital of France?", "Give three tips.", "Who wrote Hamlet?"]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return chat_prompts(QUESTIONS)


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every matrix at the rank that keeps 0.8 of its parameters, odd ranks included."""
    return write_decomposed(tmp_path_factory.mktemp("decomposed") / "model", keep=0.8)


def load(path: Path, plan: str, size: int, dtype: str) -> LLM:
    return LLM(
        path,
        dtype=dtype,
        tensor_parallel_size=size,
        tensor_parallel_plan=plan,
        num_threads=1,
        num_kv_blocks=256,
        use_tqdm_on_load=False,
    )


@pytest.fixture(scope="module")
def answers(decomposed: Path, prompts: list[list[int]]) -> list[list[int]]:
    return generate(load(decomposed, "auto", 1, "float32"), prompts)


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return [list(r.outputs[0].token_ids) for r in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_float32_greedy_tokens(
    decomposed: Path, prompts: list[list[int]], answers: list[list[int]], plan: str, size: int
) -> None:
    assert all(len(answer) == TOKENS for answer in answers)
    assert generate(load(decomposed, plan, size, "float32"), prompts) == answers


def test_bfloat16_error_is_that_of_one_rank(tmp_path: Path, prompts: list[list[int]]) -> None:
    # Not the truncated model, which makes noise of roundings.
    path = write_decomposed(
        tmp_path / "model", keep=None, which=lambda i, name: int(name.split(".")[2]) % 5 == 0
    )
    with torch.no_grad():
        model = load_reference(path, torch.float64)
        exact = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]

    def error(plan: str, size: int) -> float:
        llm = load(path, plan, size, "bfloat16")
        pairs = zip(prompts, exact, strict=True)
        return float(np.mean([relative_error(llm.prompt_logits(p), e) for p, e in pairs]))

    alone = error("auto", 1)
    errors = {plan: error(plan, 4) for plan in PLANS}
    assert max(errors.values()) <= 1.1 * alone, (errors, alone)


def test_what_ranks_hold(decomposed: Path) -> None:
    whole = load(decomposed, "auto", 1, "bfloat16").model_info
    llm = load(decomposed, "hidden_sharded", 3, "bfloat16")  # 3 kv heads: nothing is replicated
    info = llm.model_info
    assert info.tensor_parallel_size == 3
    assert (info.decode_plan, info.prefill_plan) == ("hidden_sharded", "hidden_sharded")
    assert len(info.rank_weight_bytes) == 3
    assert info.weight_bytes == sum(info.rank_weight_bytes)
    assert info.weight_bytes <= 1.03 * whole.weight_bytes  # padding
    assert max(info.rank_weight_bytes) <= 1.05 * whole.weight_bytes / 3
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False)
    kinds = {c.name: c.calls for c in llm.stats.collectives}
    assert kinds["all_reduce"] == 2 * 4 * 30


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tensor_parallel_plan", "magic", "tensor_parallel_plan.*magic"),
        ("tensor_parallel_size", 10, "10.*9"),
        ("emulated_link", "carrier pigeon", "carrier pigeon"),
    ],
)
def test_bad_values(field: str, value: object, message: str) -> None:
    arguments = {"tensor_parallel_size": 2, field: value}
    with pytest.raises(ValueError, match=message):
        LLM(MODEL, use_tqdm_on_load=False, **arguments)


def test_a_bad_link_is_one_without_ranks_too() -> None:
    with pytest.raises(ValueError, match="carrier pigeon"):
        LLM(MODEL, use_tqdm_on_load=False, emulated_link="carrier pigeon")

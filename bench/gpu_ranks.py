"""Checks tensor-parallel ranks on one GPU: every plan with 1, 2, 4 and 8 of them.

Part of bench/gpu.py; alone, with a package that was built for the device:

    python bench/gpu_ranks.py build/gpu/models

Greedy answers and their log-probabilities in lockstep, where ranks run one after another, must have
the bits of those by graphs, where they wait for each other on the device. Tokens are compared with
those of one rank, of which those of other ranks may differ by rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Check

PLANS = (
    "dense",
    "naive",
    "rank_gather",
    "hidden_sharded",
    "two_collective",
    "token_sharded",
)
SIZES = (2, 4, 8)
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8000,
    "max_position_embeddings": 512,
}
KEEP = 0.5
PROMPTS = 6
NEW_TOKENS = 48
Answers = list[tuple[list[int], list[float]]]  # tokens and their log-probabilities, by prompt


@contextmanager
def lockstep() -> Iterator[None]:
    """Engines that are made here run their ranks one after another."""
    os.environ["DEINFER_CUDA_LOCKSTEP"] = "1"
    try:
        yield
    finally:
        del os.environ["DEINFER_CUDA_LOCKSTEP"]


def answer(model: Path, device: str, size: int, plan: str) -> tuple[Answers, float]:
    """Greedy answers to the prompts, and the median of the milliseconds of a decode step."""
    from deinfer import _C, SamplingParams

    config = _C.EngineConfig(
        model=str(model),
        device=device,
        dtype="bfloat16",
        tensor_parallel_size=size,
        tensor_parallel_plan=plan,
        max_model_len=256,
        max_num_seqs=PROMPTS,
        max_num_batched_tokens=256,
    )
    engine = _C.Engine(config)
    numbers = random.Random(0)
    answers: dict[int, tuple[list[int], list[float]]] = {}
    for i in range(PROMPTS):
        prompt = [numbers.randrange(3, engine.model_info.vocab_size) for _ in range(7 + 9 * i)]
        logprobs = 1 if i % 2 else None  # of these the logits travel, of the others the best token
        params = SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=logprobs
        )
        answers[engine.submit(prompt, params)] = ([], [])
    times = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = engine.step()
        times.append(1e3 * (time.perf_counter() - start))
        for output in outputs:
            for sample in output.outputs:
                tokens, logprobs_of_tokens = answers[output.request_id]
                tokens += sample.new_token_ids
                logprobs_of_tokens += [entry[0].logprob for entry in sample.logprobs]
    return list(answers.values()), statistics.median(times)


def equal_tokens(answers: Answers, others: Answers) -> float:
    """The share of tokens before the first other one of each answer."""
    same = 0
    for (tokens, _), (theirs, _) in zip(answers, others, strict=True):
        pairs = list(zip(tokens, theirs, strict=True))
        same += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return same / sum(len(tokens) for tokens, _ in answers)


def measure(folder: Path, device: str = "cuda", sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """What every plan gives with every number of ranks, by "PLAN SIZE"."""
    from random_llama import write_random_llama

    model = write_random_llama(folder / "llama-ranks", keep=KEEP, **SHAPE)
    results: dict[str, Any] = {}
    for plan in PLANS:
        one, step_ms = answer(model, device, 1, plan)
        results[f"{plan} 1"] = {"step_ms": step_ms}
        for size in sizes:
            answers, step_ms = answer(model, device, size, plan)
            with lockstep():
                in_turn, _ = answer(model, device, size, plan)
            results[f"{plan} {size}"] = {
                "step_ms": step_ms,
                "equal_tokens": equal_tokens(answers, one),
                "lockstep_equal": answers == in_turn,
            }
    return results


def judge(measured: dict[str, Any]) -> list[Check]:
    """The checks on what measure() gave."""
    several = [result for result in measured.values() if "equal_tokens" in result]
    others = sum(not result["lockstep_equal"] for result in several)
    share = min(result["equal_tokens"] for result in several)
    return [
        Check("plans and ranks that differ in lockstep", others, 0, at_least=False),
        # Random weights have many ties: after one that falls otherwise all tokens differ.
        Check("tokens as of one rank, worst plan", share, 0.3),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the checks, or writes what they judge."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="folder for the random model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON, instead of the checks")
    options = parser.parse_args(arguments)
    measured = measure(options.models, options.device)
    if options.out:
        options.out.write_text(json.dumps(measured))
        return
    for name, result in measured.items():
        print(name, result)
    for check in judge(measured):
        print(check)


if __name__ == "__main__":
    main()

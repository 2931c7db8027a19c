"""What bench/gpu.py checks of one GPU beside its times: tokens, kernels' share, torch's ops.

`agreement` compares the CUDA engine's greedy tokens with the CPU engine's: they are equal, or the
first that differs is a tie, which bf16 can decide either way. `busy_ms` is the time in which the
device computes during a step, by torch's profiler, which sees all streams of the process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT
from numpy.typing import NDArray

TOKENS = 64
SANITIZERS = ("memcheck", "racecheck", "synccheck")
KERNEL_TESTS = (
    "attention",
    "latent_attention",
    "linear",
    "ops",
    "ops_attention",
    "rows",
    "sampling",
)
SANITIZER_SECONDS = 300
QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a haiku about the sea.",
    "How do I boil an egg?",
    "Name three animals that live in Africa.",
    "What is 17 plus 25?",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What does a compiler do?",
    "Translate 'good morning' into Spanish.",
    "Why do we have seasons?",
    "List the planets of the solar system.",
    "Tell me a short story about a dog.",
    "What is photosynthesis?",
    "How many days are there in a leap year?",
    "Describe the taste of an apple.",
    "What is the largest ocean?",
    "Write a sentence with the word 'lantern'.",
    "How does a bicycle stay upright?",
    "What should I do when I cannot sleep?",
)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place at which two lists of tokens differ; None where they are equal."""
    for place, (x, y) in enumerate(zip(a, b, strict=True)):
        if x != y:
            return place
    return None


def is_tie(
    exact: NDArray[np.float32], rounded: NDArray[np.float32], tokens: tuple[int, int]
) -> bool:
    """Whether rounding can decide which of two tokens is the more likely one.

    Args:
        exact: fp32 logits [vocabulary].
        rounded: The same in bf16 arithmetic.
        tokens: The two.
    """
    gap = abs(float(exact[tokens[0]]) - float(exact[tokens[1]]))
    return gap <= 2 * float(np.abs(exact - rounded).max())


def agreement(model: Path, device: str = "cuda", tokens: int = TOKENS) -> dict[str, Any]:
    """How the greedy tokens of `device` agree with the CPU's for the QUESTIONS.

    Returns:
        "equal" answers, "ties" that differ first at a tie, and of the "others" question and place.
    """
    from deinfer import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    cpu = LLM(str(model), dtype="bfloat16")
    answers = {
        "cpu": cpu.chat(chats, params, use_tqdm=False),
        device: LLM(str(model), device=device, dtype="bfloat16").chat(
            chats, params, use_tqdm=False
        ),
    }
    fp32 = None
    result: dict[str, Any] = {"equal": 0, "ties": 0, "others": []}
    for question, one, other in zip(QUESTIONS, answers["cpu"], answers[device], strict=True):
        ours, theirs = other.outputs[0].token_ids, one.outputs[0].token_ids
        place = first_difference(ours, theirs)
        if place is None:
            result["equal"] += 1
            continue
        fp32 = fp32 or LLM(str(model), dtype="float32")
        prefix = [*one.prompt_token_ids, *theirs[:place]]
        exact, rounded = (engine.prompt_logits(prefix)[-1] for engine in (fp32, cpu))
        if is_tie(exact, rounded, (ours[place], theirs[place])):
            result["ties"] += 1
        else:
            result["others"].append({"question": question, "place": place})
    return result


def busy_of(events: Iterable[tuple[str, float, float]]) -> float:
    """Microseconds in which a kernel runs, of (name, begin, end); copies are no kernels."""
    busy, until = 0.0, float("-inf")
    for name, begin, end in sorted(events, key=lambda event: event[1]):
        if re.match(r"Mem(cpy|set)", name):
            continue
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy


def busy_ms(step: Callable[[], object], steps: int = 8) -> float:
    """Milliseconds of a step in which kernels run."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    on_device = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return busy_of(on_device) / 1e3 / steps


def failed_torch_tests(package: Path) -> int:
    """Runs the tests of torch's ops on CUDA tensors with a built package; how many failed."""
    tests = ROOT / "tests" / "python" / "test_torch_cuda.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(run.stdout)
    return failures_of(run.stdout, run.returncode)


def sanitizer_findings(tests: Path, run: Callable[..., Any] = subprocess.run) -> list[str]:
    """Tools of compute-sanitizer that find something in the kernel tests, "tool: test" each.

    Args:
        tests: The folder of the built tests.
        run: Runs a command.
    """
    found = []
    for tool in SANITIZERS:
        for name in KERNEL_TESTS:
            test = tests / f"cuda_{name}_test_on_device"
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(test)]
            try:
                code = run(command, timeout=SANITIZER_SECONDS).returncode
            except subprocess.TimeoutExpired:
                code = -1
            if code:
                found.append(f"{tool}: {name}")
    return found


def failures_of(output: str, code: int) -> int:
    """Failed tests by pytest's last line; 1 where it says nothing and the run went wrong."""
    found = re.search(r"(\d+) (failed|error)", output)
    return int(found[1]) if found else int(code != 0 or "passed" not in output)

"""Speed of whole models: deinfer against transformers, dense and decomposed, in one run.

Each contestant is verified first (its prompt logits against transformers in fp32), then all are
timed in interleaved rounds. Prefill: tokens/s of one random prompt. Decode at batch B:
B (T - 1) / (t(T) - t(1)), with random prompts and end-of-sequence ignored.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, environment, summary, write_results
from deinfer import LLM, SamplingParams
from deinfer.decompose.reference import load_reference

# (batch, prompt tokens, generated tokens) -> seconds
Generate = Callable[[int, int, int], float]
MAX_ERROR = 0.05  # bf16 logits against fp32, relative


class Contestant:
    """One program with one model."""

    def __init__(self, path: Path, seed: int) -> None:
        self.numbers = random.Random(seed)
        self.path = path

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        """Random, so that no cache of prefixes can help."""
        return [[self.numbers.randrange(10, 40000) for _ in range(length)] for _ in range(batch)]


class Deinfer(Contestant):
    """This runtime, bf16."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 1)
        self.llm = LLM(str(path), dtype="bfloat16", use_tqdm_on_load=False)

    def logits(self, tokens: list[int]) -> np.ndarray:
        return self.llm.prompt_logits(tokens)

    def generate(self, batch: int, length: int, new: int) -> float:
        prompts = self.prompts(batch, length)
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start


class Transformers(Contestant):
    """Hugging Face transformers, bf16, its own generate()."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 1)
        self.model = load_reference(path, torch.bfloat16)

    def logits(self, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].float().numpy()

    def generate(self, batch: int, length: int, new: int) -> float:
        prompts = torch.tensor(self.prompts(batch, length))
        start = time.perf_counter()
        with torch.no_grad():
            self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return time.perf_counter() - start


def verify(contestants: dict[str, Any]) -> dict[str, float]:
    """Relative error of each contestant's logits against transformers in fp32."""
    tokens = [random.Random(3).randrange(10, 40000) for _ in range(64)]
    errors = {}
    for name, contestant in contestants.items():
        with torch.no_grad():
            exact = load_reference(contestant.path, torch.float32)(torch.tensor([tokens]))
        expected = exact.logits[0].numpy()
        error = np.linalg.norm(contestant.logits(tokens) - expected) / np.linalg.norm(expected)
        errors[name] = float(error)
        if error > MAX_ERROR:
            raise SystemExit(f"{name}: logits are wrong, relative error {error:.3g}")
    return errors


def main() -> None:
    """Run the comparison and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = ROOT / "build" / "smollm2-135m-instruct"
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--decomposed", type=Path, help="default: MODEL-keep0.8 if it exists")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    decomposed = options.decomposed or options.model.with_name(options.model.name + "-keep0.8")

    contestants: dict[str, Any] = {}
    for label, path in (("dense", options.model), ("decomposed", decomposed)):
        if (path / "config.json").is_file():
            contestants[f"deinfer {label}"] = Deinfer(path)
            contestants[f"transformers {label}"] = Transformers(path)
    results: dict[str, Any] = {"name": "generate", **environment(), "dtype": "bfloat16"}
    results["prompt_tokens"] = options.prompt_tokens
    results["new_tokens"] = options.new_tokens
    results["relative_error"] = verify(contestants)

    samples: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    for round_number in range(-1, options.rounds):  # one warm-up
        for batch in options.batches:
            for name, contestant in contestants.items():
                one = contestant.generate(batch, options.prompt_tokens, 1)
                many = contestant.generate(batch, options.prompt_tokens, options.new_tokens)
                if round_number < 0:
                    continue
                rates = samples[name]
                rates.setdefault(f"prefill_b{batch}", []).append(
                    batch * options.prompt_tokens / one
                )
                rates.setdefault(f"decode_b{batch}", []).append(
                    batch * (options.new_tokens - 1) / (many - one)
                )
    results["tok_s"] = {
        name: {key: summary(values) for key, values in rates.items()}
        for name, rates in samples.items()
    }
    keys = list(next(iter(samples.values())))
    print(f"{'tok/s (median)':26}" + "".join(f"{key:>14}" for key in keys))
    for name, rates in results["tok_s"].items():
        print(f"{name:26}" + "".join(f"{rates[key]['median']:14.1f}" for key in keys))
    print(f"wrote {write_results('generate', results, options.out)}")


if __name__ == "__main__":
    main()

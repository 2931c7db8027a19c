"""Speed of whole models: dense, decomposed and int8, by deinfer and by transformers.

Two sets of models. `smollm2`: the real SmolLM2-135M-Instruct and its decomposed copy, deinfer
against transformers. `1b`: random weights in the shape of TinyLlama-1.1B, dense, at keep 0.5 and
int8, deinfer against itself and against the memory bandwidth. "16 bits" keeps bf16 weights as they
are, "12 bits" stores them so, without loss, where that can be and is not the default. Every
contestant on real weights is verified first; then all are timed in interleaved rounds with random
prompts, end-of-sequence ignored. Prefill: tokens/s of the prompts. Decode at batch B:
B (T - 1) / (t(T) - t(1)).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from common import ROOT, Check, environment, finish, summary
from deinfer import LLM, SamplingParams
from deinfer.decompose.reference import load_reference
from deinfer.evaluate import perplexity
from native_cpu import Stream, Team
from synthetic import LLAMA_1B, write_synthetic

MAX_ERROR = 0.05  # bf16 logits against fp32, relative
STREAM_BYTES = 2 << 30
KEEP = 0.5  # of the synthetic decomposed model


class Runner(Protocol):
    """A program with a model."""

    max_batch: int  # larger ones take too long to wait for

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits of a prompt, [tokens, vocabulary]."""

    def generate(self, prompts: list[list[int]], new: int) -> float:
        """Seconds to continue all prompts by `new` tokens."""


class Deinfer:
    """This runtime."""

    max_batch = 64

    def __init__(self, path: Path, dtype: str = "bfloat16", compression: str = "auto") -> None:
        # A pool small enough that the warm-up has touched its pages.
        self.llm = LLM(
            str(path),
            dtype=dtype,
            weight_compression=compression,
            use_tqdm_on_load=False,
            max_model_len=2048,
            kv_cache_bytes=1 << 30,
        )

    def logits(self, tokens: list[int]) -> np.ndarray:
        return self.llm.prompt_logits(tokens)

    def generate(self, prompts: list[list[int]], new: int) -> float:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start


class Transformers:
    """Hugging Face transformers, bf16, its own generate()."""

    max_batch = 8  # bench/peers.py times it, and others, at larger ones

    def __init__(self, path: Path) -> None:
        self.model = load_reference(path, torch.bfloat16)

    def logits(self, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].float().numpy()

    def generate(self, prompts: list[list[int]], new: int) -> float:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        with torch.no_grad():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return time.perf_counter() - start


@dataclass(frozen=True)
class Workload:
    """`batch` prompts of `prompt` tokens, continued by `new` tokens."""

    batch: int
    prompt: int
    new: int


@dataclass
class ModelSet:
    """Contestants on models of one size, and the workloads that they share."""

    name: str
    contestants: dict[str, Runner]
    workloads: list[Workload]
    vocabulary: int
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    # Decode steps at batch 1 per byte that a plain read loop gets through in the same moment.
    steps_per_byte: dict[str, list[float]] = field(default_factory=dict)

    def median(self, contestant: str, key: str) -> float:
        """Median tokens/s, or NaN when it was not measured."""
        samples = self.rates.get(contestant, {}).get(key)
        return float(np.median(samples)) if samples else float("nan")

    def run(self, rounds: int, memory: tuple[Team, Stream]) -> None:
        """Time all contestants, one after the other in each of `rounds` rounds and a warm-up."""
        numbers = random.Random(1)
        team, stream = memory

        def prompts(load: Workload) -> list[list[int]]:  # random: no cache of prefixes can help
            return [
                [numbers.randrange(10, self.vocabulary) for _ in range(load.prompt)]
                for _ in range(load.batch)
            ]

        for turn in range(-1, rounds):
            for load in self.workloads:
                for name, runner in self.contestants.items():
                    if load.batch > runner.max_batch:
                        continue
                    one = runner.generate(prompts(load), 1)
                    # On both sides, as the machine's bandwidth changes within seconds.
                    before = stream.bandwidth(team) if load.batch == 1 else 0.0
                    many = runner.generate(prompts(load), load.new)
                    if turn < 0:
                        continue
                    rates = self.rates.setdefault(name, {})
                    prefill = load.batch * load.prompt / one
                    decode = load.batch * (load.new - 1) / (many - one)
                    rates.setdefault(f"prefill_b{load.batch}", []).append(prefill)
                    rates.setdefault(f"decode_b{load.batch}", []).append(decode)
                    if load.batch == 1:
                        bandwidth = (before + stream.bandwidth(team)) / 2
                        self.steps_per_byte.setdefault(name, []).append(decode / bandwidth)


def verify(name: str, runner: Runner, path: Path) -> float:
    """Relative error of the logits against transformers in fp32."""
    tokens = [random.Random(3).randrange(10, 40000) for _ in range(64)]
    with torch.no_grad():
        exact = load_reference(path, torch.float32)(torch.tensor([tokens])).logits[0].numpy()
    error = float(np.linalg.norm(runner.logits(tokens) - exact) / np.linalg.norm(exact))
    if error > MAX_ERROR:
        raise SystemExit(f"{name}: logits are wrong, relative error {error:.3g}")
    return error


def load_memory(path: Path) -> dict[str, float]:
    """Peak resident bytes while a fresh process loads a model, over its weights' bytes."""
    program = (
        "import json, sys; from deinfer import LLM\n"
        "def status(key):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith(key)) * 1024\n"
        "before = status('VmRSS')\n"
        "llm = LLM(sys.argv[1], dtype='bfloat16', use_tqdm_on_load=False, max_model_len=2048)\n"
        "print(json.dumps([status('VmHWM') - before, llm.model_info.weight_bytes]))\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, weights = json.loads(output)
    return {"peak_bytes": peak, "weight_bytes": weights, "ratio": peak / weights}


def engine_overhead(runner: Deinfer, batch: int, vocabulary: int) -> float:
    """Share of generate()'s wall time outside the workers, decode at a batch size."""
    numbers = random.Random(2)
    prompts = [[numbers.randrange(10, vocabulary) for _ in range(16)] for _ in range(batch)]
    before = runner.llm.stats.execute_us
    wall = runner.generate(prompts, 64)
    return 1 - (runner.llm.stats.execute_us - before) * 1e-6 / wall


def smollm2(model: Path, decomposed: Path, quick: bool) -> tuple[ModelSet, dict[str, float]]:
    """The real model, each contestant verified; and their errors."""
    contestants: dict[str, Runner] = {}
    errors = {}
    for label, path in (("dense", model), ("decomposed", decomposed)):
        if not (path / "config.json").is_file():
            continue
        contestants[f"deinfer {label}"] = Deinfer(path)
        contestants[f"transformers {label}"] = Transformers(path)
        for name in (f"deinfer {label}", f"transformers {label}"):
            errors[name] = verify(name, contestants[name], path)
    contestants["deinfer 16 bits"] = Deinfer(model, compression="none")
    contestants["deinfer int8"] = Deinfer(model, "int8")
    batches = (1, 8) if quick else (1, 8, 32, 64)
    return ModelSet("smollm2", contestants, [Workload(b, 128, 64) for b in batches], 40000), errors


def one_billion(build: Path, quick: bool) -> ModelSet:
    """The synthetic models: their weights are random, so nothing is verified here."""
    dense = write_synthetic(build / "llama-1.1b", LLAMA_1B)
    low_rank = write_synthetic(build / f"llama-1.1b-keep{KEEP:g}", LLAMA_1B, KEEP)
    by_default = Deinfer(dense)
    contestants: dict[str, Runner] = {
        "dense": by_default,
        "dense, 16 bits": Deinfer(dense, compression="none"),
        "decomposed": Deinfer(low_rank),
        "int8": Deinfer(dense, "int8"),
        "decomposed int8": Deinfer(low_rank, "int8"),
    }
    if by_default.llm.model_info.weight_compression == "none":
        with contextlib.suppress(NotImplementedError):  # without kernels for it
            contestants["dense, 12 bits"] = Deinfer(dense, compression="lossless")
    loads = [Workload(1, 128, 33), Workload(16, 32, 17)]
    return ModelSet("1b", contestants, loads[:1] if quick else loads, LLAMA_1B["vocab_size"])


def check_smollm2(models: ModelSet, model: Path, results: dict[str, Any]) -> list[Check]:
    """Peers are compared in bench/peers.py; here decomposed, int8, memory and overhead."""
    runner = models.contestants["deinfer dense"]
    int8 = models.contestants["deinfer int8"]
    assert isinstance(runner, Deinfer) and isinstance(int8, Deinfer)
    text = (resources.files("deinfer") / "data" / "heldout.txt").read_text()
    losses = [perplexity(r.llm, text).perplexity for r in (runner, int8)]
    results["perplexity"] = {"bfloat16": losses[0], "int8": losses[1]}
    memory = results["load_memory"] = load_memory(model)
    overheads = [engine_overhead(runner, 64, models.vocabulary) for _ in range(5)]
    results["engine_overhead_b64"] = summary(overheads)
    checks = [
        Check("smollm2 int8 / bf16 perplexity", losses[1] / losses[0], 1.01, at_least=False),
        Check("smollm2 peak memory while loading / weights", memory["ratio"], 1.15, False),
        Check("engine outside the workers, batch 64", float(np.median(overheads)), 0.03, False),
    ]
    for key in models.rates["transformers dense"]:
        ratio = models.median("deinfer dense", key) / models.median("transformers dense", key)
        checks.append(Check(f"smollm2 {key}: deinfer / transformers", ratio, 1.0))
    return checks


def check_one_billion(models: ModelSet, results: dict[str, Any]) -> list[Check]:
    """The targets of the 1.1B shape."""
    dense = models.contestants["dense"]
    assert isinstance(dense, Deinfer)
    info = dense.llm.model_info
    table = LLAMA_1B["vocab_size"] * LLAMA_1B["hidden_size"]  # rows of it are looked up
    read = info.weight_bytes * (1 - table / info.parameters)
    shares = [read * steps for steps in models.steps_per_byte["dense"]]
    results["1b_dense_decode_b1_share_of_bandwidth"] = summary(shares)

    plain = "dense, 16 bits"

    def over(a: str, b: str, key: str) -> float:
        return models.median(a, key) / models.median(b, key)

    checks = [
        Check("1.1B dense decode b1 / bandwidth bound", float(np.median(shares)), 0.8),
        Check("1.1B keep 0.5 / dense, decode b1", over("decomposed", "dense", "decode_b1"), 1.7),
        Check("1.1B keep 0.5 / dense, decode b16", over("decomposed", "dense", "decode_b16"), 1.6),
        Check("1.1B keep 0.5 / dense, prefill", over("decomposed", "dense", "prefill_b1"), 1.65),
        Check("1.1B int8 / bf16 in 16 bits, decode b1", over("int8", plain, "decode_b1"), 1.7),
    ]
    packed = "dense" if info.weight_compression == "lossless" else "dense, 12 bits"
    if packed in models.contestants:
        ratio = over(packed, plain, "decode_b1")
        checks.append(Check("1.1B bf16 in 12 / 16 bits, decode b1", ratio, 1.2))
    return checks


def main() -> None:
    """Run the comparison and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    build = ROOT / "build"
    parser.add_argument("--models", nargs="+", choices=["smollm2", "1b"], default=["smollm2", "1b"])
    parser.add_argument("--model", type=Path, default=build / "smollm2-135m-instruct")
    parser.add_argument("--decomposed", type=Path, help="default: MODEL-keep0.8 if it exists")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few batch sizes: a smoke test")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--out", type=Path, help="default: bench/results/generate.json")
    options = parser.parse_args()
    decomposed = options.decomposed or options.model.with_name(options.model.name + "-keep0.8")

    results: dict[str, Any] = {"name": "generate", **environment(), "tok_s": {}}
    team = Team(torch.get_num_threads())
    memory = (team, Stream(team, STREAM_BYTES))
    checks: list[Check] = []
    for name in options.models:
        if name == "smollm2":
            models, results["relative_error"] = smollm2(options.model, decomposed, options.quick)
        else:
            models = one_billion(build, options.quick)
        models.run(options.rounds, memory)
        results["tok_s"][name] = {
            contestant: {key: summary(values) for key, values in rates.items()}
            for contestant, rates in models.rates.items()
        }
        keys = list(next(iter(models.rates.values())))
        print(f"\n{name + ', tok/s (median)':26}" + "".join(f"{key:>13}" for key in keys))
        for contestant in models.rates:
            medians = [models.median(contestant, key) for key in keys]
            row = "".join(f"{'-' if math.isnan(m) else f'{m:.1f}':>13}" for m in medians)
            print(f"{contestant:26}" + row, flush=True)
        if name == "smollm2":
            checks += check_smollm2(models, options.model, results)
        else:
            checks += check_one_billion(models, results)
        del models
    finish("generate", results, checks, options.out, options.check)


if __name__ == "__main__":
    main()

"""Whole-model speed of deinfer against transformers, llama.cpp, vLLM and CTranslate2, in one run.

Every program runs in a process and an environment of its own (`make bench-peers` makes them), with
the model loaded once, and blocks while the others are timed. Each is verified first: its greedy
answers to chat prompts must be what transformers in float32 would choose, rounding aside. Then all
are timed in interleaved rounds on the same random prompts, new ones for every call, so that no
prefix cache helps. With t(n) the seconds for n greedy tokens of each of B prompts of P tokens,
end-of-sequence ignored: prefill tokens/s = B P / t(1), decode tokens/s = B (T - 1) / (t(T) - t(1)).

A program that is not installed or fails is reported with the reason, in the table and in the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, Check, environment, finish, summary
from native_cpu import Stream, Team
from peers.analysis import agreement, decode_rate, prefill_rate, speed_checks
from peers.protocol import Peer, PeerError

BUILD = ROOT / "build" / "peers"
DRIVERS = ROOT / "bench" / "peers"
OWN = "deinfer"
VERIFIED_TOKENS = 16
STREAM_BYTES = 1 << 30
PAUSE = 0.3  # s between turns: longer than waiting OpenMP threads spin
CHATS = [
    "What is the capital of France?",
    "Describe the ocean in one sentence.",
    "Write a short story about a cat who finds a key.",
    "Explain how a bicycle works.",
    "Why do people sleep at night?",
    "Give me three ideas for a birthday present.",
]


@dataclass(frozen=True)
class Program:
    """One contestant: a driver, its environment and its form of the model."""

    name: str
    driver: str
    model: Path
    dtype: str  # as the driver takes it
    weights: str  # as the reader should know it
    home: Path | None = None  # its own environment; None: the project's
    env: dict[str, str] = field(default_factory=dict)
    rated: bool = True  # whether deinfer at 16 bit is compared with it

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.home / "bin" / "python") if self.home else sys.executable

    def absence(self) -> str | None:
        """Why it cannot run, or None."""
        if self.home and not (self.home / ".ready").is_file():
            log = self.home.with_suffix(".log")  # setup.sh leaves it where it failed
            lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
            errors = [line.strip() for line in lines if "error" in line.lower()]
            return errors[-1][:200] if errors else "not installed; `make bench-peers` installs it"
        if not self.model.exists():
            return f"{self.model.name} is missing; `make bench-peers` makes it"
        return None


def programs(model: Path, cpus: list[int]) -> dict[str, Program]:
    """All contestants by name."""
    models, vllm = BUILD / "models", BUILD / "vllm"
    llama_cpp = {"driver": "llama_cpp_cpu.py", "home": BUILD / "llama_cpp"}
    all_cores = {
        # By default it leaves a core to a front end that here is asleep.
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CACHE_ROOT": str(BUILD / "cache" / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(BUILD / "cache" / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": str(vllm / "lib" / "libiomp5.so"),
    }
    listed = [
        Program(OWN, "deinfer_cpu.py", model, "bfloat16", "bf16"),
        Program("transformers", "transformers_cpu.py", model, "bfloat16", "bf16"),
        Program("llama.cpp", model=models / f"{model.name}-bf16.gguf", dtype="bf16",
                weights="bf16", **llama_cpp),
        Program("vllm", "vllm_cpu.py", model, "bfloat16", "bf16", vllm, all_cores),
        # It has no bf16 arithmetic on CPUs; int8 is its fastest.
        Program("ctranslate2", "ctranslate2_cpu.py", models / f"{model.name}-ct2-int8", "int8",
                "int8", BUILD / "ctranslate2"),
        Program("deinfer int8", "deinfer_cpu.py", model, "int8", "int8", rated=False),
        Program("llama.cpp q8_0", model=models / f"{model.name}-q8_0.gguf", dtype="q8_0",
                weights="q8_0", rated=False, **llama_cpp),
    ]  # fmt: skip
    return {program.name: program for program in listed}


def start(program: Program, options: argparse.Namespace) -> Peer:
    """Start and load a program; raises PeerError."""
    # What the caller's shell or make set for threads must not reach any of them: each runs with
    # its own defaults.
    tuning = ("OMP_", "KMP_", "GOMP_", "MKL_", "GGML_", "LLAMA_", "VLLM_", "CT2_", "LD_PRELOAD")
    env = {name: value for name, value in os.environ.items() if not name.startswith(tuning)}
    env |= {"OMP_NUM_THREADS": str(len(options.cpus)), "HF_HUB_OFFLINE": "1", **program.env}
    command = [program.python, str(DRIVERS / program.driver)]
    command += ["--model", str(program.model), "--dtype", program.dtype]
    command += ["--cpus", *map(str, options.cpus), "--max-batch", str(options.max_batch)]
    command += ["--max-tokens", str(options.max_tokens)]
    log = BUILD / "logs" / f"{program.name.replace(' ', '-')}-{program.dtype}.log"
    return Peer(command, env, log)


def chat_prompts(model: Path) -> tuple[list[list[int]], int]:
    """Token ids of real conversations, and the end-of-sequence token."""
    from deinfer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    prompts = []
    for text in CHATS:
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer.encode(rendered, add_special_tokens=False))
    return prompts, tokenizer.eos_token_id


class Comparison:
    """The programs that run, what was measured of them, and why the others do not run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.listed = programs(options.model, options.cpus)
        self.running: dict[str, Peer] = {}
        self.report: dict[str, dict[str, Any]] = {}
        self.samples: dict[str, dict[str, list[float]]] = {}
        # GB/s that a read loop gets beside each decode at batch 1, as the machine's changes.
        self.bandwidths: dict[str, list[float]] = {}
        self._waiting: dict[str, tuple[float, float]] = {}  # CPU and wall clock after its turn
        self._waited: dict[str, tuple[float, float]] = {}

    def exclude(self, name: str, status: str, reason: str) -> None:
        """Take a program out, for good."""
        print(f"{name}: {status}: {reason}", flush=True)
        self.report[name] |= {"status": status, "reason": reason}
        self.samples.pop(name, None)
        if name in self.running:
            self.running.pop(name).close()
        if name == OWN:
            raise SystemExit(f"{OWN} cannot be compared: {reason}")

    def load(self, names: list[str]) -> None:
        """Start the programs and verify each against transformers in float32."""
        exact = Program("reference", "transformers_cpu.py", self.options.model, "float32", "fp32")
        prompts, eos = chat_prompts(self.options.model)
        try:
            reference = start(exact, self.options)
        except PeerError as error:
            raise SystemExit(f"the reference, transformers in float32: {error}") from error
        try:
            expected = [reference.generate([p], VERIFIED_TOKENS)[1][0] for p in prompts]
            for name in names:
                program = self.listed[name]
                self.report[name] = {"weights": program.weights}
                absence = program.absence()
                if absence:
                    self.exclude(name, "absent", absence)
                    continue
                try:
                    answers = self.first_answers(program, prompts)
                except PeerError as error:
                    self.exclude(name, "failed", str(error))
                    continue
                judgement = reference.score(prompts, answers)
                follows = agreement(expected, answers, *judgement, eos)
                self.report[name] |= {"status": "ok", "agreement": dataclasses.asdict(follows)}
                print(f"{name}: {follows}", flush=True)
                if not follows.ok:
                    self.exclude(name, "wrong", f"not the reference's tokens: {follows}")
        finally:
            reference.close()

    def first_answers(self, program: Program, prompts: list[list[int]]) -> list[list[int]]:
        """Start a program and let it answer; in batches, so that what is timed is verified."""
        begin = time.perf_counter()
        peer = self.running[program.name] = start(program, self.options)
        self.report[program.name] |= {"load_seconds": time.perf_counter() - begin, **peer.info}
        answers = []
        for i in range(0, len(prompts), self.options.max_batch):
            some = prompts[i : i + self.options.max_batch]
            answers += peer.generate(some, VERIFIED_TOKENS)[1]
        return answers

    def timed(self, name: str, prompts: list[list[int]], new: int) -> float:
        """One turn of one program: seconds. Also keeps what it used of the CPU since its last."""
        peer = self.running[name]
        time.sleep(PAUSE)
        if name in self._waiting:
            cpu, wall = self._waiting[name]
            used, waited = self._waited.get(name, (0.0, 0.0))
            self._waited[name] = (
                used + peer.cpu_seconds() - cpu,
                waited + time.perf_counter() - wall,
            )
        seconds, _ = peer.generate(prompts, new)
        self._waiting[name] = (peer.cpu_seconds(), time.perf_counter())
        return seconds

    def measure(self) -> None:
        """Warm up, then time everything round by round."""
        options = self.options
        numbers = random.Random(1)

        def prompts(batch: int) -> list[list[int]]:
            length = options.prompt_tokens
            return [[numbers.randrange(10, 40000) for _ in range(length)] for _ in range(batch)]

        team = Team(len(options.cpus))
        stream = Stream(team, STREAM_BYTES)
        for number in range(options.rounds + 1):  # the first is the warm-up
            for batch in options.batches:
                one, many = prompts(batch), prompts(batch)
                names = list(self.running)
                shift = number % len(names)  # nobody always comes after the same program
                for name in names[shift:] + names[:shift]:
                    try:
                        first = self.timed(name, one, 1)
                        before = stream.bandwidth(team) if batch == 1 else 0.0
                        last = self.timed(name, many, options.new_tokens)
                        after = stream.bandwidth(team) if batch == 1 else 0.0
                    except PeerError as error:
                        self.exclude(name, "failed", f"batch {batch}: {error}")
                        continue
                    if number == 0:
                        continue
                    prefill = prefill_rate(batch, options.prompt_tokens, first)
                    decode = decode_rate(batch, options.new_tokens, first, last)
                    rates = self.samples.setdefault(name, {})
                    rates.setdefault(f"prefill_b{batch}", []).append(prefill)
                    if decode is not None:
                        rates.setdefault(f"decode_b{batch}", []).append(decode)
                    if batch == 1:
                        self.bandwidths.setdefault(name, []).append((before + after) / 2e9)
            print(f"round {number} of {options.rounds} done", flush=True)
        for name in self.running:
            used, waited = self._waited.get(name, (0.0, 0.0))
            self.report[name]["cpu_while_waiting"] = used / waited if waited else 0.0
            self.report[name]["tok_s"] = {
                key: summary(values) for key, values in self.samples[name].items()
            }
            if name in self.bandwidths:
                self.report[name]["stream_gb_s_b1"] = summary(self.bandwidths[name])

    def close(self) -> None:
        """Let all programs quit."""
        for peer in self.running.values():
            peer.close()


def print_rates(report: dict[str, dict[str, Any]], batches: list[int]) -> None:
    """The table of medians, and who is not in it."""
    keys = [f"{phase}_b{batch}" for phase in ("decode", "prefill") for batch in batches]
    print(f"\n{'tok/s (median)':24}" + "".join(f"{key:>13}" for key in keys))
    for name, row in report.items():
        label = f"{f'{name}, ' + row['weights']:24}"
        if row["status"] == "ok":
            rates = [row["tok_s"].get(key, {"median": float("nan")})["median"] for key in keys]
            print(label + "".join(f"{rate:13.1f}" for rate in rates))
        else:
            print(f"{label}  {row['status']}: {row['reason']}")


def parse() -> argparse.Namespace:
    """The command line, checked, with what follows from it."""
    available = sorted(os.sched_getaffinity(0))
    model = ROOT / "build" / "smollm2-135m-instruct"
    names = list(programs(model, available))
    usual = [name for name in names if name not in ("deinfer int8", "llama.cpp q8_0")]
    summary_line, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary_line, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=model)
    parser.add_argument("--peers", nargs="+", choices=names, metavar="NAME", default=usual[1:],
                        help=f"of {', '.join(names[1:])}; default: those at 16 bit")  # fmt: skip
    parser.add_argument("--int8", action="store_true", help="also deinfer int8, llama.cpp Q8_0")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="after one warm-up")
    parser.add_argument("--threads", type=int, default=len(available))
    parser.add_argument("--check", action="store_true", help="exit 1 where a check falls short")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not 1 <= options.threads <= len(available):
        parser.error(f"--threads {options.threads} is not in [1, {len(available)}]")
    if min(options.rounds, options.prompt_tokens, *options.batches) < 1 or options.new_tokens < 2:
        parser.error("rounds, batches and prompt tokens must be positive, new tokens at least 2")
    options.model = options.model.resolve()
    options.cpus = available[: options.threads]
    options.max_batch = max(options.batches)
    # Whole blocks of every program's KV cache, and room for the prompts that verify.
    options.max_tokens = -(-max(options.prompt_tokens + options.new_tokens, 128) // 64) * 64
    return options


def main() -> None:
    """Run the comparison, print its tables and write the results file."""
    options = parse()
    names = [OWN, *(name for name in options.peers if name != OWN)]
    if options.int8:
        names += [name for name in ("deinfer int8", "llama.cpp q8_0") if name not in names]
    results: dict[str, Any] = {"name": "peers", **environment(), "threads": options.threads}
    for key in ("batches", "prompt_tokens", "new_tokens", "rounds"):
        results[key] = getattr(options, key)
    results["model"] = options.model.name
    comparison = Comparison(options)
    try:
        comparison.load(names)
        comparison.measure()
    finally:
        comparison.close()
    results["programs"] = comparison.report

    print_rates(comparison.report, options.batches)
    medians = {
        name: {key: rate["median"] for key, rate in row["tok_s"].items()}
        for name, row in comparison.report.items()
        if row["status"] == "ok" and comparison.listed[name].rated
    }
    own = medians.pop(OWN)
    checks = speed_checks(own, medians, options.batches)
    # A peer that is missing must not let the others' ratios pass for the whole comparison.
    rated = [name for name in names if name != OWN and comparison.listed[name].rated]
    checks.append(Check("peers measured", len(medians), len(rated)))
    finish("peers", results, checks, options.out, options.check)


if __name__ == "__main__":
    main()

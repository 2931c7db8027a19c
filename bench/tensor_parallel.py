"""Tensor parallelism on this machine's cores: plans, links and overlap against the cost model.

Part 1 is real: two ranks of one thread each against one rank of two threads, on SmolLM2-135M
(decomposed) and, with --large, on a 1.1B shape. Part 2 emulates links: the ranks of a random
low-rank model are threads that share the cores, and their exchanges take as long as over the
emulated link. The model is Llama-3-70B with every dimension divided by 4 (and fewer layers), and
its ranks are far slower than GPUs; so the links are slowed until a layer's exchanges take the share
of its time that they would take on H100s (see `emulated`). Every cell is predicted by the planner's
cost model for this machine's own rates, and verified first: all plans give the same greedy tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Check, environment, finish, summary
from deinfer import _C, LLM, SamplingParams
from native_cpu import Peak, Stream, Team
from synthetic import LLAMA_1B, write_synthetic

PLANS = ["dense", "naive", "rank_gather", "hidden_sharded", "two_collective", "token_sharded"]
GPU_BYTES_PER_S = 3.0e12  # what an H100 streams; research/cost.py
# Fused exchanges (research/kernels.md): latency in s, bytes/s.
LINKS = {"nvlink": (3e-6, 405e9), "pcie": (8e-6, 25e9)}
SCALE = 0.25  # of every dimension of Llama-3-70B
SMALL: dict[str, Any] = {
    **LLAMA_1B,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 2048,
}
KEEP = 0.4
MIN_EXPOSED = 1.1  # prefill with the link over prefill without, for a share of it to be measurable
PROMPT = 4  # tokens before decoding
PREFILL = 512


@dataclasses.dataclass(frozen=True)
class Work:
    """A phase: decode of `batch` sequences, or prefill of one prompt."""

    name: str
    batch: int
    prompt: int
    steps: int


WORKS = [
    Work("decode:1", 1, PROMPT, 16),
    Work("decode:16", 16, PROMPT, 8),
    Work("decode:128", 128, PROMPT, 3),
    Work(f"prefill:{PREFILL}", 1, PREFILL, 0),
]


def load(path: Path, size: int, plan: str, threads: int, link: str = "", chunks: int = 1) -> LLM:
    """A model over `size` ranks."""
    return LLM(
        path,
        dtype="bfloat16",
        tensor_parallel_size=size,
        tensor_parallel_plan=plan,
        emulated_link=link,
        exchange_chunks=chunks,
        num_threads=threads,
        max_model_len=1024,
        max_num_batched_tokens=4096 if size > 1 else 2048,
        kv_cache_bytes=256 << 20,
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
    )


def step_seconds(llm: LLM, work: Work, seed: int) -> float:
    """Seconds of one step of the phase, of which prompts and their prefill are no part."""
    numbers = random.Random(seed)
    vocabulary = llm.model_info.vocab_size
    prompts = [
        [numbers.randrange(10, vocabulary) for _ in range(work.prompt)] for _ in range(work.batch)
    ]

    def seconds(new: int) -> float:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    if work.steps == 0:
        return seconds(1)
    return (seconds(work.steps + 1) - seconds(1)) / work.steps


def tokens(llm: LLM) -> list[int]:
    """Greedy tokens, to see that plans agree."""
    prompt = [7 + 11 * i % 900 for i in range(40)]
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, detokenize=False)
    return list(llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids)


def against_one_rank(path: Path, rounds: int) -> dict[str, Any]:
    """Two ranks of one thread against one rank of two threads: ratios of step times."""
    one = load(path, 1, "auto", 2)
    two = load(path, 2, "auto", 1, chunks=0)
    works = [WORKS[0], WORKS[1], WORKS[3]]
    ratios: dict[str, list[float]] = {work.name: [] for work in works}
    for turn in range(rounds + 1):
        for work in works:
            longer = dataclasses.replace(work, steps=4 * work.steps)
            pair = [(one, 0), (two, 1)]
            times = [0.0, 0.0]
            for llm, index in pair if turn % 2 else reversed(pair):
                times[index] = step_seconds(llm, longer, 100 + turn)
            if turn > 0:
                ratios[work.name].append(times[1] / times[0])
    info = two.model_info
    return {
        "plans": [info.decode_plan, info.prefill_plan],
        "ratio": {name: summary(values) for name, values in ratios.items()},
    }


def rates(threads: int) -> tuple[float, float]:
    """Bytes/s and bf16 FLOP/s of all cores together."""
    team = Team(threads)
    bandwidth = Stream(team, 1 << 30).bandwidth(team)
    peak = Peak(team, 4e8)
    return bandwidth, peak.flops / statistics.median(peak.run(40)[8:])


def emulated(link: str, size: int, bytes_per_s: float) -> str:
    """A link of H100s as "latency_us:GB_per_s" for `size` ranks that share `bytes_per_s`.

    Weights go with the square of the dimensions, what travels with the dimensions.
    """
    latency, bandwidth = LINKS[link]
    slower = GPU_BYTES_PER_S / (bytes_per_s / size) * SCALE**2  # a layer's time here, on an H100
    return f"{latency * slower * 1e6:.3f}:{bandwidth * SCALE / slower / 1e9:.6f}"


def predict(path: Path, size: int, link: str, chunks: int, machine: tuple[float, float]) -> Any:
    """The planner's report, with ranks that share this machine's cores."""
    bandwidth, flops = (rate / size for rate in machine)
    return _C.plan_tensor_parallelism(
        _C.PlannerConfig(
            model=str(path),
            tensor_parallel_size=size,
            link=link,
            hardware=f"cpu:{bandwidth / 1e9:.3f}:{flops / 1e9:.3f}",
            context=PROMPT + 8,
            batches=[work.batch for work in WORKS if work.steps],
            prefill=[PREFILL],
            max_chunks=chunks,
        )
    )


@dataclasses.dataclass
class Cell:
    """One link, size and phase: measured and predicted seconds per plan."""

    link: str
    size: int
    phase: str
    chunks: int
    measured: dict[str, float]
    predicted: dict[str, float]

    def best(self) -> float:
        """The fastest plan's measured seconds."""
        return min(self.measured.values())

    def chosen(self) -> str:
        """The plan that the model predicts to be fastest."""
        return min(self.predicted, key=self.predicted.__getitem__)


def emulate(
    path: Path, sizes: list[int], rounds: int, machine: tuple[float, float]
) -> tuple[list[Cell], dict[str, Any]]:
    """All cells, without overlap; and prefill without link, with overlap and without."""
    cells = []
    overlap: dict[str, Any] = {}
    for name, size in itertools.product(LINKS, sizes):
        link = emulated(name, size, machine[0])
        report = predict(path, size, link, 1, machine)
        predicted = {
            plan.plan: {phase.phase: phase.seconds for phase in plan.phases}
            for plan in report.plans
        }
        measured: dict[str, dict[str, float]] = {}
        expected = None
        for plan in PLANS:
            llm = load(path, size, plan, 1, link)
            answer = tokens(llm)
            if expected is not None and plan != "dense" and answer != expected:
                raise SystemExit(f"{plan} on {size} ranks: {answer}, not {expected}")
            expected = expected or (answer if plan != "dense" else None)
            for work in WORKS:
                times = [step_seconds(llm, work, seed) for seed in range(rounds + 1)][1:]
                measured.setdefault(plan, {})[work.name] = statistics.median(times)
            del llm
            if plan in ("hidden_sharded", "token_sharded"):
                overlap[f"{name}, {size} ranks, {plan}"] = hidden(path, size, plan, link, rounds)
        for work in WORKS:
            cells.append(
                Cell(
                    name,
                    size,
                    work.name,
                    1,
                    {plan: measured[plan][work.name] for plan in PLANS},
                    {plan: predicted[plan][work.name] for plan in PLANS},
                )
            )
            row = " ".join(f"{measured[p][work.name] * 1e3:8.2f}" for p in PLANS)
            guess = " ".join(f"{predicted[p][work.name] * 1e3:8.2f}" for p in PLANS)
            print(
                f"{name:7} N={size} {work.name:12} measured {row} | predicted {guess}", flush=True
            )
    return cells, overlap


def hidden(path: Path, size: int, plan: str, link: str, rounds: int) -> dict[str, float]:
    """The share of the exchanges' time in prefill that overlap hides."""
    work = WORKS[-1]
    runs = {
        "no_link": load(path, size, plan, 1, "", 1),
        "exposed": load(path, size, plan, 1, link, 1),
        "overlapped": load(path, size, plan, 1, link, 4),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, llm in runs.items():
            seconds = step_seconds(llm, work, turn)
            if turn > 0:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    exchange = medians["exposed"] - medians["no_link"]
    return {**medians, "hidden": (medians["exposed"] - medians["overlapped"]) / exchange}


def checks_of(cells: list[Cell], overlap: dict[str, Any]) -> list[Check]:
    """The targets, where the model says that they apply."""
    checks = []
    for peer, target in (("naive", 1.5), ("rank_gather", 1.15)):
        ratios = [
            cell.measured[peer] / cell.measured["hidden_sharded"]
            for cell in cells
            if cell.phase.startswith("decode")
            and cell.predicted[peer] / cell.predicted["hidden_sharded"] >= target
        ]
        label = f"{peer} / hidden_sharded, decode, least of {len(ratios)} cells"
        checks.append(Check(label, min(ratios, default=float("nan")), target))
    good = [cell.measured[cell.chosen()] <= 1.05 * cell.best() for cell in cells]
    checks.append(Check("cells with a choice within 5 % of the best", sum(good) / len(good), 0.9))
    # Where the exchanges take so little that noise decides, there is no share to tell.
    shares = [
        row["hidden"] for row in overlap.values() if row["exposed"] >= MIN_EXPOSED * row["no_link"]
    ]
    label = f"exchange hidden in prefill, median of {len(shares)} cells"
    checks.append(Check(label, statistics.median(shares) if shares else float("nan"), 0.6))
    return checks


def main() -> None:
    """Run, print and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "build/smollm2-135m-instruct-keep0.8")
    parser.add_argument("--large", action="store_true", help="also the 1.1B shape in part 1")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--out", type=Path, help="default: bench/results/tensor_parallel.json")
    options = parser.parse_args()
    results: dict[str, Any] = {"name": "tensor_parallel", **environment()}
    checks = []

    models = {"smollm2 keep 0.8": options.model}
    if options.large:
        models["1.1B keep 0.5"] = write_synthetic(ROOT / "build/llama-1.1b-keep0.5", LLAMA_1B, 0.5)
    results["two_ranks"] = {}
    for name, path in models.items():
        if not path.is_dir():
            raise SystemExit(f"{path} is missing; `make demo` makes it")
        results["two_ranks"][name] = row = against_one_rank(path, options.rounds)
        for phase, ratio in row["ratio"].items():
            label = f"{name}, {phase}: 2 ranks x 1 thread / 1 rank x 2"
            checks.append(Check(label, ratio["median"], 1.10, at_least=False))

    small = write_synthetic(ROOT / "build/llama-70b-quarter-keep0.4", SMALL, KEEP)
    machine = rates(torch.get_num_threads())
    results |= {
        "bytes_per_s": machine[0],
        "flops_per_s": machine[1],
        "links": {name: emulated(name, 1, machine[0]) for name in LINKS},
        "plans": PLANS,
        "keep": KEEP,
    }
    cells, overlap = emulate(small, options.sizes, options.rounds, machine)
    results["cells"] = [dataclasses.asdict(cell) for cell in cells]
    results["overlap"] = overlap
    finish("tensor_parallel", results, checks + checks_of(cells, overlap), options.out,
           options.check)  # fmt: skip


if __name__ == "__main__":
    main()

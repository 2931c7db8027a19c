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
import json
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
from timing import PAUSE

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
MAX_CHUNKS = 4
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
    Work("decode:1", 1, PROMPT, 32),
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
    """One link, size and phase, whole exchanges or overlapped ones: seconds per plan."""

    link: str
    size: int
    phase: str
    overlap: bool
    chunks: dict[str, int]  # as predicted to be best; 1 without overlap
    measured: dict[str, float]  # medians
    predicted: dict[str, float]
    samples: dict[str, list[float]]

    def best(self) -> float:
        """The fastest plan's measured seconds."""
        return min(self.measured.values())

    def chosen(self) -> str:
        """The plan that the model predicts to be fastest."""
        return min(self.predicted, key=self.predicted.__getitem__)


# A plan and the chunks of its exchanges.
Contestant = tuple[str, int]


def measure(
    engines: dict[Contestant, LLM], works: dict[Contestant, list[Work]], rounds: int
) -> dict[tuple[Contestant, str], list[float]]:
    """Seconds per step of every engine in its works, interleaved; a first round does not count."""
    samples: dict[tuple[Contestant, str], list[float]] = {}
    for turn in range(rounds + 1):
        for work in WORKS:
            order = [name for name in engines if work in works[name]]
            for name in order if turn % 2 else reversed(order):
                time.sleep(PAUSE)
                seconds = step_seconds(engines[name], work, turn)
                if turn > 0:
                    samples.setdefault((name, work.name), []).append(seconds)
    return samples


def emulate(
    path: Path, link_name: str, size: int, rounds: int, machine: tuple[float, float]
) -> list[Cell]:
    """The cells of one link and size: every plan with whole exchanges, and overlapped."""
    link = emulated(link_name, size, machine[0])
    predicted: dict[bool, dict[tuple[str, str], Any]] = {}
    for overlap in (False, True):
        report = predict(path, size, link, MAX_CHUNKS if overlap else 1, machine)
        predicted[overlap] = {
            (plan.plan, phase.phase): phase for plan in report.plans for phase in plan.phases
        }
    works: dict[Contestant, list[Work]] = {(plan, 1): list(WORKS) for plan in PLANS}
    for plan, work in itertools.product(PLANS, WORKS):
        chunks = predicted[True][plan, work.name].chunks
        if chunks > 1:
            works.setdefault((plan, chunks), []).append(work)
    engines = {name: load(path, size, name[0], 1, link, name[1]) for name in works}
    answers = {name: tokens(llm) for name, llm in engines.items()}
    expected = answers["hidden_sharded", 1]
    for name, answer in answers.items():
        if name[0] != "dense" and answer != expected:
            raise SystemExit(f"{name} on {size} ranks: {answer}, not {expected}")
    samples = measure(engines, works, rounds)
    cells = []
    for work, overlap in itertools.product(WORKS, (False, True)):
        chunks_of = {plan: predicted[overlap][plan, work.name].chunks for plan in PLANS}
        taken = {plan: samples[(plan, chunks_of[plan]), work.name] for plan in PLANS}
        cell = Cell(
            link_name,
            size,
            work.name,
            overlap,
            chunks_of,
            {plan: statistics.median(values) for plan, values in taken.items()},
            {plan: predicted[overlap][plan, work.name].seconds for plan in PLANS},
            taken,
        )
        cells.append(cell)
        row = " ".join(f"{cell.measured[p] * 1e3:8.2f}/{chunks_of[p]}" for p in PLANS)
        guess = " ".join(f"{cell.predicted[p] * 1e3:8.2f}" for p in PLANS)
        what = "overlapped" if overlap else "whole"
        print(f"{link_name:7} N={size} {work.name:12} {what:10} {row} | predicted {guess}",
              flush=True)  # fmt: skip
    return cells


def hidden(path: Path, size: int, plan: str, link_name: str, rounds: int,
           machine: tuple[float, float]) -> dict[str, Any]:  # fmt: skip
    """The share of the exchanges' time that overlap hides, by phase.

    What an exchange takes is the difference to a run without link in as many chunks, so that
    cutting, which may make steps faster or slower, counts for neither.
    """
    link = emulated(link_name, size, machine[0])
    engines = {
        (name, chunks): load(path, size, plan, 1, link if name == "link" else "", chunks)
        for name, chunks in itertools.product(("none", "link"), (1, MAX_CHUNKS))
    }
    works = [WORKS[0], WORKS[1], WORKS[3]]
    samples = measure(engines, dict.fromkeys(engines, works), rounds)
    rows = {}
    for work in works:
        seconds = {key: statistics.median(samples[key, work.name]) for key in engines}
        whole = seconds["link", 1] - seconds["none", 1]
        left = seconds["link", MAX_CHUNKS] - seconds["none", MAX_CHUNKS]
        rows[work.name] = {
            "no_link": seconds["none", 1],
            "exposed": seconds["link", 1],
            "no_link_chunked": seconds["none", MAX_CHUNKS],
            "overlapped": seconds["link", MAX_CHUNKS],
            "hidden": 1 - left / whole,
        }
        print(f"{link_name:7} N={size} {work.name:12} {plan}: "
              + " ".join(f"{key} {value:.4g}" for key, value in rows[work.name].items()),
              flush=True)  # fmt: skip
    return rows


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
    rows = [phases[WORKS[-1].name] for phases in overlap.values()]
    shares = [row["hidden"] for row in rows if row["exposed"] >= MIN_EXPOSED * row["no_link"]]
    label = f"exchange hidden in prefill, median of {len(shares)} cells"
    checks.append(Check(label, statistics.median(shares) if shares else float("nan"), 0.6))
    return checks


def merge(parts: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Check]]:
    """The results of several runs as those of one, and the checks of their emulated links."""
    results = {**parts[0], "two_ranks": {}, "cells": [], "overlap": {}, "runs": []}
    checks = []
    for part in parts:
        results["two_ranks"] |= part["two_ranks"]
        results["cells"] += part["cells"]
        results["overlap"] |= part["overlap"]
        run = ("commit", "dirty", "date", "load_before", "bytes_per_s", "flops_per_s", "links")
        results["runs"].append({key: part[key] for key in run})
    for name, row in results["two_ranks"].items():
        checks += checks_of_two_ranks(name, row)
    if results["cells"]:
        checks += checks_of([Cell(**cell) for cell in results["cells"]], results["overlap"])
    return results, checks


def checks_of_two_ranks(name: str, row: dict[str, Any]) -> list[Check]:
    """The targets of part 1."""
    return [
        Check(
            f"{name}, {phase}: 2 ranks x 1 thread / 1 rank x 2",
            ratio["median"],
            1.10,
            at_least=False,
        )  # fmt: skip
        for phase, ratio in row["ratio"].items()
    ]


def main() -> None:
    """Run, print and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "build/smollm2-135m-instruct-keep0.8")
    parser.add_argument("--large", action="store_true", help="also the 1.1B shape in part 1")
    parser.add_argument("--parts", nargs="+", choices=["ranks", "plans", "overlap"],
                        default=["ranks", "plans", "overlap"])  # fmt: skip
    parser.add_argument("--links", nargs="+", choices=list(LINKS), default=list(LINKS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE",
                        help="merge the results files of such runs instead")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--out", type=Path, help="default: bench/results/tensor_parallel.json")
    options = parser.parse_args()
    if options.merge:
        results, checks = merge([json.loads(file.read_text()) for file in options.merge])
    else:
        results, checks = merge([run(options)])
    finish("tensor_parallel", results, checks, options.out, options.check)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for."""
    results: dict[str, Any] = {"name": "tensor_parallel", **environment(), "two_ranks": {}}
    models = {"smollm2 keep 0.8": options.model} if "ranks" in options.parts else {}
    if options.large:
        models["1.1B keep 0.5"] = write_synthetic(ROOT / "build/llama-1.1b-keep0.5", LLAMA_1B, 0.5)
    for name, path in models.items():
        if not path.is_dir():
            raise SystemExit(f"{path} is missing; `make demo` makes it")
        results["two_ranks"][name] = against_one_rank(path, options.rounds)
        print(name, results["two_ranks"][name], flush=True)

    small = write_synthetic(ROOT / "build/llama-70b-quarter-keep0.4", SMALL, KEEP)
    machine = rates(torch.get_num_threads())
    results |= {
        "bytes_per_s": machine[0],
        "flops_per_s": machine[1],
        "links": {name: emulated(name, 1, machine[0]) for name in LINKS},
        "plans": PLANS,
        "keep": KEEP,
        "cells": [],
        "overlap": {},
    }
    for link, size in itertools.product(options.links, options.sizes):
        if "plans" in options.parts:
            cells = emulate(small, link, size, options.rounds, machine)
            results["cells"] += [dataclasses.asdict(cell) for cell in cells]
        if "overlap" in options.parts:
            for plan in ("hidden_sharded", "token_sharded"):
                label = f"{link}, {size} ranks, {plan}"
                results["overlap"][label] = hidden(small, size, plan, link, options.rounds, machine)
    return results


if __name__ == "__main__":
    main()

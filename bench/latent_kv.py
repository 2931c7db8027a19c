"""Low-rank KV cache: capacity, attention and throughput against a dense cache and DeInfer's way.

Shapes of 1.1B parameters, multi-head, every linear at keep 0.4, random bf16 weights: "rotary" as
Llama (keys are rotated, so that K is rebuilt) and "plain" as OPT (keys are absorbed).

Capacity: tokens per GiB that an engine reports, against the formula. Attention: one decoded token
of one layer: over a dense cache; over latents of V alone; over latents; and DeInfer's way (arXiv
2604.17709), copy all latents, rebuild all K and V by products, rotate, attend: in torch, as its
implementation is (`latent_peer.py`), and as `rebuild_all` with this repository's kernels.
Throughput: all requests of a trace at once through engines of few layers (and a small vocabulary,
which would favour large batches), with a KV budget in which a dense cache holds some two requests,
and with room for all.
Ranks: what the planner says of cores of 20 GB/s and 100 GFLOP/s at several degrees of tensor
parallelism. Rebuilding rotated K alone is half of what DeInfer's way computes, so that with the
same kernels a decode step can become twice as fast at most; the target is for the torch one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, Check, environment, finish, summary
from deinfer import _C, LLM, SamplingParams
from latent_peer import checked_rebuild
from native_cpu import LatentLayer, Team
from synthetic import LLAMA_1B, OPT_1B, write_synthetic, write_synthetic_opt
from timing import cores, interleave
from traces import Ints, prompt_tokens, read_lengths, synthetic_lengths

KEEP = 0.4
HEADS, HEAD_DIM = 32, 64
RANK = int(KEEP * HEADS * HEAD_DIM / 2)
KINDS = ("dense", "v_latent", "latent", "rebuild_all")
LAYERS = 4  # of 22 or 24, for throughput
MOST = 256  # answers are cut there
SMALL_TOKENS = 448  # that a dense cache of the small budget holds
ROUNDS = 5


def shape_config(shape: str, layers: int) -> dict[str, Any]:
    """The config.json of a shape before the decomposition."""
    base = LLAMA_1B if shape == "rotary" else OPT_1B
    config = {**base, "num_hidden_layers": layers, "vocab_size": 2048}
    return config | ({"num_key_value_heads": HEADS} if shape == "rotary" else {})


def write_shape(directory: Path, shape: str, layers: int) -> Path:
    """Write the checkpoint of a shape unless it is there."""
    write = write_synthetic if shape == "rotary" else write_synthetic_opt
    return write(directory / f"{shape}-{layers}", shape_config(shape, layers), KEEP)


def formula_bytes(layers: int) -> int:
    """Bytes per token with latents of k and v in bf16."""
    return layers * 2 * RANK * 2


def capacity(path: Path, layers: int) -> dict[str, Any]:
    """Tokens per GiB of an engine's KV pool, dense and with latents."""
    rows = {}
    for kind in ("dense", "latent"):
        info = LLM(path, num_threads=1, kv_cache=kind, kv_cache_bytes=64 << 20).model_info
        tokens = info.num_kv_blocks * 16
        rows[kind] = tokens / info.kv_cache_bytes * 2**30
    formula = 2**30 / formula_bytes(layers)
    return {
        "layers": layers,
        "tokens_per_gib": rows,
        "formula": formula,
        "of_formula": rows["latent"] / formula,
        "of_dense": rows["latent"] / rows["dense"],
    }


def attention(shape: str, context: int, threads: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of the attention of one token in one layer, by kind, taken in turns."""
    team = Team(threads)
    layers = {
        kind: LatentLayer(
            team,
            kind,
            rotary=shape == "rotary",
            heads=HEADS,
            kv_heads=HEADS,
            head_dim=HEAD_DIM,
            rank=RANK,
            context=context,
        )
        for kind in KINDS
    }
    for kind in ("latent", "rebuild_all"):
        layers[kind].run(1)
    want = layers["rebuild_all"].output()
    error = float((layers["latent"].output() - want).norm() / want.norm())
    if not error < 2e-2:
        raise RuntimeError(f"{shape} at {context}: latents are off by {error:.3g}")
    peer = checked_rebuild(
        rotary=shape == "rotary", heads=HEADS, head_dim=HEAD_DIM, rank=RANK, context=context
    )
    runs = {kind: layer.run for kind, layer in layers.items()} | {"torch": peer.run}
    with cores(threads):
        samples = interleave(runs, ROUNDS, seconds)
    return {
        "shape": shape,
        "context": context,
        "error": error,
        "ms": {kind: summary([1e3 * s for s in times]) for kind, times in samples.items()},
        **{
            f"{slow}_over_{fast}": summary(
                [a / b for a, b in zip(samples[slow], samples[fast], strict=True)]
            )
            for slow in ("torch", "rebuild_all")
            for fast in ("latent", "v_latent")
        },
    }


def make_trace(lengths: Ints, count: int, seed: int = 1) -> list[tuple[int, int]]:
    """Prompt and answer tokens of `count` requests."""
    answers = np.random.default_rng(seed).choice(lengths, count)
    prompts = prompt_tokens(count, seed).clip(1, 128)
    return [(int(p), int(a)) for p, a in zip(prompts, answers.clip(1, MOST), strict=True)]


def serve(path: Path, kind: str, kv_bytes: int, trace: list[tuple[int, int]]) -> dict[str, Any]:
    """Seconds of a trace whose requests are all there at the beginning."""
    llm = LLM(
        path,
        kv_cache=kind,
        kv_cache_bytes=kv_bytes,
        max_model_len=512,
        max_num_seqs=64,
        enable_prefix_caching=False,
    )
    numbers = np.random.default_rng(3)
    prompts = [{"prompt_token_ids": numbers.integers(3, 2048, p).tolist()} for p, _ in trace]
    params = [
        SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True) for _, answer in trace
    ]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    if generated != sum(answer for _, answer in trace):
        raise RuntimeError(f"{kind}: {generated} tokens were generated")
    info = llm.model_info
    return {
        "kv_cache": kind,
        "seconds": seconds,
        "tokens_per_s": generated / seconds,
        "kv_tokens": info.num_kv_blocks * 16,
        "kv_bytes_per_token": info.kv_bytes_per_token,
        "steps": llm.stats.num_steps,
        "reason": info.kv_reason,
    }


def throughput(
    path: Path, shape: str, trace: list[tuple[int, int]], rounds: int
) -> list[dict[str, Any]]:
    """Both budgets and all kinds, in turns; medians of rounds of the ratio to dense."""
    dense_token = LAYERS * 2 * HEADS * HEAD_DIM * 2
    cases = []
    for budget, tokens in (("small", SMALL_TOKENS), ("ample", 64 * 512)):
        runs: dict[str, list[dict[str, Any]]] = {"dense": [], "auto": [], "latent": []}
        if shape == "rotary" and budget == "ample":
            del runs["latent"]  # which loses already in the small one
        for _ in range(rounds):
            for kind, done in runs.items():
                done.append(serve(path, kind, tokens * dense_token, trace))
        case: dict[str, Any] = {"shape": shape, "budget": budget, "dense_tokens": tokens}
        for kind, done in runs.items():
            ratios = [
                a["tokens_per_s"] / b["tokens_per_s"]
                for a, b in zip(done, runs["dense"], strict=True)
            ]
            rates = summary([run["tokens_per_s"] for run in done])
            case[kind] = done[-1] | {"tokens_per_s": rates, "of_dense": summary(ratios)}
        cases.append(case)
    return cases


def ranks(shape: str, directory: Path, hardware: str) -> list[dict[str, Any]]:
    """What the planner says at several degrees of tensor parallelism."""
    rows = []
    for size in (1, 2, 4, 8):
        report = _C.plan_tensor_parallelism(
            _C.PlannerConfig(
                model=str(write_shape(directory, shape, LAYERS)),
                tensor_parallel_size=size,
                hardware=hardware,
                kv_cache="auto",
                memory_gib=0.5,
                context=512,
            )
        )
        plan = next(plan for plan in report.plans if plan.plan == "hidden_sharded")
        dense, latent = plan.dense_kv_bytes_per_token, plan.latent_kv_bytes_per_token
        divided = plan.token_sharded_kv_bytes_per_token
        rows.append(
            {
                "shape": shape,
                "ranks": size,
                "dense_bytes": dense,
                "latent_bytes": latent,
                "token_sharded_bytes": divided,
                "tokens_with_latents": dense / latent,
                "tokens_with_token_sharded_latents": dense / divided,
                "auto_bytes": plan.kv_bytes_per_token,
                "k_break_even_rank": plan.k_break_even,
                "v_break_even_rank": plan.v_break_even,
                "auto": plan.kv_reason,
            }
        )
    return rows


def capacity_check(shape: str, row: dict[str, Any]) -> Check:
    """Tokens per GiB against the formula."""
    return Check(f"{shape}: tokens per GiB of the formula's", row["of_formula"], 0.95)


def attention_checks(row: dict[str, Any]) -> list[Check]:
    """The target at context 4096."""
    if row["context"] != 4096:
        return []
    name = f"{row['shape']}: copy + rebuild + attention in torch over "
    checks = [Check(name + "latents, 4096", row["torch_over_latent"]["median"], 3.0)]
    if row["shape"] == "rotary":  # what "auto" keeps
        ratio = row["torch_over_v_latent"]["median"]
        checks.append(Check(name + "K and latents of V, 4096", ratio, 3.0))
    return checks


def throughput_checks(case: dict[str, Any]) -> list[Check]:
    """Where memory limits, gains; where it does not, no loss."""
    name = f"{case['shape']}: auto over dense, {case['budget']} KV budget"
    target = 1.5 if case["budget"] == "small" else 0.95
    return [Check(name, case["auto"]["of_dense"]["median"], target)]


def main() -> None:
    """Measure, print, write bench/results/latent_kv.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "bench-models")
    parser.add_argument("--lengths", type=Path, help="CSV of answer lengths (default: synthetic)")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1, help="of the trace")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024, 4096])
    parser.add_argument("--seconds", type=float, default=0.2, help="per kind and round")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--check", action="store_true", help="fail where a target is missed")
    options = parser.parse_args()
    lengths = read_lengths(options.lengths) if options.lengths else synthetic_lengths(2000)
    trace = make_trace(lengths.served, options.requests)
    threads = torch.get_num_threads()
    results: dict[str, Any] = {
        "environment": environment(),
        "rank": RANK,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "layers": LAYERS,
        "threads": threads,
        "requests": len(trace),
        "lengths": options.lengths.name if options.lengths else "synthetic",
        "capacity": {},
        "attention": [],
        "throughput": [],
        "ranks": [],
    }
    checks = []
    for shape in ("rotary", "plain"):
        path = write_shape(options.models, shape, LAYERS)
        row = capacity(path, LAYERS)
        results["capacity"][shape] = row
        checks.append(capacity_check(shape, row))
        print(f"{shape}: {row['of_dense']:.2f} times the tokens of a dense cache")
        for context in options.contexts:
            row = attention(shape, context, threads, options.seconds)
            results["attention"].append(row)
            checks += attention_checks(row)
            times = ", ".join(f"{kind} {ms['median']:.3f}" for kind, ms in row["ms"].items())
            print(f"{shape} context {context}: ms per layer and token: {times}", flush=True)
        for case in throughput(path, shape, trace, options.rounds):
            results["throughput"].append(case)
            checks += throughput_checks(case)
            for kind in ("dense", "auto", "latent"):
                if kind not in case:
                    continue
                run = case[kind]
                print(
                    f"{shape}, {case['budget']} budget, {kind}: "
                    f"{run['tokens_per_s']['median']:.1f} tokens/s, {run['kv_tokens']} tokens of "
                    f"KV; {run['reason']}",
                    flush=True,
                )
        results["ranks"] += ranks(shape, options.models, "cpu:20:100")
    for row in results["ranks"]:
        print(
            f"{row['shape']}, {row['ranks']} ranks: {row['tokens_with_latents']:.2f} times the "
            f"tokens with latents, {row['tokens_with_token_sharded_latents']:.2f} where ranks "
            f"divide the tokens; auto: {row['auto']}"
        )
    finish("latent_kv", results, checks, options.output, options.check)


if __name__ == "__main__":
    main()

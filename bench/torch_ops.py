#!/usr/bin/env python3
"""What deinfer's custom ops make of a torch model whose linears are factor pairs.

Decodes with transformers' Llama of the 1.1B shape at keep 0.5 (bf16, random weights), the same
model with plain pairs of nn.Linear and after `deinfer.accelerate`, turn by turn; and takes the time
of a call of the op on a matrix so small that only the way to the kernel counts.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Check, environment, finish, summary
from deinfer import torch_ops
from deinfer.decompose.reference import load_reference
from deinfer.nn import LowRankLinear, OuterFactor, accelerate
from synthetic import LLAMA_1B, write_synthetic
from timing import Run, interleave
from torch.nn.functional import linear
from transformers import DynamicCache

TARGETS = {1: 1.3, 16: 1.5}  # decode speed of the accelerated model over the plain one, by batch
MAX_DISPATCH_US = 6.0
CONTEXT = 64  # tokens before the decoded ones
KEEP = 0.5


def decode(model: Any, batch: int) -> Run:
    """Decode steps behind a context, which every turn begins anew."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(batch * CONTEXT).reshape(batch, CONTEXT) % model.config.vocab_size
    model(ids, past_key_values=cache, use_cache=True)
    token = ids[:, -1:].contiguous()

    def run(calls: int) -> list[float]:
        if decoded := cache.get_seq_length() - CONTEXT:
            cache.crop(-decoded)
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


def verify(plain: Any, fast: Any) -> dict[str, float]:
    """Errors of both models' linears against float64, and of their logits against each other."""
    worst = {"plain": 0.0, "accelerated": 0.0}
    first = plain.model.layers[0], fast.model.layers[0]
    for a, b in zip(*(layer.modules() for layer in first), strict=True):
        if not isinstance(getattr(b, "u", None), OuterFactor):
            continue
        x = torch.randn(3, b.v.in_features).bfloat16()
        exact = x.double() @ a.v.weight.double().T @ a.u.weight.double().T
        for name, module in (("plain", a), ("accelerated", b)):
            error = ((module(x).double() - exact).norm() / exact.norm()).item()
            worst[name] = max(worst[name], error)
    ids = torch.arange(32)[None]
    logits, wanted = fast(ids).logits.float(), plain(ids).logits.float()
    worst["logits"] = ((logits - wanted).norm() / wanted.norm()).item()
    if worst["accelerated"] > 1.5 * worst["plain"] or worst["logits"] > 0.1:
        raise SystemExit(f"the accelerated model computes something else: {worst}")
    return worst


def microseconds(call: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Per call, in rounds of 5000."""
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(5000):
            call()
        samples.append((time.perf_counter() - start) / 5000 * 1e6)
    return summary(samples)


def dispatch(rounds: int) -> dict[str, Any]:
    """Microseconds of calls with 16 x 16 factors of rank 16 and one row."""
    x, v, u = (torch.randn(size, 16) for size in (1, 16, 16))
    packed = torch_ops.lowrank_pack([v], [u], [None])
    module = LowRankLinear.from_factors(v, u).eval()
    calls = {
        "lowrank_linear_packed": lambda: torch_ops.lowrank_linear_packed(x, packed, 16),
        "LowRankLinear": lambda: module(x),
        "two torch linears": lambda: linear(linear(x, v), u),
        "new_empty": lambda: x.new_empty((1, 16)),
    }
    return {name: microseconds(call, rounds) for name, call in calls.items()}


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=22, help="of the model; default: %(default)s")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--out", type=Path, help="default: bench/results/torch_ops.json")
    options = parser.parse_args()

    results: dict[str, Any] = {"environment": environment(), "torch": torch.__version__}
    config = {**LLAMA_1B, "num_hidden_layers": options.layers}
    name = f"llama-1.1b-keep{KEEP:g}" + (
        "" if options.layers == 22 else f"-{options.layers}-layers"
    )
    plain = load_reference(write_synthetic(ROOT / "build" / name, config, KEEP), torch.bfloat16)
    # The same parameters: only the packed copies come on top.
    fast = accelerate(copy.deepcopy(plain, {id(p): p for p in plain.parameters()}))
    checks = []
    with torch.inference_mode():
        results["errors"] = verify(plain, fast)
        results["dispatch_us"] = dispatch(options.rounds)
        checks.append(
            Check(
                "dispatch of lowrank_linear_packed, us",
                results["dispatch_us"]["lowrank_linear_packed"]["median"],
                MAX_DISPATCH_US,
                at_least=False,
            )
        )
        results["decode"] = {}
        for batch, target in TARGETS.items():
            samples = interleave(
                {"plain": decode(plain, batch), "accelerated": decode(fast, batch)},
                options.rounds,
                seconds=2.0,
            )
            ratios = [a / b for a, b in zip(samples["plain"], samples["accelerated"], strict=True)]
            results["decode"][f"batch {batch}"] = {
                "speedup": summary(ratios),
                "tokens_per_s": {
                    name: summary([batch / s for s in times]) for name, times in samples.items()
                },
            }
            checks.append(
                Check(f"decode, batch {batch}: speed-up", summary(ratios)["median"], target)
            )
    finish("torch_ops", results, checks, options.out, options.check)


if __name__ == "__main__":
    main()

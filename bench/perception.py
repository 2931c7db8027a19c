"""Length perception on a model's own answers, against a constant and TF-IDF + ridge.

Answers and hidden states are collected with the engine (minutes; kept in --data, where an
interrupted run goes on), heads are trained and cross-validated, and their cost in the engine is
measured. Judged are ratios between predictors on the same splits, never tokens. The results hold
neither prompts nor answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, Check, environment, finish, summary
from deinfer import LLM, SamplingParams
from deinfer.perception import instructed
from deinfer.perception.collect import CollectOptions, collect
from deinfer.perception.dataset import Collection, PromptRecord, read_collection, read_prompts
from deinfer.perception.evaluate import Evaluation, evaluate, format_table
from deinfer.perception.plots import plot
from deinfer.perception.train import TrainOptions, train_head


def choose(records: list[PromptRecord], count: int, seed: int) -> list[PromptRecord]:
    """Up to `count` prompts, shuffled: of all sources, the largest one cut where there are more.

    A source is what an id says before its number, or else the record's own.
    """
    by_source: dict[str, list[PromptRecord]] = {}
    for record in records:
        source = record.id.rpartition("-")[0] or record.source
        by_source.setdefault(source, []).append(dataclasses.replace(record, source=source))
    largest = max(by_source, key=lambda source: len(by_source[source]))
    order = [*sorted(set(by_source) - {largest}), largest]
    chosen = [record for source in order for record in by_source[source]][:count]
    random.Random(seed).shuffle(chosen)
    return chosen


def measure_cost(
    model: Path, collection: Collection, directory: Path, rounds: int
) -> dict[str, Any]:
    """What exporting states and evaluating the head cost a prefill, in turns."""
    head = train_head(collection, np.arange(min(200, len(collection.ids)))).save(directory)
    arguments: dict[str, Any] = {"use_tqdm_on_load": False, "enable_prefix_caching": False}
    plain = LLM(model, num_kv_blocks=1024, **arguments)
    perceiving = LLM(model, num_kv_blocks=1024, length_predictor=str(head), **arguments)
    questions = [[{"role": "user", "content": text}] for text in collection.prompts[:64]]
    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)

    def prefill(llm: LLM) -> tuple[float, float]:
        before = llm.stats
        start = time.perf_counter()
        llm.chat(questions, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        spent = llm.stats.length_predictor_us - before.length_predictor_us
        return seconds, spent / 1e6

    # The head is asked only about answers that go on; so ask for two tokens of it.
    seconds: dict[str, list[float]] = {"plain": [], "perceiving": []}
    for i in range(rounds + 1):
        for name, llm in (("plain", plain), ("perceiving", perceiving)):
            taken, _ = prefill(llm)
            if i > 0:
                seconds[name].append(taken)
    params = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0, detokenize=False)
    before = perceiving.stats
    perceiving.chat(questions, params, use_tqdm=False)
    after = perceiving.stats
    predictions = after.length_predictions - before.length_predictions
    head_us = (after.length_predictor_us - before.length_predictor_us) / predictions
    prefill_us = 1e6 * statistics.median(seconds["plain"]) / len(questions)
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["perceiving"], strict=True)]
    return {
        "prompts": len(questions),
        "prefill_us_per_prompt": prefill_us,
        "head_us_per_prediction": head_us,
        "head_share_of_prefill": head_us / prefill_us,
        "prefill_seconds": {name: summary(values) for name, values in seconds.items()},
        "prefill_with_export_over_plain": summary(ratios),
    }


def judge_instructed(model: Path, collection: Collection, count: int) -> dict[str, Any]:
    """Ask the model itself."""
    llm = LLM(model, use_tqdm_on_load=False, num_kv_blocks=2048)
    prompts = collection.prompts[:count]
    actual = collection.lengths[:count].mean(axis=1).tolist()
    return {"prompts": len(prompts), **instructed.judge(llm.ask, prompts, actual)}


def checks_of(evaluation: Evaluation, cost: dict[str, Any]) -> list[Check]:
    """The targets of the issue."""
    checks = []

    def compare(where: str, metrics: dict[str, dict[str, float]], gap: float) -> None:
        ours, theirs = metrics["hidden_state"], metrics["tfidf_ridge"]
        checks.append(Check(f"{where}: MAE / TF-IDF", ours["mae"] / theirs["mae"], 0.85, False))
        checks.append(Check(f"{where}: tau - TF-IDF's", ours["tau"] - theirs["tau"], gap))

    compare("same sources", evaluation.prompt_time, 0.12)
    for source, metrics in evaluation.cross_source.items():
        compare(f"unseen {source}", metrics, 0.10)
    at_64 = evaluation.remaining["64"]
    ratio = at_64["refined"]["mae"] / at_64["survival"]["mae"]
    checks.append(Check("remaining at 64: MAE / survival", ratio, 0.75, False))
    checks.append(Check("q90 coverage", evaluation.calibration["coverage_q90"], 0.85))
    checks.append(Check("q90 coverage", evaluation.calibration["coverage_q90"], 0.95, False))
    checks.append(Check("training on 400, s", evaluation.train_seconds["seconds"], 10, False))
    checks.append(Check("head / prefill", cost["head_share_of_prefill"], 0.005, False))
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="jsonl {id, prompt, source}")
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "perception")
    parser.add_argument("--count", type=int, default=900, help="prompts (default: 900)")
    parser.add_argument("--samples", type=int, default=2, help="answers of each (default: 2)")
    parser.add_argument("--cap", type=int, default=512)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7, help="of timing (default: 7)")
    parser.add_argument("--instructed", type=int, default=200, help="prompts (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; PNGs go beside it")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    options = parser.parse_args()
    results: dict[str, Any] = {"name": "perception", **environment()}
    collect(
        options.model,
        choose(read_prompts(options.prompts), options.count, options.seed),
        options.data,
        CollectOptions(samples=options.samples, cap=options.cap, shard=225, seed=options.seed),
        max_num_seqs=128,
    )
    collection = read_collection(options.data)
    config = dataclasses.asdict(collection.config)
    sources = sorted(set(collection.sources))
    results["collection"] = {
        **config,
        "model": Path(config["model"]).name,
        "prompts": {source: collection.sources.count(source) for source in sources},
        "mean_length": float(collection.lengths.mean()),
        "censored": float(collection.censored.mean()),
    }
    evaluation = evaluate(
        collection,
        folds=options.folds,
        options=TrainOptions(seed=options.seed),
        progress=lambda text: print(text, file=sys.stderr),
    )
    print(format_table(evaluation))
    results.update(evaluation.to_json())
    results["cost"] = measure_cost(options.model, collection, options.data / "head", options.rounds)
    results["instructed"] = judge_instructed(options.model, collection, options.instructed)
    plots = (options.output or ROOT / "bench" / "results" / "x").parent
    results["plots"] = [path.name for path in plot(evaluation, plots)]
    finish(
        "perception", results, checks_of(evaluation, results["cost"]), options.output, options.check
    )


if __name__ == "__main__":
    main()

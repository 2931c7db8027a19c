"""Quality, time and memory of the decomposer.

    grid     perplexity / the dense model's, training-free, for methods and shares kept
    kinds    what truncating one kind of linear costs, against what the method predicts
    recover  ten minutes of recovery at keep 0.8; wants all cores
    memory   peak memory of `deinfer decompose` on a random Llama of 1.1 billion parameters

Parts can be run one by one: what others have written to the results file stays. Perplexity is that
of text that calibration never sees: the packaged held-out text, and the beginning of --text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Check, environment, finish
from deinfer.decompose import METHODS, decompose_model, load_reference
from deinfer.decompose.allocate import parameters, tail_loss
from deinfer.decompose.calibration import RuntimeSampler, sample_calibration
from deinfer.decompose.checkpoint import Factors
from deinfer.decompose.options import COMPENSATE_BELOW, make_options
from deinfer.decompose.pipeline import DEFAULT_RANK_MULTIPLE, DEFAULT_TOKENS
from deinfer.decompose.quality import loss
from deinfer.decompose.run import Run
from deinfer.decompose.source import SourceCheckpoint
from deinfer.decompose.streaming import StreamedModel, compute_dtype
from deinfer.decompose.sweep import cut_factors
from deinfer.decompose.workdir import WorkDirectory, read_factors
from random_llama import write_random_llama
from transformers import AutoTokenizer

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
# (method, ranks, compensate): what `deinfer decompose` does below COMPENSATE_BELOW and above, and
# the objective of SVD-LLM.
OURS = ("two_sided", "allocated", True)
OURS_PLAIN = ("two_sided", "allocated", False)
BASELINE = ("whitened", "uniform", False)
GRID = (
    OURS,
    BASELINE,
    OURS_PLAIN,
    ("two_sided", "uniform", False),
    ("svd", "uniform", False),
)
WINDOW = 1024
_LIMIT = 6 << 30


def label(method: str, ranks: str, compensate: bool) -> str:
    return f"{method} {ranks}{' compensated' if compensate else ''}"


class Texts:
    """Held-out texts, cut into windows, and the dense model's loss on them."""

    def __init__(self, model: StreamedModel, source: Path, text: Path | None, tokens: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(source)
        held_out = (resources.files("deinfer") / "data" / "heldout.txt").read_text("utf-8")
        texts = {"heldout": tokenizer(held_out, verbose=False)["input_ids"][:tokens]}
        if text is not None:
            ids = tokenizer(text.read_text("utf-8")[: 8 * tokens], verbose=False)["input_ids"]
            texts[text.stem] = ids[:tokens]
        self.windows = {
            name: [ids[i : i + WINDOW] for i in range(0, len(ids) - 1, WINDOW)]
            for name, ids in texts.items()
        }
        self._model = model
        self.dense = {name: loss(model, windows) for name, windows in self.windows.items()}

    def ratios(self, cut: Callable[[int], dict[str, Factors]]) -> dict[str, float]:
        """Perplexity / the dense model's by text."""
        return {
            name: math.exp(min(loss(self._model, windows, cut) - self.dense[name], 50.0))
            for name, windows in self.windows.items()
        }


def runs(arguments: argparse.Namespace, method: str, ranks: str, compensate: bool) -> Run:
    """A run of the decomposer in a work directory of the bench, shared by all keeps."""
    options = make_options(
        keep=0.8,
        target_size=None,
        target_ppl_increase=None,
        method=method,
        ranks=ranks,
        rank_multiple=DEFAULT_RANK_MULTIPLE,
        compensate=compensate,
        calibration=None,
        calibration_tokens=arguments.calibration_tokens,
        recover_minutes=0.0,
        recover_steps=0,
        seed=0,
    )
    source = SourceCheckpoint(arguments.model)
    work = WorkDirectory(arguments.build / f"{method}-{arguments.calibration_tokens}")
    return Run(options, source, work, None, progress=True)


def sequences(arguments: argparse.Namespace) -> None:
    """Sample the calibration text once for all methods."""
    file = arguments.build / f"calibration-{arguments.calibration_tokens}.json"
    if not file.is_file():
        start = time.perf_counter()
        made = sample_calibration(
            RuntimeSampler(arguments.model, seed=0), arguments.calibration_tokens, 0
        )
        found = {"sequences": made.sequences, "source": made.source}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
        print(f"sampled {made.tokens} tokens in {time.perf_counter() - start:.0f} s")
    for method in METHODS:
        work = WorkDirectory(arguments.build / f"{method}-{arguments.calibration_tokens}")
        if work.read_json("calibration") is None:
            work.write_json("calibration", json.loads(file.read_text()))


def grid(arguments: argparse.Namespace, results: dict[str, Any]) -> list[Check]:
    sequences(arguments)
    table = results.setdefault("grid", {})
    for method, ranks, compensate in GRID:
        row = table.setdefault(label(method, ranks, compensate), {})
        missing = [keep for keep in arguments.keeps if f"{keep:g}" not in row]
        if not missing:
            continue
        run = runs(arguments, method, ranks, compensate)
        calibration, _ = run.calibrate()
        model = run.stream()
        texts = Texts(model, arguments.model, arguments.text, arguments.text_tokens)
        results["dense"] = {name: math.exp(value) for name, value in texts.dense.items()}
        start = time.perf_counter()
        run.sweep(model, calibration)
        print(f"{label(method, ranks, compensate)}: swept in {time.perf_counter() - start:.0f} s")
        candidates = run.candidates(model)
        for keep in missing:
            start = time.perf_counter()
            chosen = run.ranks_at(candidates, keep)
            for stage in ("low", "factors"):
                run.work.remove(stage)
            run.factor(model, chosen, calibration)
            entry: dict[str, Any] = texts.ratios(partial(read_factors, run.work, "factors"))
            entry["keep"] = sum(parameters(c, chosen[n]) for n, c in candidates.items()) / sum(
                parameters(c, None) for c in candidates.values()
            )
            entry["calibration_tokens"] = arguments.calibration_tokens
            entry["rank_multiple"] = DEFAULT_RANK_MULTIPLE
            entry["seconds"] = round(time.perf_counter() - start, 1)
            row[f"{keep:g}"] = entry
            print(f"  keep {keep:g}: {entry}", flush=True)
            save(arguments, results)
    return grid_checks(results)


def grid_checks(results: dict[str, Any]) -> list[Check]:
    table = results.get("grid", {})
    baseline = table.get(label(*BASELINE), {})
    ours = {
        keep: row
        for kind in (OURS, OURS_PLAIN)
        for keep, row in table.get(label(*kind), {}).items()
        if (float(keep) < COMPENSATE_BELOW) == (kind == OURS)
    }
    checks = [
        Check(
            f"keep {keep}, training-free: perplexity ratio", row["heldout"], limit, at_least=False
        )
        for keep, limit in (("0.9", 1.10), ("0.8", 1.60))
        if (row := ours.get(keep))
    ]
    checks += [
        Check(
            f"keep {keep}: two_sided allocated / whitened uniform, {text}",
            ours[keep][text] / baseline[keep][text],
            1.0,
            at_least=False,
        )
        for keep in ours
        if keep in baseline
        for text in results["dense"]
    ]
    return checks


def kinds(arguments: argparse.Namespace, results: dict[str, Any]) -> list[Check]:
    sequences(arguments)
    run = runs(arguments, *OURS)
    calibration, _ = run.calibrate()
    model = run.stream()
    run.sweep(model, calibration)
    candidates = run.candidates(model)
    ranks = run.ranks_at(candidates, 0.8)
    texts = Texts(model, arguments.model, arguments.text, arguments.text_tokens)
    found = {}
    for leaf in model.linears:
        only = {name: rank if name.endswith(leaf) else None for name, rank in ranks.items()}
        if not any(only.values()):
            continue
        got = texts.ratios(lambda i, o=only: cut_factors(run.work, i, model.prefixes[i], o))
        found[leaf] = {
            "predicted": sum(tail_loss(candidates[n], r) for n, r in only.items()),
            "measured": {name: math.log(ratio) for name, ratio in got.items()},
        }
        print(f"  {leaf}: {found[leaf]}", flush=True)
    results["kinds"] = found
    return []


def recovery(arguments: argparse.Namespace, results: dict[str, Any]) -> list[Check]:
    destination = arguments.build / "recovered"
    report = decompose_model(
        arguments.model,
        destination,
        keep=0.8,
        calibration_tokens=arguments.calibration_tokens,
        recover_minutes=arguments.minutes,
        overwrite=True,
        resume=True,
    )
    print(report.summary())
    source = SourceCheckpoint(arguments.model)
    model = StreamedModel(source, compute_dtype(source, list(report.matrices)))
    texts = Texts(model, arguments.model, arguments.text, arguments.text_tokens)
    low = load_reference(destination, model.dtype)
    ratios = {}
    for name, windows in texts.windows.items():
        total = count = 0.0
        for window in windows:
            ids = torch.tensor([window])
            with torch.no_grad():
                logits = low(ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += len(window) - 1
        ratios[name] = math.exp(total / count - texts.dense[name])
    results["recover"] = {
        "keep": report.keep,
        "minutes": arguments.minutes,
        "ratios": ratios,
        "recovery": report.recovery,
        "seconds": report.seconds,
    }
    print(ratios)
    name = f"keep 0.8, {arguments.minutes:g} minutes of recovery: perplexity ratio"
    return [Check(name, ratios["heldout"], 1.30, at_least=False)]


def memory(arguments: argparse.Namespace, results: dict[str, Any]) -> list[Check]:
    """Run the command until it ends, killed and resumed after --slice seconds each."""
    source = write_random_llama(arguments.build / "random-llama-1.1b")
    destination = arguments.build / "random-llama-low"
    shutil.rmtree(destination, ignore_errors=True)
    entry = results.setdefault("memory", {"peak_bytes": 0, "seconds": 0.0, "kills": 0})
    command = [sys.executable, "-m", "deinfer", "decompose", str(source), str(destination)]
    command += ["--calibration-tokens", "1024", "--resume"]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    while (waited := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        if time.perf_counter() - start > arguments.slice:
            process.kill()
        time.sleep(0.2)
    entry["peak_bytes"] = max(entry["peak_bytes"], waited[2].ru_maxrss * 1024)
    entry["seconds"] += time.perf_counter() - start
    entry["done"] = destination.is_dir()
    entry["kills"] += 0 if entry["done"] else 1
    print(entry)
    gib = entry["peak_bytes"] / 2**30
    return [Check("1.1B random Llama: peak memory, GiB", gib, _LIMIT / 2**30, at_least=False)]


def plot(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Draw perplexity against keep."""
    from matplotlib.figure import Figure

    names = list(results["dense"])
    figure = Figure(figsize=(6 * len(names), 4.5), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for name, row in results["grid"].items():
            points = sorted((entry["keep"], entry[text]) for entry in row.values())
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        if "recover" in results:
            found = results["recover"]
            axes.plot(
                found["keep"],
                found["ratios"][text],
                "k*",
                ms=12,
                label=f"two_sided, {found['minutes']:g} min of recovery",
            )
        axes.set_yscale("log")
        axes.set_xlabel("keep")
        axes.set_ylabel("perplexity / dense")
        axes.set_title(f"SmolLM2-135M-Instruct, {text}")
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    file = (arguments.json or ROOT / "bench" / "results" / "decompose.json").with_suffix(".png")
    figure.savefig(file, dpi=110)


def save(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    file = arguments.json or ROOT / "bench" / "results" / "decompose.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")


PARTS = {"grid": grid, "kinds": kinds, "recover": recovery, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "smollm2-135m-instruct")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "bench-decompose")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--text", type=Path, help="more text to measure on")
    parser.add_argument("--text-tokens", type=int, default=6144, help="most tokens of a text")
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--calibration-tokens", type=int, default=DEFAULT_TOKENS)
    parser.add_argument("--minutes", type=float, default=10.0, help="of recovery")
    parser.add_argument("--slice", type=float, default=3600.0, help="seconds before a kill")
    parser.add_argument("--json", type=Path, help="results file")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    arguments = parser.parse_args()
    file = arguments.json or ROOT / "bench" / "results" / "decompose.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    checks = {
        c["name"]: Check(c["name"], c["value"], c["target"], c["at_least"])
        for c in results.get("checks", [])
    }
    for part in arguments.parts:
        before = environment()
        checks |= {check.name: check for check in PARTS[part](arguments, results)}
        results.setdefault("environment", {})[part] = before
    if "grid" in results:
        plot(results, arguments)
    finish("decompose", results, list(checks.values()), arguments.json, arguments.check)


if __name__ == "__main__":
    main()

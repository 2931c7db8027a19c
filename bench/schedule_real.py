"""The scheduling policies on the running engine, against what the simulation predicts for them.

Real prompts, SmolLM2 at T = 0.7, all submitted at once. Every answer must be the same under every
policy. The steps, all of which but `report` should have the machine to themselves:

    collect    answer every prompt twice: the lengths, and those of other samples as predictions
    calibrate  fit the cost of the engine's steps
    measure    drain all prompts once per variant of a setting, one after the other; may be repeated
    report     compare with the simulation for the calibrated costs; writes the results file

An oracle knows each answer's length; the realistic predictor `resample` says how long another
answer of the model to the same prompt was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, Check, environment, finish
from deinfer import _C, SamplingParams
from deinfer.tokenizer import load_tokenizer
from simulation import StepCost, offline, settings, simulate
from step_cost import calibrate
from traces import accuracy, certain

TEMPERATURE = 0.7
MAX_TOKENS = 384
MAX_PROMPT = 96  # tokens, template included
BLOCK = 16
SHARE = 0.7  # of the predicted gain that must be measured
NOTICEABLE = 0.03  # smaller predicted gains are within the noise


@dataclass(frozen=True)
class Setting:
    """Seats and KV tokens; the variant that the others are compared with comes first."""

    slots: int
    kv_tokens: int
    variants: tuple[str, ...]


SETTINGS = {
    # Seats bind: there is KV for all of them.
    "slots": Setting(
        16,
        16 * (MAX_PROMPT + MAX_TOKENS + BLOCK),
        ("fcfs", "longest_tail resample", "longest_tail oracle", "sjf resample", "sjf oracle")
        + ("hrrn resample", "static", "static_bucket resample"),
    ),
    # KV binds: for about 13 average sequences.
    "kv": Setting(
        32,
        2560,
        ("fcfs eager", "fcfs", "fcfs resample", "fcfs oracle", "fcfs max_tokens"),
    ),
}
# What a variant is for: throughput, or the mean latency.
LATENCY = ("sjf", "hrrn")


def variant_options(name: str) -> tuple[dict[str, Any], str]:
    """Settings of scheduler and simulation alike, and the predictor."""
    policy, _, rest = name.partition(" ")
    options: dict[str, Any] = {"policy": policy}
    predictor = ""
    if rest == "eager":  # whatever prompt fits, and evictions at once
        options.update(admission="prompt", max_pause=0, preempt_limit=0)
    elif rest == "max_tokens":
        options["admission"] = rest
    else:
        predictor = rest
    return options, predictor


def read_prompts(path: Path, model: Path, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts that are short enough, in the chat template."""
    tokenizer = load_tokenizer(model)
    prompts = []
    for line in path.read_text().splitlines():
        message = [{"role": "user", "content": json.loads(line)["prompt"]}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= MAX_PROMPT:
            prompts.append(list(ids))
        if len(prompts) == count:
            return prompts
    raise SystemExit(f"{path}: only {len(prompts)} prompts of at most {MAX_PROMPT} tokens")


def engine(model: Path, slots: int, kv_tokens: int, options: dict[str, Any]) -> _C.Engine:
    """An engine without a prefix cache, which the simulation has not either."""
    options = dict(options)
    config = _C.EngineConfig(
        model=str(model),
        max_model_len=512,
        max_num_seqs=slots,
        num_kv_blocks=kv_tokens // BLOCK,
        block_size=BLOCK,
        enable_prefix_caching=False,
        scheduling_policy=options.pop("policy"),
    )
    for name, value in options.items():
        setattr(config, name, value)
    return _C.Engine(config)


def drain(
    model: Path,
    prompts: list[list[int]],
    setting: tuple[int, int],
    options: dict[str, Any],
    expected: list[int] | None,
    sample: int = 0,
) -> dict[str, Any]:
    """Answer all prompts; seconds, latencies and a digest of all tokens."""
    runner = engine(model, *setting, options)
    for _ in range(4):  # warm up
        runner.submit(prompts[0], SamplingParams(max_tokens=8, ignore_eos=True))
    while runner.has_unfinished_requests():
        runner.step()
    places = {}
    for i, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=TEMPERATURE, max_tokens=MAX_TOKENS, seed=2 * i + sample, detokenize=False
        )
        if expected is not None:
            params.expected_tokens = float(expected[i])
        places[runner.submit(prompt, params)] = i
    answers: list[list[int]] = [[] for _ in prompts]
    latency = [0.0] * len(prompts)
    before = runner.stats
    begin = time.perf_counter()
    while runner.has_unfinished_requests():
        outputs = runner.step()
        now = time.perf_counter() - begin
        for output in outputs:
            place = places[output.request_id]
            for part in output.outputs:
                answers[place] += part.new_token_ids
            if output.finished:
                latency[place] = now
    seconds = time.perf_counter() - begin
    after = runner.stats
    return {
        "seconds": seconds,
        "mean_latency": statistics.fmean(latency),
        "max_latency": max(latency),
        "steps": after.num_steps - before.num_steps,
        "preemptions": after.num_preemptions - before.num_preemptions,
        "recomputed_tokens": after.recomputed_tokens - before.recomputed_tokens,
        "digest": hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16],
        "lengths": [len(answer) for answer in answers],
    }


def collect(options: argparse.Namespace) -> None:
    """Answer all prompts twice, with other seeds the second time."""
    prompts = read_prompts(options.prompts, options.model, options.count)
    runs = [
        drain(options.model, prompts, (64, 64 * 512), {"policy": "fcfs"}, None, sample)
        for sample in (0, 1)
    ]
    data = {
        "prompt": [len(prompt) for prompt in prompts],
        "output": runs[0]["lengths"],
        "resample": runs[1]["lengths"],
        "digest": runs[0]["digest"],
    }
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "lengths.json").write_text(json.dumps(data))
    mean = statistics.fmean(data["output"])
    error = accuracy(data["resample"], np.array(data["output"]))
    print(f"{len(prompts)} prompts, mean answer {mean:.1f}; resample: {error}")


def measure(options: argparse.Namespace) -> None:
    """Drain once per variant; a session whose runs are compared with each other."""
    data = json.loads((options.work / "lengths.json").read_text())
    prompts = read_prompts(options.prompts, options.model, len(data["prompt"]))
    setting = SETTINGS[options.setting]
    unknown = set(options.variants) - set(setting.variants)
    if unknown:
        raise SystemExit(f"{sorted(unknown)}: setting {options.setting} has {setting.variants}")
    session: dict[str, Any] = {"setting": options.setting, **environment(), "runs": {}}
    for name in options.variants:
        changes, predictor = variant_options(name)
        source = {"": None, "oracle": "output"}.get(predictor, predictor)
        expected = data[source] if source else None
        run = drain(options.model, prompts, (setting.slots, setting.kv_tokens), changes, expected)
        if run["digest"] != data["digest"]:
            raise SystemExit(f"{name}: other answers than when the lengths were collected")
        del run["lengths"]
        session["runs"][name] = run
        print(
            f"{options.setting} {name:24} {run['seconds']:7.2f} s, mean latency "
            f"{run['mean_latency']:6.2f} s, {run['preemptions']} preemptions",
            flush=True,
        )
    with (options.work / "sessions.jsonl").open("a") as file:
        file.write(json.dumps(session) + "\n")


def calibrate_all(options: argparse.Namespace) -> None:
    """Fit the step cost up to the seats of each setting."""
    costs = {
        name: calibrate(options.model, s.slots, options.rounds) for name, s in SETTINGS.items()
    }
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "costs.json").write_text(json.dumps(costs))
    for name, cost in costs.items():
        print(name, cost["cost"], f"largest error {cost['largest_relative_error']:.1%}")


def predict(data: dict[str, Any], setting: Setting, cost: StepCost) -> dict[str, dict[str, Any]]:
    """What the simulation says of each variant."""
    prompt, output = np.array(data["prompt"]), np.array(data["output"])
    reports = {}
    for name in setting.variants:
        changes, predictor = variant_options(name)
        belief = {"oracle": certain(output), "resample": certain(data["resample"])}.get(predictor)
        reports[name] = simulate(
            offline(prompt, output, belief),
            settings(
                slots=setting.slots,
                kv_tokens=setting.kv_tokens,
                block_size=BLOCK,
                step_tokens=512,
                max_tokens=MAX_TOKENS,
                cost=cost,
                **changes,
            ),
        )
    return reports


def gains(name: str, base: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times better a variant is than the base in what it is for."""
    key = "mean_latency" if name.startswith(LATENCY) else "seconds"
    return float(base[key] / other[key])


def compare(
    sessions: list[dict[str, Any]], predicted: dict[str, dict[str, dict[str, Any]]]
) -> tuple[list[dict[str, Any]], list[Check]]:
    """Measured and predicted gain of each variant over its setting's base, within sessions."""
    rows, checks = [], []
    for label, setting in SETTINGS.items():
        base = setting.variants[0]
        runs = [s["runs"] for s in sessions if s["setting"] == label and base in s["runs"]]
        simulated = {
            name: {"seconds": r["seconds"], "mean_latency": r["latency"]["mean"]}
            for name, r in predicted[label].items()
        }
        for name in setting.variants[1:]:
            samples = [gains(name, run[base], run[name]) for run in runs if name in run]
            if not samples:
                continue
            expected = gains(name, simulated[base], simulated[name])
            measured = statistics.median(samples)
            row = {"setting": label, "variant": name, "of": base, "predicted": expected}
            rows.append({**row, "measured": measured, "samples": samples})
            title = f"{label}: {name} / {base}, predicted x{expected:.3f}"
            if expected >= 1 + NOTICEABLE:
                checks.append(Check(title, measured, 1 + SHARE * (expected - 1)))
            elif expected <= 1 - NOTICEABLE:
                # A loss: at least as large a share of it.
                checks.append(Check(title, measured, 1 - SHARE * (1 - expected), at_least=False))
    return rows, checks


def report(options: argparse.Namespace) -> None:
    """Write the results file."""
    work = options.work
    data = json.loads((work / "lengths.json").read_text())
    costs = json.loads((work / "costs.json").read_text())
    sessions = [json.loads(line) for line in (work / "sessions.jsonl").read_text().splitlines()]
    predicted = {
        name: predict(data, setting, StepCost(**costs[name]["cost"]))
        for name, setting in SETTINGS.items()
    }
    rows, checks = compare(sessions, predicted)
    print(f"{'setting':8}{'variant':26}{'predicted':>10}{'measured':>10}  samples")
    for row in rows:
        samples = ", ".join(f"{sample:.3f}" for sample in row["samples"])
        print(
            f"{row['setting']:8}{row['variant']:26}{row['predicted']:10.3f}"
            f"{row['measured']:10.3f}  {samples}"
        )
    results = {
        "name": "schedule_real",
        **environment(),
        "model": options.model.name,
        "temperature": TEMPERATURE,
        "max_tokens": MAX_TOKENS,
        "prompts": len(data["prompt"]),
        "answer_tokens": sum(data["output"]),
        "resample": accuracy(data["resample"], np.array(data["output"])),
        "settings": {
            name: {"slots": s.slots, "kv_tokens": s.kv_tokens} for name, s in SETTINGS.items()
        },
        "costs": costs,
        "gains": rows,
        "predicted": predicted,
        "sessions": sessions,
    }
    finish("schedule_real", results, checks, options.out, options.check)


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["collect", "calibrate", "measure", "report"])
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "smollm2-135m-instruct")
    parser.add_argument("--prompts", type=Path, help="JSON lines with a field prompt")
    parser.add_argument("--count", type=int, default=512, help="prompts to answer")
    parser.add_argument("--setting", choices=SETTINGS, default="slots")
    parser.add_argument("--variants", nargs="+", help="measure: default all of the setting")
    parser.add_argument("--rounds", type=int, default=3, help="calibrate: samples per kind of step")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "schedule_real")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--out", type=Path, help="default: bench/results/schedule_real.json")
    options = parser.parse_args()
    options.variants = options.variants or list(SETTINGS[options.setting].variants)
    if options.action in ("collect", "measure") and options.prompts is None:
        parser.error(f"{options.action} needs --prompts")
    steps = {"collect": collect, "calibrate": calibrate_all, "measure": measure, "report": report}
    steps[options.action](options)


if __name__ == "__main__":
    main()

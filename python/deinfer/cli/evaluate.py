"""`deinfer eval`: perplexity of a text, or two models side by side."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deinfer.cli.options import (
    Commands,
    UsageError,
    add_engine_options,
    add_model,
    load_model,
    print_json,
    read_text,
    require_model,
    usage_errors,
)

if TYPE_CHECKING:
    from deinfer.evaluate import Speed
    from deinfer.llm import LLM

_EPILOG = """\
Each token but the first is scored once, with at least WINDOW - STRIDE tokens of context once the
text is that long. Compare numbers only for the same text, window and stride.

With --compare, KL(MODEL || OTHER) is the mean over tokens of sum p log(p / q), p of MODEL and q of
OTHER, in nats: MODEL is the reference, say the dense model, and OTHER what replaces it. Both need
the same vocabulary, and memory for 8 WINDOW VOCABULARY bytes beside the models. Speed is measured
in turns, so that a busy machine favours neither.

examples:
  deinfer eval MODEL --text heldout.txt
  deinfer eval MODEL --text heldout.txt --window 2048 --stride 512 --json
  deinfer eval DENSE --text heldout.txt --compare DECOMPOSED
"""
_PREFILL_TOKENS = 512


def add_parser(commands: Commands) -> None:
    """Add the subcommand.

    Args:
        commands: The main parser's subcommands.
    """
    parser = commands.add_parser(
        "eval",
        help="perplexity of a text, or two models side by side",
        description="Measure how well a model predicts a text, alone or against another model.",
        epilog=_EPILOG,
    )
    add_model(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--compare", type=Path, metavar="OTHER", help="second model, with the same vocabulary"
    )
    parser.add_argument(
        "--window", type=int, help="tokens of the longest context (default: 1024 or the model's)"
    )
    parser.add_argument(
        "--stride", type=int, help="tokens that a window moves on (default: half the window)"
    )
    parser.add_argument(
        "--speed-rounds",
        type=int,
        metavar="N",
        help="with --compare: rounds in which speed is measured (default: 3; 0: not at all)",
    )
    parser.add_argument("--json", action="store_true", help="report as JSON")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure and report.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: An argument is bad.
    """
    require_model(options.model)
    text = read_text(options.text)
    if options.compare is not None:
        return _compare(options, text)
    if options.speed_rounds is not None:
        raise UsageError("--speed-rounds needs --compare")
    llm = load_model(options)
    from deinfer.evaluate import perplexity

    with usage_errors():
        result = perplexity(llm, text, window=options.window, stride=options.stride)
    if options.json:
        report = dataclasses.asdict(result)
        print_json({"model": str(options.model), "text": str(options.text), **report})
        return None
    print(f"perplexity  {result.perplexity:.4f}")
    print(f"nll         {result.nll:.5f} nats per token")
    print(f"tokens      {result.tokens:,} (window {result.window}, stride {result.stride})")
    print(f"time        {result.seconds:.1f} s, {result.tokens / result.seconds:,.0f} tok/s")
    return None


def _compare(options: argparse.Namespace, text: str) -> None:
    rounds = 3 if options.speed_rounds is None else options.speed_rounds
    if rounds < 0:
        raise UsageError(f"--speed-rounds {rounds} is negative")
    require_model(options.compare)
    llms = (load_model(options), load_model(options, options.compare))
    from deinfer.comparison import compare

    with usage_errors():
        result = compare(*llms, text, window=options.window, stride=options.stride)
    speeds = _speeds(llms, rounds) if rounds else []
    if options.json:
        report = {
            "model": str(options.model),
            "other": str(options.compare),
            "text": str(options.text),
            **dataclasses.asdict(result),
            "weight_bytes": [llm.model_info.weight_bytes for llm in llms],
            "dtype": [llm.model_info.dtype for llm in llms],
            "speed": [dataclasses.asdict(speed) for speed in speeds],
        }
        print_json(report)
        return
    print(f"KL(model || other)  {result.kl:.6f} nats per token, {result.kl_max:.4f} at most")
    print(f"same top token      {result.agreement:.2%}")
    print(f"tokens              {result.tokens:,} (window {result.window}, stride {result.stride})")
    print(f"\n{'':20}{'model':>14}{'other':>14}{'other / model':>16}")
    megabytes = [llm.model_info.weight_bytes / 1e6 for llm in llms]
    rows = [
        ("perplexity", result.perplexity, result.other_perplexity, ".4f"),
        ("weights, MB", megabytes[0], megabytes[1], ",.1f"),
    ]
    if speeds:
        model, other = speeds
        rows.append(("prefill, tok/s", model.prefill, other.prefill, ",.0f"))
        for batch, rate in model.decode.items():
            rows.append((f"decode x{batch}, tok/s", rate, other.decode[batch], ",.0f"))
    for name, a, b, digits in rows:
        print(f"{name:20}{a:>14{digits}}{b:>14{digits}}{b / a:>16.3f}")


def _speeds(llms: Sequence[LLM], rounds: int) -> list[Speed]:
    from deinfer.evaluate import measure_speed

    longest = min(llm.model_info.max_model_len for llm in llms) - 1
    if longest < 48:  # the prompt and the tokens that decoding is measured with
        raise UsageError(f"speed needs contexts of 48 tokens, the models have {longest}")
    return measure_speed(llms, prompt_tokens=min(_PREFILL_TOKENS, longest), rounds=rounds)

"""`deinfer eval`: perplexity of a text."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from deinfer.cli.options import (
    Commands,
    add_engine_options,
    add_model,
    load_model,
    print_json,
    read_text,
    require_model,
    usage_errors,
)

_EPILOG = """\
Each token but the first is scored once, with at least WINDOW - STRIDE tokens of context once the
text is that long. Compare numbers only for the same text, window and stride.

examples:
  deinfer eval MODEL --text heldout.txt
  deinfer eval MODEL --text heldout.txt --window 2048 --stride 512 --json
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand.

    Args:
        commands: The main parser's subcommands.
    """
    parser = commands.add_parser(
        "eval",
        help="perplexity of a text",
        description="Measure how well a model predicts a text.",
        epilog=_EPILOG,
    )
    add_model(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--window", type=int, help="tokens of the longest context (default: 1024 or the model's)"
    )
    parser.add_argument(
        "--stride", type=int, help="tokens that a window moves on (default: half the window)"
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
    llm = load_model(options)
    from deinfer.evaluate import perplexity

    with usage_errors():
        result = perplexity(llm, text, window=options.window, stride=options.stride)
    if options.json:
        report = dataclasses.asdict(result)
        print_json({"model": str(options.model), "text": str(options.text), **report})
        return
    print(f"perplexity  {result.perplexity:.4f}")
    print(f"nll         {result.nll:.5f} nats per token")
    print(f"tokens      {result.tokens:,} (window {result.window}, stride {result.stride})")
    print(f"time        {result.seconds:.1f} s, {result.tokens / result.seconds:,.0f} tok/s")

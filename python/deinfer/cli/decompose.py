"""`deinfer decompose`: make a low-rank copy of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deinfer.cli.options import Commands, UsageError, add_model, print_json, require_model

_EPILOG = """\
The decoder's linear layers are replaced by factors of low rank where that costs least; the model
calibrates on text that it samples from itself unless --calibration names a file. Nothing is
trained unless --recovery-steps asks for it. The result is a directory like the source, for every
other command of deinfer.

examples:
  deinfer decompose llama llama-keep0.8
  deinfer decompose llama llama-keep0.9 --keep 0.9 --calibration corpus.txt
  deinfer decompose llama llama-keep0.7 --keep 0.7 --recovery-steps 100
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand.

    Args:
        commands: The main parser's subcommands.
    """
    parser = commands.add_parser(
        "decompose",
        help="make a low-rank copy of a checkpoint",
        description="Decompose a dense checkpoint.",
        epilog=_EPILOG,
    )
    add_model(parser)
    parser.add_argument("destination", metavar="DESTINATION", type=Path, help="directory to create")
    parser.add_argument(
        "--keep",
        type=float,
        default=0.8,
        help="share of the decoder's linear parameters to keep (default: 0.8)",
    )
    parser.add_argument(
        "--method",
        default="two_sided",
        help="two_sided (best), whitening, or svd (a baseline) (default: two_sided)",
    )
    parser.add_argument(
        "--rank-multiple", type=int, default=16, help="granularity of the ranks (default: 16)"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="UTF-8 text to calibrate on"
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=12288, help="tokens (default: 12288)"
    )
    parser.add_argument(
        "--recovery-steps",
        type=int,
        default=0,
        help="train the factors on the dense model's outputs for so many steps of about 512 "
        "tokens (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampled text (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace DESTINATION")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Decompose and report.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: An argument is bad.
    """
    require_model(options.model)
    if not 0 < options.keep <= 1:
        raise UsageError(f"--keep {options.keep} is not in (0, 1]")
    if options.destination.exists() and not options.overwrite:
        raise UsageError(f"DESTINATION {str(options.destination)!r} exists; see --overwrite")
    try:
        from deinfer.decompose import METHODS, decompose_model
    except ImportError as error:
        raise RuntimeError(
            f"decompose needs {error.name}: pip install deinfer[decompose]"
        ) from error

    if options.method not in METHODS:
        raise UsageError(f"--method {options.method!r} is not one of {', '.join(METHODS)}")
    report = decompose_model(
        options.model,
        options.destination,
        keep=options.keep,
        method=options.method,
        rank_multiple=options.rank_multiple,
        calibration_text=options.calibration,
        calibration_tokens=options.calibration_tokens,
        recovery_steps=options.recovery_steps,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    if options.json:
        print_json(
            {
                "destination": str(report.destination),
                "method": report.method,
                "keep": report.keep,
                "parameters": report.parameters,
                "dense_parameters": report.dense_parameters,
                "calibration_tokens": report.calibration_tokens,
                "seconds": report.seconds,
                "ranks": report.ranks,
            }
        )
    else:
        print(report.summary())
        print(f"wrote {report.destination}")

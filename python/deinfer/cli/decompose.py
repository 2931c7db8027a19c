"""`deinfer decompose`: make a low-rank copy of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deinfer.cli.options import Commands, UsageError, add_model, print_json, require_model

_EPILOG = """\
The decoder's linear layers are replaced by factors of low rank where that costs least; the model
calibrates on text that it samples from itself unless --calibration names a file. Nothing is
trained unless --recover asks for it. The result is a directory like the source, for every other
command of deinfer, with a report in decomposition.json and, where matplotlib is installed,
decomposition.png.

The model is read block by block, so that memory holds little more than one block and its
statistics; but --recover and sampling hold all of it. What is done is kept in DESTINATION.partial
until the result is complete, and takes about three times the source's size there; --resume goes on
from it with at most one block done again.

examples:
  deinfer decompose llama llama-keep0.8
  deinfer decompose llama llama-keep0.9 --keep 0.9 --calibration corpus.jsonl
  deinfer decompose llama llama-10GiB --target-size 10
  deinfer decompose llama llama-good --target-ppl-increase 1.1
  deinfer decompose llama llama-keep0.7 --keep 0.7 --recover 30
  deinfer decompose llama llama-keep0.7 --keep 0.7 --recover 30 --resume
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
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--keep",
        type=float,
        metavar="RATIO",
        help="share of the decoder's linear parameters to keep (default: 0.8)",
    )
    target.add_argument(
        "--target-size",
        type=float,
        metavar="GIB",
        help="largest size of the checkpoint's safetensors files",
    )
    target.add_argument(
        "--target-ppl-increase",
        type=float,
        metavar="X",
        help="keep as little as leaves perplexity within X times the dense model's, on "
        "calibration text that is held out, before any recovery",
    )
    parser.add_argument(
        "--method",
        default="two_sided",
        help="two_sided (best), whitened, or svd (a baseline) (default: two_sided)",
    )
    parser.add_argument(
        "--ranks",
        help="allocated (by what they cost the loss) or uniform (default: allocated for "
        "two_sided, else uniform)",
    )
    parser.add_argument(
        "--rank-multiple", type=int, default=8, help="granularity of the ranks (default: 8)"
    )
    parser.add_argument(
        "--compensate",
        action=argparse.BooleanOptionalAction,
        help="fit the factors to the activations of the decomposed model, block after block "
        "(default: for two_sided, where less than 0.85 is kept)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='text to calibrate on: UTF-8, or JSON lines (.jsonl) with "text", "messages" or '
        '"prompt" (and "response")',
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=65536, help="tokens (default: 65536)"
    )
    parser.add_argument(
        "--recover",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="then train all weights of the blocks, factors and what stayed dense, on the dense "
        "model's outputs for so long, on text that it samples meanwhile or on --calibration; holds "
        "20 bytes of memory for each of them, and the dense model once more to sample (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampled text (default: 0)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with DESTINATION.partial if it is there"
    )
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
    if options.destination.exists() and not options.overwrite:
        raise UsageError(f"DESTINATION {str(options.destination)!r} exists; see --overwrite")
    try:
        from deinfer.decompose import decompose_model
        from deinfer.decompose.options import make_options
        from deinfer.decompose.report import JSON_FILE, PLOT_FILE
    except ImportError as error:
        raise RuntimeError(
            f"decompose needs {error.name}: pip install deinfer[decompose]"
        ) from error

    arguments = {
        "keep": options.keep,
        "target_size": options.target_size,
        "target_ppl_increase": options.target_ppl_increase,
        "method": options.method,
        "ranks": options.ranks,
        "rank_multiple": options.rank_multiple,
        "compensate": options.compensate,
        "calibration": options.calibration,
        "calibration_tokens": options.calibration_tokens,
        "recover_minutes": options.recover,
        "seed": options.seed,
    }
    try:
        make_options(**arguments, recover_steps=0)
    except ValueError as error:
        raise UsageError(str(error)) from error
    report = decompose_model(
        options.model,
        options.destination,
        **arguments,
        overwrite=options.overwrite,
        resume=options.resume,
        progress=sys.stderr.isatty(),
    )
    if options.json:
        print_json({"destination": str(report.destination), **report.json()})
    else:
        print(report.summary())
        print(f"wrote {report.destination}, with {JSON_FILE}")
    if not (report.destination / PLOT_FILE).is_file():
        print(
            f"note: no {PLOT_FILE}, for want of matplotlib: pip install deinfer[decompose]",
            file=sys.stderr,
        )

"""`deinfer convert`: import decomposed checkpoints of other projects, and export to them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deinfer.cli.options import Commands, UsageError, print_json

if TYPE_CHECKING:
    from deinfer.convert.registry import Format

_EPILOG = """\
Reads what SVD-LLM, ASVD, Dobi-SVD, Basis Sharing, Palu, AA-SVD, KFAC-SVD/LEMS and DeInfer write,
PEFT adapters that are all of a weight, GGUF, and ordinary directories; writes deinfer's own format
unless --to names another. Pickles are read without executing anything that they ask for. Without
--dtype, factors are copied as they are.

examples:
  deinfer convert --list                             what can be read and written
  deinfer convert llama_7b_whitening_only_0.8.pt low SVD-LLM's pickle
  deinfer convert Llama-2-7b-hf-asvd90 low           ASVD's directory
  deinfer convert aasvd-tree low --base Llama-2-7b   factors alone; the rest is the dense model's
  deinfer convert low dense --to dense               u v multiplied: runs anywhere
  deinfer convert low theirs --to deinfer            for DeInfer's vLLM plugin
"""
_DTYPES = ("float32", "bfloat16", "float16")


def add_parser(commands: Commands) -> None:
    """Add the subcommand.

    Args:
        commands: The main parser's subcommands.
    """
    parser = commands.add_parser(
        "convert",
        help="import or export a checkpoint of another project",
        description="Convert a decomposed checkpoint from one format to another.",
        epilog=_EPILOG,
    )
    parser.add_argument("source", metavar="SRC", type=Path, nargs="?", help="directory or file")
    parser.add_argument(
        "destination", metavar="DST", type=Path, nargs="?", help="directory to create"
    )
    parser.add_argument("--list", action="store_true", help="list the formats, and exit")
    parser.add_argument(
        "--format", metavar="NAME", help="format of SRC (default: found by its names and metadata)"
    )
    parser.add_argument(
        "--to", metavar="NAME", default="canonical", help="format of DST (default: canonical)"
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="dense model that SRC was made from, for what SRC lacks: weights, config or tokenizer",
    )
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        help=f"of the weights: {', '.join(_DTYPES)} (default: each as it is)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Convert and report.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: An argument is bad.
        ValueError: The checkpoint cannot be converted.
    """
    try:
        import torch

        from deinfer.convert.registry import FORMATS, convert_checkpoint
    except ImportError as error:
        raise RuntimeError(f"convert needs {error.name}: pip install deinfer[decompose]") from error

    if options.list:
        _list(FORMATS, as_json=options.json)
        return
    if options.source is None or options.destination is None:
        raise UsageError("give SRC and DST, or --list (see deinfer convert --help)")
    names = [entry.name for entry in FORMATS]
    for flag, name in (("--format", options.format), ("--to", options.to)):
        if name is not None and name not in names:
            raise UsageError(f"{flag} {name!r} is not one of {', '.join(names)}")
    if options.dtype is not None and options.dtype not in _DTYPES:
        raise UsageError(f"--dtype {options.dtype!r} is not one of {', '.join(_DTYPES)}")
    if not options.source.exists():
        raise UsageError(f"SRC {str(options.source)!r} does not exist")
    if options.destination.exists() and not options.overwrite:
        raise UsageError(f"DST {str(options.destination)!r} exists; see --overwrite")
    report = convert_checkpoint(
        options.source,
        options.destination,
        source_format=options.format,
        target_format=options.to,
        base=options.base,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        overwrite=options.overwrite,
    )
    if options.json:
        print_json(
            {
                "source_format": report.source_format,
                "target_format": report.target_format,
                "destination": str(report.destination),
                "architecture": report.model_type,
                "parameters": report.parameters,
                "decomposed_matrices": len(report.ranks),
                "dense_matrices": report.dense_matrices,
                "ranks": report.ranks,
                "notes": report.notes,
            }
        )
        return
    for note in report.notes:
        print(f"note: {note}")
    print(
        f"{report.model_type} of format {report.source_format}: {len(report.ranks)} decomposed and "
        f"{report.dense_matrices} dense matrices, written as {report.target_format} with "
        f"{report.parameters / 1e6:,.1f} M parameters"
    )
    print(f"wrote {report.destination}")


def _list(formats: tuple[Format, ...], *, as_json: bool) -> None:
    rows = [
        {"name": entry.name, "writes": entry.write is not None, "title": entry.title}
        for entry in formats
    ]
    if as_json:
        print_json(rows)
        return
    print(f"{'format':<14} {'--to':<5} what")
    for row in rows:
        print(f"{row['name']:<14} {'yes' if row['writes'] else '':<5} {row['title']}")

"""`deinfer info`: describe a checkpoint from its config and tensor headers alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deinfer.cli.options import Commands, print_json, require_model

_EPILOG = """\
Reads config.json and the headers of the safetensors files; no weight is loaded. Without weights
the sizes are what config.json implies.

examples:
  deinfer info MODEL
  deinfer info MODEL --json
  deinfer info gemma-2-9b/config.json
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand.

    Args:
        commands: The main parser's subcommands.
    """
    parser = commands.add_parser(
        "info",
        help="describe a checkpoint without loading it",
        description="Describe a checkpoint: architecture, ranks, sizes, whether deinfer runs it.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="directory with config.json, or that file"
    )
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Describe the checkpoint.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: MODEL is no checkpoint.
        ValueError: Its files are malformed.
    """
    if not options.model.is_file():
        require_model(options.model)
    from deinfer.checkpoint_info import describe_checkpoint

    report = describe_checkpoint(options.model)
    if options.json:
        print_json(report)
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    rows = [
        ("model", report["model"]),
        ("architecture", report["architecture"]),
        ("supported", "yes" if report["supported"] else "no"),
        *(("", problem) for problem in report["problems"]),
        *(("note", note) for note in report["notes"]),
    ]
    if report["features"]:
        kept = report["parameters"] / max(1, report["dense_parameters"])
        found = ", ".join(report["dtypes"]) if report["weights_found"] else "not here"
        rows += [
            ("parameters", f"{report['parameters']:,} ({kept:.1%} of the dense model)"),
            ("weights", f"{report['bytes'] / 1e6:,.1f} MB, {found}"),
            ("runs as", report["runs_as"] or "what the weights will be"),
            ("memory", _memory(report)),
            ("layers", f"{report['layers']}, hidden size {report['hidden_size']}"),
            ("vocabulary", f"{report['vocab_size']}"),
            ("context", f"{report['max_model_len']} tokens"),
            ("KV cache", f"{report['kv_bytes_per_token']} bytes per token"),
            *_latents(report),
            *(("has" if i == 0 else "", text) for i, text in enumerate(report["features"])),
        ]
    if low_rank := report["low_rank"]:
        shown = {key: value for key, value in low_rank.items() if not isinstance(value, dict)}
        rows.append(("decomposition", ", ".join(f"{k} {v}" for k, v in shown.items())))
    for name, value in rows:
        print(f"{name:14}{value}")
    _print_ranks(report["ranks"])


def _latents(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What kv_cache="latent" would take, if some k or v is decomposed."""
    dense, latent = report["kv_bytes_per_token"], report["latent_kv_bytes_per_token"]
    if latent == dense:
        return []
    tokens = f"{latent} with latents, for {dense / latent:.2f} times the tokens"
    return [
        ("", tokens),
        ("", f"break-even: ranks of k and v below {report['kv_width']} take less memory"),
        ("", "over N ranks: latents take as much on each, or token-sharded 1/N"),
    ]


def _memory(report: dict[str, Any]) -> str:
    context = report["kv_bytes_per_token"] * report["max_model_len"]
    weights = report["memory_bytes"]
    bits = " in 16 bits (12 where they are compressed)" if report["runs_as"] == "bfloat16" else ""
    kv = f"{context / 1e6:,.1f} MB of KV for a full context"
    return f"{weights / 1e6:,.1f} MB of weights{bits}, {kv}"


def _print_ranks(ranks: dict[str, int | None]) -> None:
    """Print a line per kind of matrix."""
    by_leaf: dict[str, list[int | None]] = {}
    for name, rank in ranks.items():
        # The name without its layer: what follows the last number.
        parts = name.split(".")
        last = max(i for i, part in enumerate(parts) if part.isdigit())
        by_leaf.setdefault(".".join(parts[last + 1 :]), []).append(rank)
    if not by_leaf:
        return
    print(f"\n{'matrix':22}{'decomposed':>12}{'rank min':>10}{'mean':>8}{'max':>8}")
    for leaf, all_ranks in by_leaf.items():
        some = [rank for rank in all_ranks if rank is not None]
        numbers = (
            f"{min(some):>10}{sum(some) / len(some):>8.0f}{max(some):>8}"
            if some
            else f"{'-':>10}{'-':>8}{'-':>8}"
        )
        print(f"{leaf:22}{f'{len(some)} of {len(all_ranks)}':>12}{numbers}")

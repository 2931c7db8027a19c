"""`deinfer plan`: predict the tensor-parallel plans of a model from its config.json alone."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deinfer.cli.options import Commands, UsageError, print_json, require_model

if TYPE_CHECKING:
    from deinfer._C import PlanEstimate, PlanReport

_EPILOG = """\
Reads config.json and no weights: a 70B model on 8 GPUs can be planned on a laptop. Times are
predictions of an alpha-beta cost model, not measurements. The choice is one layout of the weights
and, within it, a plan for each phase; phases count as --mix says.

examples:
  deinfer plan MODEL --tp 4 --link nvlink
  deinfer plan llama3-70b/config.json --tp 8 --keep 0.4 --json
  deinfer plan MODEL --tp 2 --link pcie --batch 1 8 32 --prefill 512 4096
  deinfer plan MODEL --tp 2 --link 1.5:20 --hardware cpu:40:800 --memory 32
"""
# The field of PlannerConfig for each option, as its errors name it.
_FIELDS = {
    "tensor_parallel_size": "tp",
    "link": "link",
    "hardware": "hardware",
    "dtype": "dtype",
    "keep": "keep",
    "memory_gib": "memory",
    "context": "context",
    "batches": "batch",
    "prefill": "prefill",
    "mix": "mix",
    "kv_cache": "kv_cache",
    "kv_latents": "kv_latents",
}
_WIDTH = 100


def add_parser(commands: Commands) -> None:
    """Add the subcommand.

    Args:
        commands: The main parser's subcommands.
    """
    parser = commands.add_parser(
        "plan",
        help="choose how ranks divide a model",
        description="Predict the tensor-parallel plans of a model and choose one.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="directory with config.json, or that file"
    )
    parser.add_argument("--tp", type=int, required=True, metavar="N", help="number of ranks")
    for flag, kind, metavar, text in (
        (
            "--link",
            str,
            "LINK",
            "between ranks: nvlink, pcie, ethernet or latency_us:GB_per_s (default: nvlink)",
        ),
        (
            "--hardware",
            str,
            "HARDWARE",
            "of a rank: h100 or cpu:GB_per_s:GFLOP_per_s (default: h100)",
        ),
        ("--dtype", str, "DTYPE", "of the weights: float32, bfloat16 or int8 (default: bfloat16)"),
        (
            "--keep",
            float,
            "RHO",
            "as if every linear kept this share of its parameters (default: ranks of config.json)",
        ),
        ("--memory", float, "GIB", "of a rank (default: what the hardware has)"),
        ("--context", int, "TOKENS", "per sequence when decoding (default: 1024)"),
        (
            "--kv-cache",
            str,
            "KIND",
            "dense, latent or auto, which is for decoding the largest batch (default: dense)",
        ),
        (
            "--kv-latents",
            str,
            "WAY",
            "over ranks: replicated, token_sharded or auto, as --kv-cache auto (default: auto)",
        ),
    ):
        parser.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="B",
        default=argparse.SUPPRESS,
        help="sequences that decode together (default: 1 4 16 64 256)",
    )
    parser.add_argument(
        "--prefill",
        type=int,
        nargs="+",
        metavar="M",
        default=argparse.SUPPRESS,
        help="tokens of a prompt chunk (default: 2048)",
    )
    parser.add_argument(
        "--mix",
        nargs="+",
        metavar="PHASE=WEIGHT",
        default=argparse.SUPPRESS,
        help="how much phases count, such as decode:16=2 prefill:2048=1 (default: equally batches "
        "1, 16 and 64, where listed, and every prefill)",
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="as with exchanges in up to 4 chunks that overlap with computation: of the rank "
        "dimension for up to 128 tokens, where sums of inner vectors travel, else of the tokens",
    )
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Predict and report.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: An argument is bad.
        ValueError: config.json is malformed.
    """
    if not options.model.is_file():
        require_model(options.model)
    from deinfer._C import PlannerConfig, plan_tensor_parallelism

    given: dict[str, Any] = {
        field: getattr(options, option)
        for field, option in _FIELDS.items()
        if hasattr(options, option)
    }
    if "keep" in given and given["keep"] == 0:  # which would mean the ranks of config.json
        raise UsageError("--keep 0.0 is not in (0, 1]")
    if "memory_gib" in given and not given["memory_gib"] > 0:
        raise UsageError(f"--memory {options.memory} is not a size in GiB")
    if "mix" in given:
        given["mix"] = _parse_mix(options.mix)
    config = PlannerConfig(
        model=str(options.model), max_chunks=4 if options.overlap else 1, **given
    )
    try:
        report = plan_tensor_parallelism(config)
    except ValueError as error:
        for field in _FIELDS:
            if str(error).startswith(field):
                option = _FIELDS[field].replace("_", "-")
                raise UsageError(f"--{option}: {error}") from error
        raise
    settings = {
        "model": str(options.model),
        "tensor_parallel_size": config.tensor_parallel_size,
        "link": config.link,
        "hardware": config.hardware,
        "dtype": config.dtype,
        "keep": config.keep or None,
        "context": config.context,
        "kv_cache": config.kv_cache,
        "kv_latents": config.kv_latents,
        "overlap": options.overlap,
    }
    if options.json:
        print_json({**settings, **_as_json(report)})
    else:
        _print(settings, report)


def _parse_mix(items: list[str]) -> dict[str, float]:
    mix = {}
    for item in items:
        phase, equals, weight = item.partition("=")
        try:
            mix[phase] = float(weight)
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"--mix {item!r} is not PHASE=WEIGHT, such as decode:16=2")
    return mix


def _as_json(report: PlanReport) -> dict[str, Any]:
    return {
        "link_latency_s": report.link_latency_s,
        "link_bytes_per_s": report.link_bytes_per_s,
        "memory_bytes_per_s": report.memory_bytes_per_s,
        "flops_per_s": report.flops_per_s,
        "memory_bytes": report.memory_bytes or None,
        "plans": [
            {
                "plan": plan.plan,
                "layout": plan.layout,
                "collectives_per_layer": {
                    "all_reduce": plan.all_reduces,
                    "all_gather": plan.all_gathers,
                    "reduce_scatter": plan.reduce_scatters,
                },
                "wire_bytes_per_token": plan.wire_bytes_per_token,
                "weight_bytes": plan.weight_bytes,
                "kv_bytes_per_token": plan.kv_bytes_per_token,
                "dense_kv_bytes_per_token": plan.dense_kv_bytes_per_token,
                "latent_kv_bytes_per_token": plan.latent_kv_bytes_per_token,
                "token_sharded_kv_bytes_per_token": plan.token_sharded_kv_bytes_per_token,
                "kv_token_sharded": plan.kv_token_sharded,
                "kv_reason": plan.kv_reason,
                "k_break_even_rank": plan.k_break_even,
                "v_break_even_rank": plan.v_break_even,
                "kv_tokens": None if plan.kv_tokens < 0 else plan.kv_tokens,
                "fits": plan.fits,
                "phases": {
                    phase.phase: {
                        "seconds": phase.seconds,
                        "product_seconds": phase.product_seconds,
                        "operation_seconds": phase.operation_seconds,
                        "attention_seconds": phase.attention_seconds,
                        "exchange_seconds": phase.exchange_seconds,
                        "chunks": phase.chunks,
                    }
                    for phase in plan.phases
                },
            }
            for plan in report.plans
        ],
        "choice": {
            "layout": report.layout,
            "decode_plan": report.decode_plan,
            "prefill_plan": report.prefill_plan,
            "phases": {
                choice.phase: {
                    "plan": choice.plan,
                    "weight": choice.weight,
                    "seconds": choice.seconds,
                }
                for choice in report.choices
            },
        }
        if report.layout
        else None,
        "reason": report.reason,
    }


def _collectives(plan: PlanEstimate) -> str:
    """Such as "2 AG + 2 AR"; averages where layers differ."""
    counts = ((plan.all_gathers, "AG"), (plan.all_reduces, "AR"), (plan.reduce_scatters, "RS"))
    return " + ".join(f"{round(n, 1):g} {name}" for n, name in counts if n > 0) or "none"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.0995 else f"{seconds * 1e3:.0f}"


def _print(settings: dict[str, Any], report: PlanReport) -> None:
    memory = f", {report.memory_bytes / 2**30:.1f} GiB" if report.memory_bytes else ""
    keep = f"keep {settings['keep']:g}" if settings["keep"] else "ranks of config.json"
    rows = (
        ("model", f"{settings['model']}, {keep}, {settings['dtype']}"),
        (
            "ranks",
            f"{settings['tensor_parallel_size']} of {settings['hardware']} "
            f"({report.memory_bytes_per_s / 1e9:,.0f} GB/s, "
            f"{report.flops_per_s / 1e12:,.3g} TFLOP/s{memory})",
        ),
        (
            "link",
            f"{settings['link']} ({report.link_latency_s * 1e6:g} us, "
            f"{report.link_bytes_per_s / 1e9:g} GB/s)",
        ),
        ("times", f"predicted ms per step, decoding at context {settings['context']}"),
    )
    for name, value in rows:
        print(f"{name:8}{value}")

    chosen = {(choice.phase, choice.plan) for choice in report.choices}
    phases = [phase.phase for phase in report.plans[0].phases]
    columns = [("b" if name.startswith("decode") else "p") + name.split(":")[1] for name in phases]
    width = max(13, *(len(_collectives(plan)) for plan in report.plans))
    head = f"\n{'plan':16}{'per layer':>{width}}{'KB/token':>10}{'GiB/rank':>10}{'fits':>6}"
    print(head + "".join(f"{column:>10}" for column in columns))
    for plan in report.plans:
        line = (
            f"{plan.plan:16}{_collectives(plan):>{width}}{plan.wire_bytes_per_token / 1e3:>10,.1f}"
            f"{plan.weight_bytes / 2**30:>10.2f}{'yes' if plan.fits else 'no':>6}"
        )
        for phase in plan.phases:
            mark = "*" if (phase.phase, plan.plan) in chosen else " "
            cut = f"/{phase.chunks}" if phase.chunks > 1 else ""
            line += f"{_milliseconds(phase.seconds) + cut + mark:>10}"
        print(line.rstrip())
    print(
        "\nAR all-reduce, AG all-gather, RS reduce-scatter; KB/token: sent by a rank for a decoded"
        "\ntoken; GiB/rank: weights; bN: decoding N sequences; pN: prefill of N tokens; * chosen"
        + ("; /N: in N chunks" if settings["overlap"] else "")
    )
    print("\n" + textwrap.fill(f"choice: {report.reason}", width=_WIDTH))
    print("\n" + textwrap.fill(_kv_text(settings, report), width=_WIDTH))


def _kv_text(settings: dict[str, Any], report: PlanReport) -> str:
    """What the KV cache takes under the chosen plan for decoding, or the first."""
    chosen = [plan for plan in report.plans if plan.plan == report.decode_plan]
    plan = (chosen or report.plans)[0]
    several = settings["tensor_parallel_size"] > 1
    divided = f", {plan.token_sharded_kv_bytes_per_token} where the ranks divide the tokens"
    room = f"; there is room for {plan.kv_tokens} tokens" if plan.kv_tokens >= 0 else ""
    return (
        f"KV cache under {plan.plan}: {plan.dense_kv_bytes_per_token} bytes per token and rank "
        f"dense, {plan.latent_kv_bytes_per_token} with latents{divided if several else ''}; "
        f"decoding takes no longer from latents up to rank {plan.k_break_even} of k and "
        f"{plan.v_break_even} of v. Choice: {plan.kv_reason}{room}."
    )

"""What the subcommands share: the parser, groups of options, and loading."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from deinfer.llm import LLM
    from deinfer.sampling_params import SamplingParams

# argparse calls a parser's list of subcommands by a private name.
Commands = Any


class UsageError(Exception):
    """A bad argument; the command ends with status 2."""


class Parser(argparse.ArgumentParser):
    """Keeps the layout of descriptions and examples, and reports errors in one line.

    Args:
        **arguments: As of `argparse.ArgumentParser`.
    """

    def __init__(self, **arguments: Any) -> None:
        """Create the parser; see the class."""
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments
        )

    def error(self, message: str) -> NoReturn:
        """Report a bad command line.

        Args:
            message: What is wrong.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{message} (see {self.prog} --help)")


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the errors of bad values into `UsageError`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def quiet_transformers() -> None:
    """Keep transformers local and its chatter out of a command's output.

    It reads these variables when it is imported, which happens later.
    """
    # Checkpoints are local directories; a typo must not become a request to a model hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the MODEL argument."""
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="directory with config.json and *.safetensors"
    )


def integers(text: str) -> list[int]:
    """Read integers with commas between them."""
    return [int(part) for part in text.split(",")]


# Fields of EngineConfig that are options: name, type, help; --its-name is the flag.
_ENGINE: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("device", str, "where to run: cpu, cuda, cuda:N or auto (default: cpu)"),
    (
        "dtype",
        str,
        "auto, float32 (not on CUDA), bfloat16 or int8 weights (default: auto, what the checkpoint "
        "has; on CUDA bfloat16)",
    ),
    (
        "weight_compression",
        str,
        "of bfloat16 weights in memory, with the same results: lossless (12 bits each), none or "
        "auto (default: auto, lossless with AVX-512-BF16, with AVX2 for at most 2 sequences)",
    ),
    ("tensor_parallel_size", int, "rank threads (default: 1)"),
    (
        "tensor_parallel_plan",
        str,
        "how ranks divide the model, a plan of `deinfer plan` (default: auto, predicted)",
    ),
    ("num_threads", int, "CPU threads of a rank (default: all cores)"),
    ("max_model_len", int, "longest sequence in tokens (default: the model's limit)"),
    ("max_num_seqs", int, "most sequences in one batch (default: 256, chat 1)"),
    ("max_num_batched_tokens", int, "most tokens in one step (default: 512)"),
    ("kv_cache_bytes", int, "memory of the KV cache (default: a quarter of what is free)"),
    (
        "kv_cache",
        str,
        "what it keeps: dense (K and V), latent (the inner vectors of decomposed k and v) or auto, "
        "by predicted throughput (default: dense)",
    ),
    (
        "kv_latents",
        str,
        "over ranks: replicated (all on each), token_sharded (each has those of its tokens) or "
        "auto, by predicted throughput (default: auto)",
    ),
    (
        "scheduling_policy",
        str,
        "order of the requests: fcfs, hrrn, length_bucket, longest_tail, sjf, static or "
        "static_bucket (default: fcfs)",
    ),
    (
        "admission",
        str,
        "KV memory that a request must find to start: peak (what all are expected to need), "
        "prompt or max_tokens (default: peak)",
    ),
    ("safety", float, "0 to 1: expected lengths from mean to 90%% quantile (default: 0)"),
    ("kv_watermark", float, "share of the KV blocks that admission leaves free (default: 0.03)"),
    (
        "max_pause",
        int,
        "steps without a KV block before another request loses its own (default: 8)",
    ),
    ("preempt_limit", int, "times that a request may lose its KV; 0: no limit (default: 2)"),
    ("promote_after", float, "seconds of waiting after which a request goes first"),
    ("promote_per_token", float, "the same, for each token that is expected of it"),
    ("bucket_width", int, "expected tokens of a length_bucket or static_bucket (default: 50)"),
    ("static_group", int, "requests that static_bucket sorts together (default: 256)"),
    (
        "static_batch_size",
        int,
        "requests in a static batch without a size of its own (default: 16)",
    ),
    (
        "bucket_batch_sizes",
        integers,
        "requests in a batch of the shortest static_buckets (default: 256,128,64,32)",
    ),
    (
        "recompute",
        str,
        "what outlived its static_bucket: continue or restart from the prompt (default: continue)",
    ),
    ("event_log", str, "file to write all that the scheduler is told to, for a replay"),
    (
        "length_predictor",
        str,
        "history, prompt, hidden_state, instructed or an artifact's JSON file (default: none)",
    ),
)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the engine; only those given are passed on."""
    group = parser.add_argument_group("engine")
    for name, kind, text in _ENGINE:
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text)


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Add the options of sampling.

    Args:
        parser: Where to add them.
        max_tokens: Default of --max-tokens.
    """
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        help=f"longest answer in tokens (default: {max_tokens})",
    )
    for flag, kind, text in (
        ("--temperature", float, "0 always takes the most likely token (default: 0)"),
        ("--top-p", float, "sample from the likeliest tokens with this probability (default: 1)"),
        ("--top-k", int, "sample from so many likeliest tokens (default: all)"),
        ("--min-p", float, "drop tokens below this share of the likeliest (default: 0)"),
        ("--repetition-penalty", float, "above 1 discourages repetition (default: 1)"),
        ("--seed", int, "of the sampling"),
    ):
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text)
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="end the answer before this text (can be given several times)",
    )


_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
)


def sampling_params(options: argparse.Namespace, **more: Any) -> SamplingParams:
    """Build the parameters from the options of `add_sampling_options`.

    Args:
        options: Parsed command line.
        **more: Further fields.

    Returns:
        The parameters; greedy unless --temperature says otherwise.

    Raises:
        UsageError: A value is out of range.
    """
    from deinfer.sampling_params import SamplingParams

    given = {name: getattr(options, name) for name in _SAMPLING if hasattr(options, name)}
    with usage_errors():
        return SamplingParams(**{"temperature": 0.0, **given, **more})


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was given of the options of `add_engine_options`, as arguments of `LLM`."""
    return {name: getattr(options, name) for name, _, _ in _ENGINE if hasattr(options, name)}


def load_model(options: argparse.Namespace, path: Path | None = None) -> LLM:
    """Load a model with the options of `add_engine_options`.

    Args:
        options: Parsed command line.
        path: Directory of the model; None: MODEL.

    Returns:
        The model.

    Raises:
        UsageError: The model is not a directory, or an option is out of range.
    """
    from deinfer.llm import LLM

    path = options.model if path is None else path
    require_model(path)
    given = engine_arguments(options)
    try:
        return LLM(path, **given)
    except (TypeError, ValueError) as error:
        # The engine says which field it means; a checkpoint's fault is none of the command line.
        if any(str(error).startswith(name) for name in given):
            raise UsageError(str(error)) from error
        raise


def require_model(path: Path) -> None:
    """Check that a path looks like a checkpoint.

    Args:
        path: MODEL of the command line.

    Raises:
        UsageError: It is not a directory with a config.json.
    """
    if not path.is_dir():
        raise UsageError(f"MODEL {str(path)!r} is not a directory")
    if not (path / "config.json").is_file():
        raise UsageError(f"MODEL {str(path)!r} has no config.json")


def read_text(path: Path) -> str:
    """Read a UTF-8 file that the command line names.

    Args:
        path: The file.

    Returns:
        Its text.

    Raises:
        UsageError: It cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{str(path)!r} is not UTF-8 text: {error.reason}") from error


def print_json(value: object) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))

"""Entry point of the `deinfer` command: parse, dispatch, report errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deinfer import __version__
from deinfer.cli import chat, convert, decompose, evaluate, generate, info, perception, plan
from deinfer.cli.options import Parser, UsageError, quiet_transformers

_EPILOG = """\
examples:
  deinfer info MODEL                             what is in a checkpoint, without loading it
  deinfer decompose MODEL MODEL-keep0.8          make a low-rank copy with 80 % of the parameters
  deinfer generate MODEL --prompt "The sky is"   complete a text
  deinfer chat MODEL                             talk to it
  deinfer convert SVD-LLM.pt MODEL               import a checkpoint of another project
  deinfer eval MODEL --text FILE                 perplexity of a text
  deinfer plan MODEL --tp 4                      how ranks best divide a model
  deinfer perception collect MODEL ...           learn how long its answers become

Each command explains itself: deinfer COMMAND --help. Set DEINFER_DEBUG=1 for tracebacks.
"""
_COMMANDS = (info, decompose, convert, generate, chat, evaluate, plan, perception)
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _PrintCMakeDir(argparse.Action):
    """Prints the directory of deinferConfig.cmake, which wheels bring."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        directory = Path(__file__).resolve().parents[1] / "lib" / "cmake" / "deinfer"
        if not (directory / "deinferConfig.cmake").is_file():
            raise UsageError(
                f"{directory} does not exist: this is no installed wheel; in a source tree, "
                "cmake --install build/cpu --prefix DIR installs what a C++ host needs"
            )
        print(directory)
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Create the parser with all subcommands.

    Returns:
        The parser; a parsed subcommand leaves its function in `run`.
    """
    parser = Parser(
        prog="deinfer",
        description="Generate text with low-rank decomposed language models.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"deinfer {__version__}")
    parser.add_argument(
        "--cmake-dir",
        action=_PrintCMakeDir,
        help="print what -Ddeinfer_DIR of a C++ host's CMake has to be, and exit",
    )
    commands = parser.add_subparsers(
        metavar="COMMAND", required=True, dest="command", parser_class=Parser
    )
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        Exit status: 0, 1 for a failure, 2 for a bad argument, 130 when interrupted.
    """
    quiet_transformers()
    debug = os.environ.get("DEINFER_DEBUG", "") not in ("", "0")
    try:
        options = build_parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("deinfer: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has left, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"deinfer: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0

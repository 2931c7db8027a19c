"""`deinfer chat`: an interactive conversation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from deinfer.cli.options import (
    Commands,
    add_engine_options,
    add_model,
    add_sampling_options,
    load_model,
    require_model,
    sampling_params,
)

if TYPE_CHECKING:
    from deinfer.llm import LLM
    from deinfer.sampling_params import SamplingParams

_EPILOG = """\
The model sees the whole conversation. /clear begins a new one, /exit or Ctrl-D leaves, Ctrl-C
interrupts an answer. Lines may also come from a pipe; then only the answers are printed.

examples:
  deinfer chat MODEL
  deinfer chat MODEL --system "Answer in one sentence." --temperature 0.7
  printf 'My name is Ada.\\nWhat is my name?\\n' | deinfer chat MODEL
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand.

    Args:
        commands: The main parser's subcommands.
    """
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model in the terminal.",
        epilog=_EPILOG,
    )
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_options(parser, max_tokens=512)
    add_engine_options(parser)
    parser.set_defaults(run=run, max_num_seqs=1)  # answers one at a time


def run(options: argparse.Namespace) -> None:
    """Talk until the input ends.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: An argument is bad.
    """
    require_model(options.model)
    params = sampling_params(options)
    llm = load_model(options)
    llm.get_tokenizer()  # so that the first answer does not wait for it
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and history
        print("/clear begins a new conversation, /exit leaves, Ctrl-C interrupts an answer.")
    messages = list(system)
    while (line := _read(interactive)) is not None:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/clear":
            messages = list(system)
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer = _answer(llm, messages, params)
        except ValueError as error:
            messages.pop()  # the conversation goes on without what could not be asked
            print(f"deinfer: error: {error}", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": answer})


def _read(interactive: bool) -> str | None:
    """The next line; None at the end."""
    while True:
        try:
            return input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("  (Ctrl-D or /exit leaves)")


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Print an answer as it comes; interrupted, it ends where it is."""
    parts: list[str] = []
    try:
        for output in llm.stream(messages, params, delta=True):
            parts.append(output.outputs[0].text)
            sys.stdout.write(parts[-1])
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" [interrupted]")
    print(flush=True)
    return "".join(parts)

"""`deinfer generate`: complete prompts or answer questions."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deinfer.cli.options import (
    Commands,
    UsageError,
    add_engine_options,
    add_model,
    add_sampling_options,
    load_model,
    print_json,
    read_text,
    require_model,
    sampling_params,
)

if TYPE_CHECKING:
    from deinfer.llm import LLM
    from deinfer.outputs import RequestOutput
    from deinfer.sampling_params import SamplingParams

_EPILOG = """\
Several prompts run as one batch. One prompt is printed as it is generated.

examples:
  deinfer generate MODEL --prompt "The capital of France is"
  deinfer generate MODEL --chat --prompt "Why is the sky blue?" --max-tokens 200
  deinfer generate MODEL --prompts questions.txt --chat --json
  echo "Once upon a time" | deinfer generate MODEL --temperature 0.8 --seed 1 --n 3
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand.

    Args:
        commands: The main parser's subcommands.
    """
    parser = commands.add_parser(
        "generate",
        help="complete prompts or answer questions",
        description="Generate text for one or more prompts.",
        epilog=_EPILOG,
    )
    add_model(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="can be given several times; without any, standard input is the prompt",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="UTF-8 file with a prompt on each line"
    )
    parser.add_argument(
        "--chat", action="store_true", help="prompts are questions: use the chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message for --chat")
    parser.add_argument("--n", type=int, default=1, help="samples of each prompt (default: 1)")
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on after an end-of-sequence token"
    )
    parser.add_argument("--json", action="store_true", help="report as JSON")
    add_sampling_options(parser, max_tokens=128)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Generate and print.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: An argument is bad.
    """
    require_model(options.model)
    if options.system is not None and not options.chat:
        raise UsageError("--system needs --chat")
    params = sampling_params(options, n=options.n, ignore_eos=options.ignore_eos)
    prompts = _prompts(options)
    llm = load_model(options)
    if len(prompts) == 1 and options.n == 1 and not options.json:
        _stream(llm, options, prompts[0], params)
        return
    start = time.perf_counter()
    if options.chat:
        outputs = llm.chat([_conversation(options, text) for text in prompts], params)
    else:
        outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    if options.json:
        _report(options, prompts, outputs, seconds)
        return
    for prompt, output in zip(prompts, outputs, strict=True):
        for sample in output.outputs:
            number = f" [{sample.index}]" if options.n > 1 else ""
            print(f"--- {' '.join(prompt.split())}{number}\n{sample.text.strip()}\n")


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(options.prompt)
    if options.prompts is not None:
        prompts += [line for line in read_text(options.prompts).splitlines() if line.strip()]
    if not prompts and not sys.stdin.isatty():
        # A trailing line feed is the shell's, not the user's.
        prompts = [text] if (text := sys.stdin.read().rstrip("\n")) else []
    if not prompts:
        raise UsageError("no prompt: give --prompt, --prompts or standard input")
    return prompts


def _conversation(options: argparse.Namespace, text: str) -> list[dict[str, str]]:
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": text}]


def _stream(llm: LLM, options: argparse.Namespace, prompt: str, params: SamplingParams) -> None:
    start = _conversation(options, prompt) if options.chat else prompt
    for output in llm.stream(start, params, delta=True):
        sys.stdout.write(output.outputs[0].text)
        sys.stdout.flush()
    print()


def _report(
    options: argparse.Namespace, prompts: list[str], outputs: list[RequestOutput], seconds: float
) -> None:
    tokens = sum(len(s.token_ids) for output in outputs for s in output.outputs)
    print_json(
        {
            "model": str(options.model),
            "seconds": seconds,
            "generated_tokens": tokens,
            "requests": [
                {
                    "prompt": prompt,
                    "prompt_tokens": len(output.prompt_token_ids),
                    "outputs": [
                        {
                            key: value
                            for key, value in dataclasses.asdict(sample).items()
                            if key not in ("logprobs", "cumulative_logprob")
                        }
                        for sample in output.outputs
                    ],
                }
                for prompt, output in zip(prompts, outputs, strict=True)
            ],
        }
    )

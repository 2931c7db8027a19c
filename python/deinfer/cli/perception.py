"""`deinfer perception`: collect answer lengths, train predictors, judge them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from deinfer.cli.options import (
    Commands,
    Parser,
    UsageError,
    add_engine_options,
    add_model,
    engine_arguments,
    require_model,
    usage_errors,
)

_EPILOG = """\
examples:
  deinfer perception collect MODEL --prompts prompts.jsonl --data answers
  deinfer perception train MODEL --data answers
  deinfer perception evaluate --data answers --plots plots --json results.json

Then the scheduler may use it: LLM(MODEL, length_predictor="hidden_state").
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand.

    Args:
        commands: The main parser's subcommands.
    """
    parser = commands.add_parser(
        "perception",
        help="learn how long a model's answers become",
        description="Learn to predict how long a model's answers become.",
        epilog=_EPILOG,
    )
    actions = parser.add_subparsers(
        metavar="ACTION", required=True, dest="action", parser_class=Parser
    )
    _add_collect(actions)
    _add_train(actions)
    _add_evaluate(actions)
    _add_merge(actions)


def _add_collect(actions: Any) -> None:
    parser = actions.add_parser(
        "collect",
        help="answer prompts; store lengths and hidden states",
        description="Answer prompts and store lengths and hidden states. An interrupted collection "
        "goes on when the command is repeated.",
    )
    add_model(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='*.jsonl with {"prompt": ..., "id": ..., "source": ...} or text, a prompt a line',
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="directory of the collection"
    )
    parser.add_argument("--limit", type=int, help="first so many prompts (default: all)")
    parser.add_argument("--samples", type=int, default=3, help="answers of each (default: 3)")
    parser.add_argument("--temperature", type=float, default=0.7, help="(default: 0.7)")
    parser.add_argument("--cap", type=int, default=512, help="most tokens (default: 512)")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        help="hidden states to store (default: at 1/3, 1/2, 2/3 and 5/6 of the depth)",
    )
    parser.add_argument(
        "--every", type=int, default=16, help="tokens between two states (default: 16)"
    )
    parser.add_argument(
        "--shard", type=int, default=192, help="prompts that run together (default: 192)"
    )
    parser.add_argument(
        "--plain", action="store_true", help="do not put prompts into the chat template"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add_engine_options(parser)
    parser.set_defaults(run=run_collect)


def _add_train(actions: Any) -> None:
    parser = actions.add_parser(
        "train",
        help="train the predictors `prompt` and `hidden_state`",
        description="Train the predictors `prompt` and `hidden_state` on a collection.",
    )
    add_model(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a collection")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="for the artifacts (default: MODEL/perception)"
    )
    parser.add_argument(
        "--layer", type=int, help="hidden state to read (default: chosen by cross-validation)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parser.set_defaults(run=run_train)


def _add_evaluate(actions: Any) -> None:
    parser = actions.add_parser(
        "evaluate",
        help="judge the predictors by cross-validation",
        description="Cross-validate the predictors on a collection, against a constant and TF-IDF "
        "+ ridge; on sources that they have not seen; and while answers are generated.",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a collection")
    parser.add_argument("--folds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of splits and training (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw PNGs into this directory")
    parser.set_defaults(run=run_evaluate)


def _add_merge(actions: Any) -> None:
    parser = actions.add_parser(
        "merge",
        help="merge a LoRA adapter for the `instructed` predictor",
        description="Merge a LoRA adapter in PEFT's format into a copy of a model.",
    )
    add_model(parser)
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter_config.json's place")
    parser.add_argument("output", metavar="OUT", type=Path, help="directory to create")
    parser.set_defaults(run=run_merge)


def run_collect(options: argparse.Namespace) -> None:
    """Collect.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: An argument is bad.
    """
    from deinfer.perception.collect import CollectOptions, collect
    from deinfer.perception.dataset import read_prompts

    require_model(options.model)
    records = _read(read_prompts, options.prompts)[: options.limit]
    with usage_errors():
        count = collect(
            options.model,
            records,
            options.data,
            CollectOptions(
                samples=options.samples,
                temperature=options.temperature,
                cap=options.cap,
                layers=options.layers,
                every=options.every,
                chat=False if options.plain else None,
                shard=options.shard,
                seed=options.seed,
            ),
            **engine_arguments(options),
        )
    print(f"answered {count} prompts, {len(records) - count} were there; see {options.data}")


def run_train(options: argparse.Namespace) -> None:
    """Train.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: An argument is bad.
    """
    from deinfer.perception import artifact_directory
    from deinfer.perception.dataset import read_collection
    from deinfer.perception.prompt import PromptModel
    from deinfer.perception.train import TrainOptions, train_head

    require_model(options.model)
    collection = _read(read_collection, options.data)
    output = options.output or artifact_directory(options.model)
    with usage_errors():
        head = train_head(collection, options=TrainOptions(layer=options.layer, seed=options.seed))
    prompt = PromptModel.fit(collection.prompts, collection.lengths, collection.config.cap)
    paths = [head.save(output), prompt.save(output)]
    seconds = head.report["train_seconds"]
    print(f"{len(collection.ids)} prompts, layer {head.layer}, {seconds:.1f} s")
    for path in paths:
        print(path)


def run_evaluate(options: argparse.Namespace) -> None:
    """Evaluate.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: An argument is bad.
    """
    import json

    from deinfer.perception.dataset import read_collection
    from deinfer.perception.evaluate import evaluate, format_table
    from deinfer.perception.train import TrainOptions

    if options.folds < 2:
        raise UsageError(f"--folds must be at least 2, got {options.folds}")
    collection = _read(read_collection, options.data)
    with usage_errors():
        evaluation = evaluate(
            collection,
            folds=options.folds,
            options=TrainOptions(seed=options.seed),
            progress=lambda text: print(text, file=sys.stderr),
        )
    print(format_table(evaluation))
    if options.json is not None:
        text = json.dumps(evaluation.to_json(), indent=2) + "\n"
        options.json.write_text(text, encoding="utf-8")
    if options.plots is not None:
        from deinfer.perception.plots import plot

        for path in plot(evaluation, options.plots):
            print(path)


def run_merge(options: argparse.Namespace) -> None:
    """Merge an adapter.

    Args:
        options: Parsed command line.

    Raises:
        UsageError: An argument is bad.
    """
    from deinfer.perception.lora import merge_adapter

    require_model(options.model)
    with usage_errors():
        try:
            count = merge_adapter(options.model, options.adapter, options.output)
        except FileExistsError as error:
            raise UsageError(str(error)) from error
    print(f"merged {count} modules into {options.output}")


def _read(function: Any, path: Path) -> Any:
    """Call a reader of a file that the command line names."""
    try:
        return function(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error

"""Collect how long a model's answers become, and its hidden states on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from deinfer.llm import LLM
from deinfer.outputs import RequestOutput
from deinfer.perception.dataset import CollectionConfig, CollectionWriter, PromptRecord
from deinfer.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """How to collect.

    Attributes:
        samples: Answers of each prompt.
        temperature: Of the sampling. Greedy answers of small models often loop to the cap.
        cap: Most tokens of an answer.
        layers: Whose hidden states to keep; None: at 1/3, 1/2, 2/3 and 5/6 of the depth.
        every: Generated tokens between two states.
        chat: Put prompts into the chat template; None: if the model has one.
        shard: Prompts that run together and are stored together.
        seed: Of the sampling.
    """

    samples: int = 3
    temperature: float = 0.7
    cap: int = 512
    layers: Sequence[int] | None = None
    every: int = 16
    chat: bool | None = None
    shard: int = 192
    seed: int = 0


def default_layers(num_layers: int) -> list[int]:
    """Choose the layers that are worth a try.

    Args:
        num_layers: Of the model.

    Returns:
        Layers at 1/3, 1/2, 2/3 and 5/6 of its depth: at its ends they know less of the length.
    """
    return sorted({max(1, round(num_layers * share)) for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6)})


def collect(
    model: Path,
    records: Sequence[PromptRecord],
    output: Path,
    options: CollectOptions,
    **engine_args: Any,
) -> int:
    """Answer prompts and store lengths and hidden states.

    Args:
        model: Directory of the model.
        records: The prompts. Those that `output` has already are left out.
        output: Directory for the collection.
        options: How to collect.
        **engine_args: Of `LLM`.

    Returns:
        How many prompts were answered now.

    Raises:
        ValueError: An option is bad, or `output` was collected in another way.
    """
    for name in ("samples", "cap", "every", "shard"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    num_layers = _num_layers(model)
    layers = list(options.layers) if options.layers is not None else default_layers(num_layers)
    if not layers:
        raise ValueError("layers is empty")
    llm = LLM(model, hidden_state_layers=layers, **engine_args)
    chat = options.chat
    if chat is None:
        chat = bool(llm.get_tokenizer().chat_template)
    config = CollectionConfig(
        model=model.resolve().name,
        hidden_size=llm.model_info.hidden_size,
        num_layers=num_layers,
        layers=layers,
        every=options.every,
        samples=options.samples,
        temperature=options.temperature,
        cap=options.cap,
        chat=chat,
        seed=options.seed,
    )
    writer = CollectionWriter(output, config)
    done = writer.done()
    missing = [record for record in records if record.id not in done]
    positions = {record.id: i for i, record in enumerate(records)}
    for first in tqdm(range(0, len(missing), options.shard), desc="Shards", disable=None):
        shard = missing[first : first + options.shard]
        params = [
            SamplingParams(
                n=options.samples,
                temperature=options.temperature,
                max_tokens=options.cap,
                hidden_states=options.every,
                detokenize=False,
                # The same whether or not the run was interrupted.
                seed=options.seed * 1_000_003 + positions[record.id],
            )
            for record in shard
        ]
        if chat:
            questions = [[{"role": "user", "content": record.prompt}] for record in shard]
            outputs = llm.chat(questions, params)
        else:
            outputs = llm.generate([record.prompt for record in shard], params)
        _store(writer, shard, outputs)
    return len(missing)


def _num_layers(model: Path) -> int:
    # The engine reports it, too, but wants to know the layers before.
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return int(config["num_hidden_layers"])


def _store(
    writer: CollectionWriter, shard: Sequence[PromptRecord], outputs: Sequence[RequestOutput]
) -> None:
    entries, prompt_states, rows, states = [], [], [], []
    layers = len(writer.config.layers)
    for i, (record, output) in enumerate(zip(shard, outputs, strict=True)):
        entries.append(
            {
                "id": record.id,
                "source": record.source,
                "prompt": record.prompt,
                "prompt_tokens": len(output.prompt_token_ids),
                "lengths": [len(sample.token_ids) for sample in output.outputs],
                "finish_reasons": [sample.finish_reason for sample in output.outputs],
            }
        )
        for sample in output.outputs:
            along = sample.hidden_states
            if along is None:
                raise RuntimeError("the engine returned no hidden states")
            if sample.index == 0:
                prompt_states.append(along.states[0])
            for j, position in enumerate(along.positions[1:], 1):
                rows.append((i, sample.index, position))
                states.append(np.stack([along.states[j], along.means[j]]))
    largest = np.finfo(np.float16).max
    refined = np.array(states, np.float32).reshape(len(states), 2, layers, -1)
    writer.write(
        entries,
        np.stack(prompt_states),
        np.array(rows, np.int64).reshape(-1, 3),
        np.clip(refined, -largest, largest).astype(np.float16),
    )

"""Collected answers: their lengths and the hidden states along them, in a directory of shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

_CONFIG = "collection.json"


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt to be answered.

    Attributes:
        id: Unique in its file.
        prompt: The user's text.
        source: Where it is from; heads are tested on sources that they have not seen.
    """

    id: str
    prompt: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class CollectionConfig:
    """How answers were collected.

    Attributes:
        model: Name of the model's directory.
        hidden_size: Of the model.
        num_layers: Of the model.
        layers: Whose hidden states are stored, numbered as transformers does.
        every: Generated tokens between two stored states of a sample.
        samples: Of each prompt.
        temperature: Of the sampling.
        cap: Tokens after which an answer was cut off; such a length is censored.
        chat: Whether prompts were put into the chat template.
        seed: Of the sampling.
    """

    model: str
    hidden_size: int
    num_layers: int
    layers: list[int]
    every: int
    samples: int
    temperature: float
    cap: int
    chat: bool
    seed: int


@dataclass(frozen=True, slots=True)
class Collection:
    """Answers and states, read back.

    Attributes:
        config: How they were collected.
        ids: Of the prompts [n].
        sources: [n].
        prompts: Texts [n].
        lengths: Generated tokens, end-of-sequence token included, int [n, samples].
        censored: Cut off at the cap, bool [n, samples].
        prompt_states: Of the prompts' last tokens, float32 [n, layers, hidden].
        refined_rows: Index (prompt, sample, generated tokens) of each state along the answers, int
            [m, 3].
        refined_states: float16 [m, 2, layers, hidden]: the state there, and the mean so far.
    """

    config: CollectionConfig
    ids: list[str]
    sources: list[str]
    prompts: list[str]
    lengths: NDArray[np.int64]
    censored: NDArray[np.bool_]
    prompt_states: NDArray[np.float32]
    refined_rows: NDArray[np.int64]
    refined_states: NDArray[np.float16]


def read_prompts(path: Path) -> list[PromptRecord]:
    """Read prompts from a file.

    Args:
        path: `*.jsonl` with an object {"prompt": ..., "id": ..., "source": ...} in each line, of
            which only the first key is needed, or a text file with a prompt in each line.

    Returns:
        The prompts in order.

    Raises:
        OSError: It cannot be read.
        ValueError: A line is malformed, an id occurs twice, or there is no prompt.
    """
    records: list[PromptRecord] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry: Any = {"prompt": line}
        if path.suffix == ".jsonl":
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is no JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f'{path}: line {number} has no "prompt"')
        records.append(
            PromptRecord(
                str(entry.get("id", number)), entry["prompt"], str(entry.get("source", ""))
            )
        )
    if not records:
        raise ValueError(f"{path} holds no prompt")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"{path}: the id {record.id!r} occurs twice")
        seen.add(record.id)
    return records


class CollectionWriter:
    """Writes a collection shard by shard, and goes on where an earlier run has stopped.

    Args:
        path: Directory, made if it is missing.
        config: How answers are collected.

    Raises:
        ValueError: The directory holds a collection that was made in another way.
    """

    def __init__(self, path: Path, config: CollectionConfig) -> None:
        """Open the directory; see the class."""
        self.path = path
        self.config = config
        path.mkdir(parents=True, exist_ok=True)
        if (path / _CONFIG).is_file():
            found = read_config(path)
            for name, value in asdict(config).items():
                if getattr(found, name) != value:
                    raise ValueError(
                        f"{path} was collected with {name} = {getattr(found, name)!r}, "
                        f"not {value!r}"
                    )
        else:
            (path / _CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n")

    def done(self) -> set[str]:
        """Return the ids that are there already."""
        return {entry["id"] for _, entries in _shards(self.path) for entry in entries}

    def write(
        self,
        entries: Sequence[dict[str, Any]],
        prompt_states: NDArray[np.float32],
        refined_rows: NDArray[np.int64],
        refined_states: NDArray[np.float16],
    ) -> None:
        """Add a shard; it is there as a whole or not at all.

        Args:
            entries: For each prompt {"id", "source", "prompt", "lengths", "finish_reasons"}.
            prompt_states: As in `Collection`, of these prompts.
            refined_rows: As in `Collection`; prompts are counted within the shard.
            refined_states: As in `Collection`.
        """
        number = len(list(_shards(self.path)))
        stem = self.path / f"shard-{number:05d}"
        save_file(
            {
                "prompt_states": np.ascontiguousarray(prompt_states, np.float32),
                "refined_rows": np.ascontiguousarray(refined_rows, np.int64),
                "refined_states": np.ascontiguousarray(refined_states, np.float16),
            },
            stem.with_suffix(".safetensors"),
        )
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        temporary = stem.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, stem.with_suffix(".jsonl"))


def _shards(path: Path) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    for shard in sorted(path.glob("shard-*.jsonl")):
        lines = shard.read_text(encoding="utf-8").splitlines()
        yield shard, [json.loads(line) for line in lines]


def read_config(path: Path) -> CollectionConfig:
    """Read how a collection was made.

    Args:
        path: Its directory.

    Returns:
        The configuration.

    Raises:
        ValueError: There is none.
    """
    try:
        return CollectionConfig(**json.loads((path / _CONFIG).read_text(encoding="utf-8")))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no collection: {error}") from None


def read_collection(path: Path) -> Collection:
    """Read what `deinfer perception collect` has written.

    Args:
        path: Its directory.

    Returns:
        All shards in one.

    Raises:
        ValueError: There is no collection, or it is empty.
    """
    config = read_config(path)
    entries: list[dict[str, Any]] = []
    parts: dict[str, list[NDArray[Any]]] = {}
    for shard, found in _shards(path):
        tensors = load_file(shard.with_suffix(".safetensors"))
        tensors["refined_rows"][:, 0] += len(entries)
        entries += found
        for name, tensor in tensors.items():
            parts.setdefault(name, []).append(tensor)
    if not entries:
        raise ValueError(f"{path} holds no answers yet")
    return Collection(
        config=config,
        ids=[entry["id"] for entry in entries],
        sources=[entry["source"] for entry in entries],
        prompts=[entry["prompt"] for entry in entries],
        lengths=np.array([entry["lengths"] for entry in entries], np.int64),
        censored=np.array(
            [[reason != "stop" for reason in entry["finish_reasons"]] for entry in entries]
        ),
        prompt_states=np.concatenate(parts["prompt_states"]),
        refined_rows=np.concatenate(parts["refined_rows"]),
        refined_states=np.concatenate(parts["refined_states"]),
    )

"""Pickled `{'model', 'tokenizer'}` of whole modules: their config, tensors and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deinfer.architectures import ARCHITECTURES
from deinfer.convert.checkpoint import CheckpointBuilder, dense_config
from deinfer.convert.pickles import Record, module_tensors
from deinfer.convert.source import Source
from deinfer.convert.tensors import LazyTensor, lazy_tensors, read_object
from deinfer.tokenizer import has_tokenizer

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def pickled_names(source: Source) -> set[str]:
    """Name the tensors of a pickled model; empty if the source is none.

    Args:
        source: Of the model.

    Returns:
        Names as of its state_dict.
    """
    model = source.pickled.get("model")
    return set(module_tensors(model)) if isinstance(model, Record) else set()


def open_module(
    source: Source, origin: dict[str, Any]
) -> tuple[CheckpointBuilder, dict[str, LazyTensor]]:
    """Open a pickled model.

    Args:
        source: Of the model; its base, if named, gives config and tokenizer.
        origin: As of `LowRankCheckpoint`.

    Returns:
        A builder for its config, and its tensors.

    Raises:
        ValueError: It holds no config of a supported family.
    """
    model = source.pickled["model"]
    if source.base is not None:
        config = dense_config(read_object(source.base / "config.json"))
    else:
        config = _module_config(model)
    tensors = lazy_tensors(module_tensors(model), str(source.path))
    return CheckpointBuilder(config, origin, _side_files(source)), tensors


def _module_config(model: Record) -> dict[str, Any]:
    """The dense config.json of the config object that a model holds."""
    record = model.get("config")
    if not isinstance(record, Record) or not isinstance(record.state, dict):
        raise ValueError("the pickled model holds no config; name the dense model with --base")
    stem = record.class_name.rpartition(".")[2].removesuffix("Config")
    kinds = [kind for kind, architecture in ARCHITECTURES.items() if architecture.name == stem]
    fields = {
        name: plain
        for name, value in record.state.items()
        if not name.startswith("_") and (plain := _plain(value)) is not None
    }
    return dense_config(fields, kinds[0] if kinds else stem)


def _plain(value: Any) -> Any:
    """A value as JSON has it, or None where JSON has nothing like it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | bool | int | float) else None


def _side_files(source: Source) -> Callable[[Path], None]:
    """Tokenizer files of the directory or the base, else of the pickled tokenizer."""
    copy = source.side_files()
    tokenizer = source.pickled.get("tokenizer")

    def save(directory: Path) -> None:
        copy(directory)
        if not has_tokenizer(directory) and isinstance(tokenizer, Record):
            _save_tokenizer(tokenizer, directory)

    return save


def _save_tokenizer(tokenizer: Record, directory: Path) -> None:
    """Write the vocabulary that a pickled tokenizer carries, in the tokenizer library's own format.

    Fast tokenizers hold tokenizer.json, those of sentencepiece tokenizer.model, as bytes.
    """
    fast, slow = tokenizer.get("_tokenizer"), tokenizer.get("sp_model_proto")
    name = tokenizer.class_name.rpartition(".")[2]
    if isinstance(fast, Record) and isinstance(fast.state, bytes):
        (directory / "tokenizer.json").write_bytes(fast.state)
        name = "PreTrainedTokenizerFast"
    elif isinstance(slow, bytes):
        (directory / "tokenizer.model").write_bytes(slow)
    else:
        return
    config: dict[str, Any] = {"tokenizer_class": name}
    tokens = tokenizer.get("_special_tokens_map") or {}
    for role in _SPECIAL_TOKENS:
        token = tokens.get(role) or tokenizer.get(f"_{role}")
        if isinstance(token, Record):
            token = token.get("content")
        if isinstance(token, str):
            config[role] = token
    if isinstance(tokenizer.get("chat_template"), str):
        config["chat_template"] = tokenizer.get("chat_template")
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

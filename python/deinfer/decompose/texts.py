"""Calibration text from files: plain text, or JSON lines of documents and conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SEQUENCE_TOKENS = 512


def read_sequences(path: Path, model: Path, tokens: int, seed: int) -> list[list[int]]:
    """Cut calibration sequences from a file.

    A name that ends in `.jsonl` has an object a line: `{"text": ...}`, `{"messages": [{"role": ...,
    "content": ...}, ...]}`, or `{"prompt": ...}` with or without a `"response"`; the latter two go
    through the model's chat template. Everything else is plain UTF-8 text.

    Args:
        path: The file.
        model: Checkpoint directory whose tokenizer is used.
        tokens: Tokens wanted.
        seed: Of the choice among documents.

    Returns:
        Sequences of at most `SEQUENCE_TOKENS` tokens: evenly over a plain text, documents in random
        order otherwise. Each starts with what the tokenizer puts first, as a rule a
        beginning-of-sequence token.

    Raises:
        ValueError: The file is missing or not UTF-8, a line is malformed, or there are fewer tokens
            than wanted.
    """
    from transformers import AutoTokenizer

    if tokens < 2:
        raise ValueError(f"calibration_tokens {tokens} is too small")
    if not Path(path).is_file():
        raise ValueError(f"calibration file {str(path)!r} is not a file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"calibration file {str(path)!r} is not UTF-8 text: {error.reason}"
        ) from error
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    start: list[int] = list(tokenizer("")["input_ids"])
    size = SEQUENCE_TOKENS - len(start)
    if path.suffix == ".jsonl":
        documents = [_document(tokenizer, path, n, line) for n, line in _lines(text)]
        pieces = [d[i : i + size] for d in documents for i in range(0, len(d), size)]
        random.Random(seed).shuffle(pieces)
    else:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = _spread(ids, tokens, size)
    available = sum(map(len, pieces)) + len(pieces) * len(start)
    if available < tokens:
        raise ValueError(
            f"calibration file {str(path)!r} has {available} tokens, "
            f"calibration_tokens asks for {tokens}"
        )
    sequences: list[list[int]] = []
    rest = tokens
    for piece in pieces:
        if len(cut := piece[: max(rest - len(start), 0)]) >= 2:
            sequences.append(start + cut)
            rest -= len(sequences[-1])
    return sequences


def _spread(ids: list[int], tokens: int, size: int) -> list[list[int]]:
    """Cut pieces for about `tokens` tokens evenly from a long text; all of a short one."""
    count = -(-tokens // size)
    gap = max(0, len(ids) - count * size) // count
    pieces = (ids[i * (size + gap) :][:size] for i in range(count))
    return [piece for piece in pieces if piece]


def _lines(text: str) -> list[tuple[int, str]]:
    return [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def _document(tokenizer: Any, path: Path, number: int, line: str) -> list[int]:
    """Tokenize what stands in one line of JSON."""
    where = f"calibration file {str(path)!r}, line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: not a JSON object")
    if isinstance(entry.get("text"), str):
        ids: list[int] = tokenizer(entry["text"], add_special_tokens=False)["input_ids"]
        return ids
    messages = entry.get("messages")
    if isinstance(prompt := entry.get("prompt"), str):
        messages = [{"role": "user", "content": prompt}]
        if isinstance(response := entry.get("response"), str):
            messages.append({"role": "assistant", "content": response})
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f'{where}: no "text", "messages" or "prompt" that could be read')
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where}: the model has no chat template for messages")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise ValueError(f"{where}: the chat template refuses it: {error}") from error
    templated: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = list(tokenizer("")["input_ids"])
    return templated[len(start) :] if start and templated[: len(start)] == start else templated


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )

"""The `instructed` predictor: the model is asked for the length of its answer (arXiv 2305.13144).

Two ways: a query besides the prompt, for which the paper trains a LoRA adapter
(`deinfer.perception.lora` merges one), and perception in advance, where the answer itself begins
with its length. Small models that were not trained for it cannot do either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deinfer.perception import Ask, Belief

if TYPE_CHECKING:
    from deinfer.llm import LLM

_NUMBER = re.compile(r"\d[\d,]*")
QUERY_TOKENS = 16
_QUERY = (
    "{prompt}\n\nDo not answer the text above. Predict how many tokens your answer to it would "
    "have, and reply with that number only."
)
_ADVANCE = (
    "{prompt}\n\nBefore you answer, estimate how many tokens your answer will have, write that "
    "number alone on the first line, and then answer."
)


def query(prompt: str) -> str:
    """Return the question for the length of the answer to a prompt."""
    return _QUERY.format(prompt=prompt)


def in_advance(prompt: str) -> str:
    """Return the prompt with the instruction to state the length first."""
    return _ADVANCE.format(prompt=prompt)


def parse_length(reply: str) -> float | None:
    """Read the first number of a reply; None if there is none or it is 0."""
    found = _NUMBER.search(reply)
    if found is None:
        return None
    length = float(found.group().replace(",", ""))
    return length if length > 0 else None


def split_advance(reply: str) -> tuple[float | None, str]:
    """Split an answer that begins with its length.

    Args:
        reply: To a prompt of `in_advance`.

    Returns:
        The length, None if the first line holds none, and the answer after it.
    """
    first, _, rest = reply.lstrip().partition("\n")
    length = parse_length(first)
    return (None, reply) if length is None else (length, rest.lstrip())


class InstructedPredictor:
    """Queries the model before each request, or another one that was trained to answer.

    Args:
        path: instructed.json with {"predictor": "instructed", "model": DIR}, the model to ask
            (relative to the file), such as one with a merged adapter. Without the file the model
            itself is asked.

    Raises:
        ValueError: The file is malformed.
    """

    engine_head = ""

    def __init__(self, path: Path) -> None:
        """Read the file; see the class."""
        self._model: Path | None = None
        self._llm: LLM | None = None
        if not path.is_file():
            return
        entry = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise ValueError(f'{path} has no "model"')
        self._model = path.parent / entry["model"]

    def predict(self, texts: Sequence[str], ask: Ask) -> list[Belief | None]:
        """Ask for all lengths in one batch."""
        questions = [query(text) for text in texts]
        replies = ask(questions, QUERY_TOKENS) if self._model is None else self._ask(questions)
        lengths = [parse_length(reply) for reply in replies]
        return [None if length is None else ([length], [1.0]) for length in lengths]

    def _ask(self, questions: Sequence[str]) -> list[str]:
        from deinfer.llm import LLM

        if self._llm is None:
            assert self._model is not None
            self._llm = LLM(self._model, use_tqdm_on_load=False)
        return self._llm.ask(questions, QUERY_TOKENS)


def judge(ask: Ask, prompts: Sequence[str], actual: Sequence[float]) -> dict[str, dict[str, float]]:
    """Compare what a model says of its answers with how long they are.

    Args:
        ask: The model.
        prompts: Texts [n].
        actual: Tokens [n].

    Returns:
        For `query` and `in_advance`: the share of replies with a number, and mae (tokens) and tau,
        with the median of `actual` in place of missing numbers; for `constant`, that median alone.
    """
    import numpy as np

    from deinfer.perception.metrics import kendall_tau

    lengths = np.asarray(actual, np.float64)
    median = float(np.median(lengths))
    result = {"constant": {"mae": float(np.abs(lengths - median).mean()), "tau": 0.0}}
    said = {
        "query": [parse_length(r) for r in ask([query(p) for p in prompts], QUERY_TOKENS)],
        "in_advance": [
            split_advance(reply)[0] for reply in ask([in_advance(p) for p in prompts], QUERY_TOKENS)
        ],
    }
    for style, numbers in said.items():
        filled = np.array([median if number is None else number for number in numbers])
        result[style] = {
            "with_number": sum(number is not None for number in numbers) / len(numbers),
            "mae": float(np.abs(np.minimum(filled, lengths.max()) - lengths).mean()),
            "tau": kendall_tau(filled, lengths),
        }
    return result

"""The `hidden_state` predictor: the engine evaluates it (csrc/engine/length_head.cc)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deinfer.perception import Ask, Belief


class HiddenStatePredictor:
    """Says nothing before prefill: the states are not there yet.

    Args:
        path: JSON file of the head; the engine reads and checks it.
    """

    def __init__(self, path: Path) -> None:
        """Remember the file; see the class."""
        self.engine_head = str(path)

    def predict(self, texts: Sequence[str], ask: Ask) -> list[Belief | None]:
        """Leave it to the engine."""
        return [None] * len(texts)

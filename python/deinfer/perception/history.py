"""The `history` predictor: the scheduler's own statistics of answers that have ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deinfer.perception import Ask, Belief


class HistoryPredictor:
    """Says nothing itself: without a belief the scheduler goes by history.

    Args:
        path: Not used; history needs no artifact.
    """

    engine_head = ""

    def __init__(self, path: Path) -> None:
        """Do nothing; see the class."""

    def predict(self, texts: Sequence[str], ask: Ask) -> list[Belief | None]:
        """Leave it to the scheduler."""
        return [None] * len(texts)

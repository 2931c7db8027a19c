"""Length perception: how long will an answer become?

A predictor gives a distribution over lengths, which the scheduler may use. One file per predictor,
and a line in `PREDICTORS`:

- `history`: what the scheduler has seen so far; needs nothing.
- `prompt`: the prompt's text, before prefill (TF-IDF, counts, ridge).
- `hidden_state`: a head on the model's own hidden states, evaluated by the engine after prefill and
  again every few generated tokens.
- `instructed`: the model is asked, or states the length first (arXiv 2305.13144).

`deinfer perception collect | train | evaluate` makes and judges them for a model.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

Belief = tuple[list[float], list[float]]  # lengths in tokens, and their probabilities
# Greedy answers to questions, of at most so many tokens.
Ask = Callable[[Sequence[str], int], list[str]]

PREDICTORS = {
    "history": "deinfer.perception.history:HistoryPredictor",
    "prompt": "deinfer.perception.prompt:PromptPredictor",
    "hidden_state": "deinfer.perception.hidden_state:HiddenStatePredictor",
    "instructed": "deinfer.perception.instructed:InstructedPredictor",
}


class LengthPredictor(Protocol):
    """What predicts.

    Attributes:
        engine_head: JSON file of the head that the engine is to evaluate; "": none.
    """

    engine_head: str

    def __init__(self, path: Path) -> None:
        """Load the artifact at `path`, which may be missing where none is needed."""

    def predict(self, texts: Sequence[str], ask: Ask) -> list[Belief | None]:
        """Give beliefs before prefill.

        Args:
            texts: Prompts.
            ask: The model itself.

        Returns:
            For each text a belief, or None where there is nothing to say.
        """


def artifact_directory(model: Path) -> Path:
    """Return where a model's artifacts are: beside its weights."""
    return model / "perception"


def load_predictors(names: str | Sequence[str], model: Path) -> list[LengthPredictor]:
    """Load predictors.

    Args:
        names: A predictor of `PREDICTORS`, whose artifact is MODEL/perception/NAME.json; the path
            of such a file; or several of them: the first that has a belief before prefill gives it.
        model: Directory of the model.

    Returns:
        The predictors.

    Raises:
        TypeError: `names` is neither a string nor a sequence of strings.
        ValueError: A name is unknown, an artifact is missing or malformed, or several heads are
            meant for the engine.
    """
    if isinstance(names, str):
        names = [names] if names else []
    loaded: list[LengthPredictor] = []
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"length_predictor = {name!r} is a {type(name).__name__}, not a string")
        path = Path(name)
        if path.suffix == ".json":
            kind = _kind(path)
        elif name in PREDICTORS:
            kind, path = name, artifact_directory(model) / f"{name}.json"
        else:
            raise ValueError(
                f"length_predictor = {name!r} is unknown; use one of {', '.join(PREDICTORS)} "
                "or the path of an artifact's JSON file"
            )
        module, _, attribute = PREDICTORS[kind].partition(":")
        factory = getattr(importlib.import_module(module), attribute)
        loaded.append(cast(LengthPredictor, factory(path)))
    if sum(bool(predictor.engine_head) for predictor in loaded) > 1:
        raise ValueError(f"length_predictor = {list(names)!r} names several heads for the engine")
    return loaded


def _kind(path: Path) -> str:
    """The predictor that an artifact belongs to."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"length_predictor = {str(path)!r} cannot be read: {error}") from None
    kind = entry.get("predictor") if isinstance(entry, dict) else None
    if kind not in PREDICTORS:
        raise ValueError(f"length_predictor = {str(path)!r} is no artifact of a predictor")
    return str(kind)

"""What an LLM's predictors believe of its requests before prefill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deinfer.perception import Belief, load_predictors

if TYPE_CHECKING:
    from deinfer.llm import LLM
    from deinfer.request import Prompt


class Beliefs:
    """The predictors of one LLM.

    Args:
        names: As `load_predictors` takes them.
        model: Directory of the model.

    Raises:
        TypeError, ValueError: As `load_predictors`.
    """

    def __init__(self, names: str | Sequence[str], model: Path) -> None:
        """Load the predictors; see the class."""
        predictors = load_predictors(names, model)
        self.engine_head = next((p.engine_head for p in predictors if p.engine_head), "")
        self._predictors = [p for p in predictors if not p.engine_head]

    def of(self, llm: LLM, prompts: Sequence[Prompt]) -> list[Belief | None]:
        """Give a belief for each prompt that some predictor has one for.

        Args:
            llm: The LLM; predictors may ask it.
            prompts: With text or token ids.

        Returns:
            Beliefs in the order of the prompts.
        """
        beliefs: list[Belief | None] = [None] * len(prompts)
        if not self._predictors or not prompts:
            return beliefs
        texts = [_text(llm, prompt) for prompt in prompts]
        for predictor in self._predictors:
            missing = [i for i, belief in enumerate(beliefs) if belief is None and texts[i]]
            found = predictor.predict([texts[i] for i in missing], llm.ask)
            for i, belief in zip(missing, found, strict=True):
                beliefs[i] = belief
        return beliefs


def _text(llm: LLM, prompt: Prompt) -> str:
    """The user's words: without the chat template, where they are known."""
    if prompt.question is not None:
        return prompt.question
    if prompt.text is not None:
        return prompt.text
    return str(llm.get_tokenizer().decode(prompt.token_ids, skip_special_tokens=True))

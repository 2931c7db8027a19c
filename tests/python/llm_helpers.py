"""What the tests of `LLM` share."""

from __future__ import annotations

from typing import Any

from deinfer import RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The sky", "The capital of France is", "One, two", "drink water and"]


class Interrupting:
    """The engine, with a KeyboardInterrupt in place of one step."""

    def __init__(self, engine: Any, steps: int) -> None:
        self._engine, self._left = engine, steps

    def step(self) -> Any:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return self._engine.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]

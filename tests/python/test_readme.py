"""The README's Python examples do what they say, with a tiny model in place of a real one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from deinfer import LLM, SamplingParams

README = Path(__file__).resolve().parents[2] / "README.md"
DEMO_MODEL = '"build/smollm2-135m-instruct-keep0.8"'


def python_example(part: str) -> str:
    """The one example that holds `part`."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [text for text in examples if part in text]
    assert len(example.splitlines()) < 15
    return str(example)


def test_a_chat(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = python_example(DEMO_MODEL)
    exec(example.replace(DEMO_MODEL, repr(str(tiny_model))), {})
    (answer,) = LLM(str(tiny_model)).chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        SamplingParams(temperature=0, max_tokens=64),
    )
    assert capsys.readouterr().out == answer.outputs[0].text + "\n"


def test_scheduling(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = python_example('scheduling_policy="hrrn"')
    names = {
        "LLM": LLM,
        "SamplingParams": SamplingParams,
        "prompts": ["The sky is", "One, two,"],
        "guesses": [4, 9],
    }
    exec(example.replace('"model"', repr(str(tiny_model))), names)
    preemptions, tau = capsys.readouterr().out.split()
    assert preemptions == "0"
    assert -1.0 <= float(tau) <= 1.0


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("deinfer.torch_ops", reason="built without torch ops", exc_type=ImportError)
    names: dict[str, Any] = {}
    exec(python_example("deinfer.accelerate"), names)
    assert names["y"].shape == (4, 32)
    # And these are the model's and the layer's own factors.
    first, second = names["model"]
    with torch.no_grad():
        z = torch.randn(2, 64)
        expected = z @ first.weight.T @ second.weight.T + second.bias
        torch.testing.assert_close(names["model"](z), expected)

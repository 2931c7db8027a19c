"""deinfer: fast generation with low-rank decomposed language models.

The names below load on first use, so that `import deinfer` costs nothing and pulls in neither
torch nor transformers:

    >>> from deinfer import LLM, SamplingParams
    >>> llm = LLM("path/to/model")
    >>> llm.generate("The sky is", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deinfer.comparison import Comparison, compare
    from deinfer.evaluate import Perplexity, Speed, measure_speed, perplexity
    from deinfer.llm import LLM
    from deinfer.nn import accelerate
    from deinfer.outputs import CompletionOutput, HiddenStates, Logprob, RequestOutput
    from deinfer.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "Comparison",
    "CompletionOutput",
    "HiddenStates",
    "Logprob",
    "Perplexity",
    "RequestOutput",
    "SamplingParams",
    "Speed",
    "accelerate",
    "compare",
    "measure_speed",
    "perplexity",
]

_HOMES = {
    "LLM": "deinfer.llm",
    "CompletionOutput": "deinfer.outputs",
    "HiddenStates": "deinfer.outputs",
    "Logprob": "deinfer.outputs",
    "RequestOutput": "deinfer.outputs",
    "SamplingParams": "deinfer.sampling_params",
    "Comparison": "deinfer.comparison",
    "compare": "deinfer.comparison",
    "Perplexity": "deinfer.evaluate",
    "Speed": "deinfer.evaluate",
    "measure_speed": "deinfer.evaluate",
    "perplexity": "deinfer.evaluate",
    "accelerate": "deinfer.nn",
}
# Modules that import torch.
_MODULES = ("nn", "torch_ops")

__version__ = (Path(__file__).parent / "version.txt").read_text(encoding="utf-8").strip()


def __getattr__(name: str) -> object:
    """Import the home of a public name when it is first used."""
    if name in _MODULES:
        return importlib.import_module(f"deinfer.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'deinfer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too, for completion in a shell."""
    return sorted({*globals(), *__all__, *_MODULES})

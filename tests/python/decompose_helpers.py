"""What the tests of the decomposer share: a tiny random Llama and a quick decomposition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from deinfer.decompose import decompose_model  # noqa: E402

VOCABULARY = 96


def tiny_llama(path: Path, **changes: Any) -> Path:
    """Save a random Llama with 2 layers and grouped-query attention."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.to(torch.bfloat16).save_pretrained(path)
    (path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (path / "pytorch_model.bin").write_bytes(b"not to be copied")
    return path


def random_sampler(prompts: list[str]) -> list[list[int]]:
    """Random tokens, the same for the same number of prompts."""
    g = torch.Generator().manual_seed(len(prompts))
    return torch.randint(VOCABULARY, (len(prompts), 24), generator=g).tolist()


def decompose(source: Path, destination: Path, **changes: Any) -> Any:
    """Decompose quietly with the random sampler."""
    fields = {"sampler": random_sampler, "calibration_tokens": 200, "rank_multiple": 4}
    return decompose_model(source, destination, progress=False, **{**fields, **changes})

"""A tiny random Llama with a tokenizer, and a watchdog that ends a hanging test run."""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WATCHDOG_SECONDS = 600
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog. The capital of France is Paris, and the sky is "
    "blue because the air scatters blue light. One, two, three, four, five: héllo wörld, 你好世界! "
    "Stay healthy: drink water, sleep well, and walk every day. 😀 🎉\n"
)
_EOS = 2
_watchdog_stderr: int | None = None


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real stderr: while tests run, pytest has put its own file in its place."""
    global _watchdog_stderr
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.suspend_global_capture()
    _watchdog_stderr = os.dup(2)
    capture.resume_global_capture()


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """End the whole run with tracebacks when one test hangs, also inside native code."""
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, file=_watchdog_stderr, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def write_tokenizer(path: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> int:
    """Write a byte-level BPE tokenizer; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "model_max_length": 512,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return int(tokenizer.get_vocab_size())


def write_model(
    path: Path,
    vocab_size: int,
    *,
    ranks: dict[str, int] | None = None,
    max_position_embeddings: int = 256,
    seed: int = 0,
) -> None:
    """Write a random fp32 Llama; modules in `ranks` are stored as factors."""
    from safetensors.numpy import save_file

    numbers = np.random.default_rng(seed)
    hidden, inner, layers, heads, kv_heads, head_dim = 64, 96, 2, 4, 2, 16
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

    def normal(*shape: int) -> np.ndarray:
        return (numbers.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": numbers.standard_normal((vocab_size, hidden)).astype("f4"),
        "model.norm.weight": np.full(hidden, 1.5, np.float32),
        "lm_head.weight": 2 * normal(vocab_size, hidden),
    }
    for layer in range(layers):
        for leaf, (n, k) in shapes.items():
            name = f"model.layers.{layer}.{leaf}"
            if rank := (ranks or {}).get(name):
                tensors[f"{name}.u.weight"] = normal(n, rank)
                tensors[f"{name}.v.weight"] = normal(rank, k)
            else:
                tensors[f"{name}.weight"] = normal(n, k)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(hidden, np.float32)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": _EOS,
    }
    if ranks:
        config["model_type"] = "lowrank_llama"
        config["architectures"] = ["LowRankLlamaForCausalLM"]
        config["low_rank"] = {
            "version": 1,
            "base_model_type": "llama",
            "method": "two_sided",
            "keep_ratio": 0.8,
            "rank_multiple": 16,
            "calibration": {"source": "self-sampled", "tokens": 0, "seed": 0},
            "ranks": ranks,
        }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, so that no worker is left alone with one at the end."""
    long = ("test_tensor_parallel", "test_smollm2", "test_cli", "test_torch_contract")
    place = {f"{name}.py": i for i, name in enumerate(long)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model directory with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model(path, write_tokenizer(path))
    return path


@pytest.fixture(scope="session")
def lowrank_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory in which some matrices are factors of odd ranks."""
    path = tmp_path_factory.mktemp("models") / "lowrank"
    ranks = {
        "model.layers.0.self_attn.q_proj": 7,
        "model.layers.0.mlp.down_proj": 13,
        "model.layers.1.mlp.gate_proj": 20,
    }
    write_model(path, write_tokenizer(path), ranks=ranks)
    return path


@pytest.fixture(scope="session")
def llm(tiny_model: Path) -> Any:
    """The dense tiny model, loaded once; its requests must all be gone after a test."""
    from deinfer import LLM

    return LLM(tiny_model, num_threads=1, kv_cache_bytes=16 << 20)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        shared = request.getfixturevalue("llm")
        assert not shared._requests
        assert not shared._engine.has_unfinished_requests()


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Tiny matrices are fastest on one thread, above all on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies modelling files to and imports them from, for one test."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied tiny Llama in bfloat16, for the decomposer."""
    from decompose_helpers import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "dense")

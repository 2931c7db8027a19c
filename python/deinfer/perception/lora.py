"""Merge a LoRA adapter in PEFT's format into a copy of a checkpoint.

The adapter changes keys and values, so its prompts share no KV with the base model's: it is another
model, and the copy makes that plain.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What changes the formula in ways that are not implemented; PEFT writes these fields.
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "modules_to_save", "layer_replication", "use_qalora")


def merge_adapter(model: Path, adapter: Path, destination: Path, *, overwrite: bool = False) -> int:
    """Write W + scale B A for every adapted weight W.

    A decomposed weight U V stays decomposed, exactly: U becomes [U, scale B] and V [V; A], so that
    its rank grows by the adapter's.

    Args:
        model: Checkpoint, dense or decomposed.
        adapter: Directory with adapter_config.json and adapter_model.safetensors.
        destination: Directory to create.
        overwrite: Replace an existing directory.

    Returns:
        How many modules were adapted.

    Raises:
        ValueError: The adapter is malformed, uses something that is not supported, or does not fit
            the model.
        FileExistsError: The destination exists and `overwrite` is false.
    """
    import torch

    from deinfer.decompose.checkpoint import read_tensors, write_like

    file = adapter / _FILE
    pairs = read_adapter(adapter)
    config = _read_json(model / "config.json")
    tensors = read_tensors(model)
    for module, (a, b, scale) in pairs.items():
        dense, v, u = (f"{module}.{name}" for name in ("weight", "v.weight", "u.weight"))
        if dense in tensors:
            weight = tensors[dense]
            _check(module, a, b, tuple(weight.shape))
            merged = weight.double() + scale * b.double() @ a.double()
            tensors[dense] = merged.to(weight.dtype)
        elif v in tensors:
            dtype = tensors[v].dtype
            _check(module, a, b, (len(tensors[u]), tensors[v].shape[1]))
            tensors[v] = torch.cat([tensors[v], a.to(dtype)]).contiguous()
            added = (scale * b.double()).to(dtype)
            tensors[u] = torch.cat([tensors[u], added], dim=1).contiguous()
            config["low_rank"]["ranks"][module] = len(tensors[v])
        else:
            raise ValueError(f"{file}: {module} is no linear layer of {model}")
    write_like(model, destination, config, tensors, overwrite=overwrite)
    return len(pairs)


def read_adapter(adapter: Path) -> dict[str, tuple[Any, Any, float]]:
    """Read a LoRA adapter of PEFT.

    Args:
        adapter: Its directory.

    Returns:
        A [r, k], B [n, r] and the scale of their product, by the name of the linear.

    Raises:
        ValueError: The adapter is malformed, or uses something that is not supported.
    """
    from safetensors.torch import load_file

    settings = _read_json(adapter / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{adapter}: peft_type is {settings.get('peft_type')!r}, not 'LORA'")
    for name in _UNSUPPORTED:
        if settings.get(name):
            raise ValueError(f"{adapter}: {name} = {settings[name]!r} is not supported")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{adapter}: bias = {settings['bias']!r} is not supported")
    file = adapter / _FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    pairs = _pairs(load_file(file), file)
    return {module: (a, b, _scale(settings, module, len(a))) for module, (a, b) in pairs.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{path} is no JSON object")
    return entry


def _pairs(tensors: dict[str, Any], file: Path) -> dict[str, tuple[Any, Any]]:
    """(A, B) by the name of the module."""
    pairs: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if not name.startswith(_PREFIX) or kind not in ("lora_A", "lora_B"):
            raise ValueError(f"{file}: tensor {name!r} is not supported")
        pairs.setdefault(module.removeprefix(_PREFIX), {})[kind] = tensor
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise ValueError(f"{file}: {module} has {next(iter(pair))} alone")
    if not pairs:
        raise ValueError(f"{file} holds no adapter")
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in pairs.items()}


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """Give alpha / r, or alpha / sqrt(r) with rsLoRA; patterns name single modules by their end."""
    alpha = float(settings.get("lora_alpha", rank))
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = float(value)
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _check(module: str, a: Any, b: Any, shape: tuple[int, ...]) -> None:
    if a.shape[1] != shape[1] or b.shape[0] != shape[0] or len(a) != b.shape[1]:
        raise ValueError(
            f"{module}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a weight {shape}"
        )

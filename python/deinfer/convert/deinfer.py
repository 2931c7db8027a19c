"""DeInfer (arXiv 2604.17709): `X.v` [r, k] then `X.u` [n, r], ranks in the pickle desired_r.pkl.

Its vLLM plugin reads a dictionary {full name of a linear: rank}. It decomposes attention and MLP of
a layer as wholes, with one rank for K and V and one for gate and up.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from deinfer.architectures import ARCHITECTURES
from deinfer.convert.checkpoint import CheckpointBuilder, LowRankCheckpoint, dense_config
from deinfer.convert.pairs import add_pairs
from deinfer.convert.pickles import load_objects
from deinfer.convert.source import Source
from deinfer.convert.write import Export

_RANKS = "desired_r.pkl"
_FAMILIES = ("llama", "opt")
_GROUPS = {
    "llama": (
        tuple(f"self_attn.{leaf}_proj" for leaf in "qkvo"),
        tuple(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
    ),
    "opt": (
        tuple(f"self_attn.{leaf}_proj" for leaf in ("q", "k", "v", "out")),
        ("fc1", "fc2"),
    ),
}
_EQUAL = (("self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def detect(source: Source) -> bool:
    """Whether the directory has desired_r.pkl, or an architecture of DeInfer's plugin."""
    names = source.config.get("architectures") or [""]
    known = isinstance(names, list) and str(names[0]).startswith("SVD")
    return (source.path / _RANKS).is_file() or (known and str(names[0]).endswith("ForCausalLM"))


def read(source: Source) -> LowRankCheckpoint:
    """Read DeInfer's directory."""
    builder = CheckpointBuilder(
        dense_config(source.config), {"method": "deinfer"}, source.side_files()
    )
    add_pairs(builder, source.tensors, first="v", second="u")
    file = source.path / _RANKS
    return builder.build(_read_ranks(file) if file.is_file() else None, _RANKS)


def _read_ranks(path: Path) -> dict[str, int]:
    stated = load_objects(path)
    if not isinstance(stated, dict):
        raise ValueError(f"{str(path)!r} holds no dictionary but a {type(stated).__name__}")
    for name, rank in stated.items():
        if not isinstance(name, str) or type(rank) is not int:
            raise ValueError(f"{str(path)!r}: rank {rank!r} of {name!r} is no integer")
    return stated


def write(checkpoint: LowRankCheckpoint) -> Export:
    """Make DeInfer's directory.

    Raises:
        ValueError: Its plugin could not load the model; the message says why.
    """
    family = checkpoint.config["model_type"]
    if family not in _FAMILIES:
        raise ValueError(f"DeInfer has no model for {family!r}, only for {', '.join(_FAMILIES)}")
    _require_groups(family, int(checkpoint.config["num_hidden_layers"]), checkpoint.ranks)

    def save_side_files(directory: Path) -> None:
        checkpoint.save_side_files(directory)
        (directory / _RANKS).write_bytes(pickle.dumps(checkpoint.ranks, protocol=4))

    name = f"SVD{ARCHITECTURES[family].name}ForCausalLM"
    config: dict[str, Any] = {**checkpoint.config, "architectures": [name]}
    note = (
        f"set DECOMPOSE_CONFIG to the path of {_RANKS}; ranks have to be divisible by DeInfer's TP"
    )
    return Export(config, checkpoint.tensors, save_side_files, [note])


def _require_groups(family: str, layers: int, ranks: dict[str, int]) -> None:
    for layer in range(layers):
        prefix = f"{ARCHITECTURES[family].layers}.{layer}."
        for group in _GROUPS[family]:
            there = [leaf for leaf in group if prefix + leaf in ranks]
            if there and len(there) < len(group):
                lacking = next(leaf for leaf in group if leaf not in there)
                raise ValueError(
                    f"DeInfer decomposes {', '.join(group)} of a layer together, but "
                    f"{prefix}{lacking} is dense and {prefix}{there[0]} is not"
                )
        for one, other in _EQUAL:
            first, second = ranks.get(prefix + one), ranks.get(prefix + other)
            if first != second:
                raise ValueError(
                    f"DeInfer needs one rank for {one} and {other}, but {prefix}{one} has {first} "
                    f"and {prefix}{other} has {second}"
                )

"""KFAC-SVD and LEMS: `wrapped_model.X.mod_a` [r, k] then `mod_b` [n, r], safetensors.

config.json has model_type `low_rank_compressed`, the dense config as `base_config`, and the ranks
as `rank_dict`.
"""

from __future__ import annotations

from typing import Any

from deinfer.convert.checkpoint import CheckpointBuilder, LowRankCheckpoint, dense_config
from deinfer.convert.pairs import add_pairs
from deinfer.convert.rename import renamed_factors
from deinfer.convert.source import Source
from deinfer.convert.write import Export

_MODEL_TYPE = "low_rank_compressed"
_PREFIX = "wrapped_model."
_METADATA = {"compression_method": "method", "target_ratio": "keep_ratio", "base_model_id": "base"}


def detect(source: Source) -> bool:
    """Whether config.json has the model_type of this format."""
    return source.config.get("model_type") == _MODEL_TYPE


def read(source: Source) -> LowRankCheckpoint:
    """Read a directory of KFAC-SVD."""
    base = source.config.get("base_config")
    if not isinstance(base, dict):
        raise ValueError("config.json has no base_config")
    config = dense_config(base, source.config.get("base_model_type"), drop=("_name_or_path",))
    origin = {"method": "kfac-svd"}
    for theirs, ours in _METADATA.items():
        if source.config.get(theirs) is not None:
            origin[ours] = source.config[theirs]
    builder = CheckpointBuilder(config, origin, source.side_files())
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in source.tensors.items()}
    add_pairs(builder, tensors, first="mod_a", second="mod_b")
    return builder.build(source.config.get("rank_dict") or {}, "rank_dict")


def write(checkpoint: LowRankCheckpoint) -> Export:
    """Make a directory of KFAC-SVD; the two files of its code are not ours to add."""
    config: dict[str, Any] = {
        "model_type": _MODEL_TYPE,
        "architectures": ["LowRankCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_low_rank.LowRankConfig",
            "AutoModelForCausalLM": "modeling_low_rank.LowRankCausalLM",
        },
        "base_model_type": checkpoint.config["model_type"],
        "base_config": checkpoint.config,
        "rank_dict": checkpoint.ranks,
        "tie_word_embeddings": bool(checkpoint.config.get("tie_word_embeddings", False)),
    }
    for theirs, ours in _METADATA.items():
        config[theirs] = checkpoint.origin.get(ours)
    note = "put configuration_low_rank.py and modeling_low_rank.py of a published model beside it"
    tensors = renamed_factors(
        checkpoint, first="mod_a", second="mod_b", bias="bias", prefix=_PREFIX
    )
    return Export(config, tensors, checkpoint.save_side_files, [note])

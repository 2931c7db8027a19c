"""Ordinary Hugging Face directories: read from safetensors or torch files, written with W = u v."""

from __future__ import annotations

from deinfer.architectures import ARCHITECTURES
from deinfer.convert.checkpoint import CheckpointBuilder, LowRankCheckpoint, dense_config
from deinfer.convert.source import Source
from deinfer.convert.tensors import product
from deinfer.convert.write import Export

# Config fields, and endings of tensors, by which other formats are known.
_FOREIGN_FIELDS = ("low_rank", "truncation_ranks", "rank_dict", "head_wise_ranks")
_FOREIGN_NAMES = (".u.weight", ".ALinear.weight", ".mod_b.weight", ".VT.weight", "_basis.0.weight")


def detect(source: Source) -> bool:
    """Whether it is a directory of a supported family, without any factors."""
    return (
        source.config.get("model_type") in ARCHITECTURES
        and not any(field in source.config for field in _FOREIGN_FIELDS)
        and not (source.path / "remapping_weight.pt").is_file()
        and bool(source.tensors)
        and not any(name.endswith(_FOREIGN_NAMES) for name in source.tensors)
    )


def read(source: Source) -> LowRankCheckpoint:
    """Read a dense directory."""
    builder = CheckpointBuilder(dense_config(source.config), {}, source.side_files())
    for name, tensor in source.tensors.items():
        builder.dense(name, tensor)
    return builder.build()


def write(checkpoint: LowRankCheckpoint) -> Export:
    """Make a dense directory."""
    tensors = dict(checkpoint.tensors)
    for name in checkpoint.ranks:
        u, v = tensors.pop(f"{name}.u.weight"), tensors.pop(f"{name}.v.weight")
        tensors[f"{name}.weight"] = product(u, v)
        if f"{name}.u.bias" in tensors:
            tensors[f"{name}.bias"] = tensors.pop(f"{name}.u.bias")
    return Export(checkpoint.config, tensors, checkpoint.save_side_files)

"""deinfer's own format: `X.v.weight` [r, k], `X.u.weight` [n, r], `low_rank` in config.json."""

from __future__ import annotations

from pathlib import Path

from deinfer.convert.checkpoint import CheckpointBuilder, LowRankCheckpoint, dense_config
from deinfer.convert.pairs import add_pairs
from deinfer.convert.source import Source
from deinfer.convert.write import Export
from deinfer.decompose.checkpoint import FORMAT_VERSION, copy_modeling_file, low_rank_config


def detect(source: Source) -> bool:
    """Whether config.json has a `low_rank` object."""
    return isinstance(source.config.get("low_rank"), dict)


def read(source: Source) -> LowRankCheckpoint:
    """Read a canonical directory."""
    low_rank = dict(source.config["low_rank"])
    version = low_rank.pop("version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"low_rank.version {version!r} is not {FORMAT_VERSION}")
    stated = low_rank.pop("ranks", {})
    config = dense_config(source.config, low_rank.pop("base_model_type", None))
    builder = CheckpointBuilder(config, low_rank, source.side_files())
    add_pairs(builder, source.tensors, first="v", second="u")
    return builder.build(stated, "low_rank.ranks")


def write(checkpoint: LowRankCheckpoint) -> Export:
    """Make a canonical directory, with the modelling file for transformers."""

    def save_side_files(directory: Path) -> None:
        checkpoint.save_side_files(directory)
        copy_modeling_file(directory)

    config = low_rank_config(checkpoint.config, checkpoint.ranks, checkpoint.origin)
    return Export(config, checkpoint.tensors, save_side_files)

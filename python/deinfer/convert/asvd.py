"""ASVD (arXiv 2312.05821): Hugging Face directories, `X.BLinear` [r, k] then `X.ALinear` [n, r].

config.json keeps the family's model_type and adds `truncation_ranks` by full module name.
"""

from __future__ import annotations

from typing import Any

from deinfer.architectures import ARCHITECTURES
from deinfer.convert.checkpoint import CheckpointBuilder, LowRankCheckpoint, dense_config
from deinfer.convert.pairs import add_pairs
from deinfer.convert.rename import renamed_factors
from deinfer.convert.source import Source
from deinfer.convert.write import Export

_FAMILIES = ("llama", "opt", "qwen2")  # those with a modelling file in its repository


def detect(source: Source) -> bool:
    """Whether config.json has `truncation_ranks`."""
    return isinstance(source.config.get("truncation_ranks"), dict)


def read(source: Source) -> LowRankCheckpoint:
    """Read ASVD's directory."""
    config = dense_config(source.config, drop=("truncation_ranks",))
    builder = CheckpointBuilder(config, {"method": "asvd"}, source.side_files())
    add_pairs(builder, source.tensors, first="BLinear", second="ALinear")
    return builder.build(source.config["truncation_ranks"], "truncation_ranks")


def write(checkpoint: LowRankCheckpoint) -> Export:
    """Make ASVD's directory; the two files of its code that auto_map names are not ours to add.

    Raises:
        ValueError: ASVD has no code for the family.
    """
    family = checkpoint.config["model_type"]
    if family not in _FAMILIES:
        raise ValueError(f"ASVD has no model for {family!r}, only for {', '.join(_FAMILIES)}")
    name = f"ASVD{ARCHITECTURES[family].name}"
    files = f"configuration_asvd_{family}", f"modeling_asvd_{family}"
    config: dict[str, Any] = {
        **checkpoint.config,
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{files[0]}.{name}Config",
            "AutoModelForCausalLM": f"{files[1]}.{name}ForCausalLM",
        },
        "truncation_ranks": checkpoint.ranks,
    }
    note = f"put {files[0]}.py and {files[1]}.py of ASVD4LLM's huggingface_repos beside it"
    tensors = renamed_factors(checkpoint, first="BLinear", second="ALinear")
    return Export(config, tensors, checkpoint.save_side_files, [note])

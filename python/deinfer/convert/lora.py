"""PEFT's LoRA adapters, where the adapter is all of the weight: W = scale B A.

An adapter is a change to a weight, so this holds only where the dense model's weight is zero, or
left out. Any other is added to its model by `deinfer perception merge`.
"""

from __future__ import annotations

from torch import Tensor

from deinfer.convert.checkpoint import CheckpointBuilder, LowRankCheckpoint, dense_config
from deinfer.convert.source import Source
from deinfer.convert.tensors import LazyTensor, open_directory, read_object
from deinfer.perception.lora import read_adapter

_ADVICE = "`deinfer perception merge` adds an adapter to its model"


def detect(source: Source) -> bool:
    """Whether the directory has adapter_config.json."""
    return (source.path / "adapter_config.json").is_file()


def read(source: Source) -> LowRankCheckpoint:
    """Read an adapter and its base."""
    base = source.require_base(f"a LoRA adapter is a change to a dense model ({_ADVICE})")
    config = dense_config(read_object(base / "config.json"))
    builder = CheckpointBuilder(config, {"method": "lora"}, source.side_files())
    tensors = open_directory(base)
    for module, (a, b, scale) in read_adapter(source.path).items():
        weight = tensors.pop(f"{module}.weight", None)
        if weight is not None and bool(weight.load().count_nonzero()):
            raise ValueError(
                f"the base's {module}.weight is not zero, so that the adapter is only a change to "
                f"it and no factorization; {_ADVICE}"
            )
        builder.pair(
            module,
            LazyTensor.of(a),
            LazyTensor.of(_scaled(b, scale)),
            bias=tensors.pop(f"{module}.bias", None),
        )
    for name, tensor in tensors.items():
        builder.dense(name, tensor)
    return builder.build()


def _scaled(b: Tensor, scale: float) -> Tensor:
    return (scale * b.double()).to(b.dtype)

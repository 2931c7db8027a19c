"""AA-SVD (arXiv 2604.02119): a directory per linear with V.pt [k, r] and U.pt [n, r].

A directory's name is the linear's with underscores for dots. S.pt, where there is one, holds
singular values, whose roots belong to both factors. Its 8-bit form has Dobi-SVD's bytes instead:
UK_q, VK_q [r, min(n, k)] with a scale per row, and the rest of the longer side in rem.pt. Norms
that were fine-tuned lie in state_dict.pt. All else is that of the dense model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deinfer.convert.checkpoint import CheckpointBuilder, LowRankCheckpoint, dense_config
from deinfer.convert.dynamic_map import dequantize
from deinfer.convert.pickles import load_tensors
from deinfer.convert.source import Source
from deinfer.convert.tensors import LazyTensor, open_directory, read_object

_PLAIN, _BYTES, _NORM = "U.pt", "UK_q.pt", "state_dict.pt"


def detect(source: Source) -> bool:
    """Whether a subdirectory has factors."""
    return source.path.is_dir() and any(
        any(source.path.glob(f"*/{file}")) for file in (_PLAIN, _BYTES)
    )


def read(source: Source) -> LowRankCheckpoint:
    """Read a tree of AA-SVD."""
    base = source.require_base("AA-SVD's files hold the factors only")
    config = dense_config(read_object(base / "config.json"))
    builder = CheckpointBuilder(config, {"method": "aa-svd"}, Source(base).side_files())
    tensors = open_directory(base)
    modules = {name.rpartition(".")[0].replace(".", "_"): name for name in builder.shapes}
    for folder in sorted(path for path in source.path.iterdir() if path.is_dir()):
        parameter = modules.get(folder.name)
        if parameter is None:
            raise ValueError(f"{folder.name!r} is no module of a {config['model_type']} model")
        module = parameter.rpartition(".")[0]
        if (folder / _NORM).is_file():
            for leaf, value in load_tensors(folder / _NORM).items():
                tensors[f"{module}.{leaf}"] = LazyTensor.of(value)
            continue
        u, v = _factors(folder)
        bias = tensors.pop(f"{module}.bias", None)
        if (folder / "bias.pt").is_file():
            bias = LazyTensor.of(_load(folder / "bias.pt"))
        tensors.pop(f"{module}.weight", None)
        builder.pair(module, LazyTensor.of(v.t()), LazyTensor.of(u), bias=bias)
    for name, tensor in tensors.items():
        builder.dense(name, tensor)
    return builder.build()


def _factors(folder: Path) -> tuple[Tensor, Tensor]:
    """U [n, r] and v [k, r]."""
    if (folder / _BYTES).is_file():
        u, v = (
            dequantize(_load(folder / f"{x}K_q.pt"), _load(folder / f"{x}K_absmax.pt")).t()
            for x in "UV"
        )
        rest = _load(folder / "rem.pt")
        if bool(_load(folder / "swapped.pt").item()):
            u = torch.cat([u, rest.float()])
        else:
            v = torch.cat([v, rest.float()])
        return u.to(torch.float16), v.to(torch.float16)
    u, v = _load(folder / _PLAIN), _load(folder / "V.pt")
    if (folder / "S.pt").is_file():
        roots = _load(folder / "S.pt").float().sqrt()
        u, v = (u.float() * roots).to(u.dtype), (v.float() * roots).to(v.dtype)
    return u, v


def _load(file: Path) -> Tensor:
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is missing")
    tensor = load_tensors(file).get("")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{str(file)!r} holds no tensor")
    return tensor

"""Tiny random checkpoints in the exact layouts of other projects, and the torch models in them.

Each function of `LAYOUTS` saves a model as that project's scripts do and returns where, together
with the model itself, which computes with the saved values in the source's own way. Those that are
pickles stand in foreign_pickles.py.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deinfer.architectures import ARCHITECTURES
from foreign_parts import (
    VU,
    Foreign,
    SVDLinear,
    choose_ranks,
    dense_model,
    factors,
    foreign_config,
    linear,
    linear_shapes,
    replace,
    stored,
    write_json,
)
from foreign_pickles import aasvd, dobi, dobi_remapped, svdllm
from safetensors.torch import save_file
from torch import Tensor, nn


def asvd(path: Path, family: str) -> Foreign:
    """A directory in float16 with `truncation_ranks`, safetensors."""
    model = dense_model(path, family)
    ranks = choose_ranks(model, family)
    for name, rank in ranks.items():
        old = model.get_submodule(name)
        replace(model, name, SVDLinear(*factors(*old.weight.shape, rank), old.bias))
    name = f"ASVD{ARCHITECTURES[family].name}"
    config = foreign_config(
        model,
        truncation_ranks=ranks,
        torch_dtype="float16",
        architectures=[f"{name}ForCausalLM"],
        auto_map={
            "AutoConfig": f"configuration_asvd_{family}.{name}Config",
            "AutoModelForCausalLM": f"modeling_asvd_{family}.{name}ForCausalLM",
        },
    )
    write_json(path / "asvd" / "config.json", config)
    save_file(stored(model, torch.float16), path / "asvd" / "model.safetensors")
    return Foreign(path / "asvd", model, ranks)


def deinfer(path: Path, family: str) -> Foreign:
    """A directory in float16 with desired_r.pkl, in which some ranks are numpy integers."""
    model = dense_model(path, family)
    shapes = linear_shapes(model, family)
    half = 6 if family == "opt" else 7
    ranks = dict.fromkeys(itertools.islice(shapes, half, None), 10)
    for name, rank in ranks.items():
        old = model.get_submodule(name)
        replace(model, name, VU(*factors(*old.weight.shape, rank), old.bias))
    out = path / "deinfer"
    name = f"SVD{ARCHITECTURES[family].name}ForCausalLM"
    write_json(out / "config.json", foreign_config(model, architectures=[name]))
    save_file(stored(model, torch.float16), out / "model.safetensors")
    kinds = itertools.cycle((int, np.int64, np.int32))
    with (out / "desired_r.pkl").open("wb") as file:
        pickle.dump({name: next(kinds)(rank) for name, rank in ranks.items()}, file)
    return Foreign(out, model, ranks)


class SeqSVD(nn.Module):
    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.mod_a, self.mod_b = linear(v), linear(u)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mod_b(self.mod_a(x))
        return y if self.bias is None else y + self.bias


def kfac(path: Path, family: str) -> Foreign:
    """bfloat16 in two shards; everything is below `wrapped_model`."""
    model = dense_model(path, family)
    ranks = choose_ranks(model, family)
    for name, rank in ranks.items():
        old = model.get_submodule(name)
        replace(model, name, SeqSVD(*factors(*old.weight.shape, rank), old.bias))
    out = path / "kfac"
    write_json(
        out / "config.json",
        {
            "model_type": "low_rank_compressed",
            "architectures": ["LowRankCausalLM"],
            "base_model_type": family,
            "base_model_id": "someone/model",
            "base_config": foreign_config(model, _name_or_path="someone/model"),
            "rank_dict": ranks,
            "compression_method": "kfac",
            "target_ratio": 0.8,
        },
    )
    state = {f"wrapped_model.{k}": t for k, t in stored(model, torch.bfloat16).items()}
    names = sorted(state)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in files.items():
        save_file({name: state[name] for name in part}, out / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return Foreign(out, model, ranks)


class HeadwiseLowRankModule(nn.Module):
    def __init__(self, groups: list[Tensor], vt: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.VT = linear(vt)
        parts = [None] * len(groups) if bias is None else bias.chunk(len(groups))
        self.U = nn.ModuleList(linear(u, b) for u, b in zip(groups, parts, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        latent = self.VT(x)
        sizes = [u.in_features for u in self.U]
        parts = latent.split(sizes, dim=-1)
        return torch.cat([u(z) for u, z in zip(self.U, parts, strict=True)], dim=-1)


def palu(path: Path, family: str) -> Foreign:
    """Keys and values, a group per head with a rank of its own."""
    model = dense_model(path, family)
    stated, ranks = {}, {}
    for name, (n, k) in linear_shapes(model, family).items():
        if name.endswith(("k_proj", "v_proj")):
            stated[name] = [3, 6]
            groups = [factors(n // 2, k, rank)[0] for rank in stated[name]]
            ranks[name] = sum(stated[name])
            vt = factors(n, k, ranks[name])[1]
            old = model.get_submodule(name)
            replace(model, name, HeadwiseLowRankModule(groups, vt, old.bias))
    out = path / "palu"
    config = foreign_config(
        model,
        model_type=f"palu{family}",
        architectures=[f"Palu{ARCHITECTURES[family].name}ForCausalLM"],
        head_wise_ranks=stated,
        original_model_name_or_path="someone/model",
    )
    write_json(out / "config.json", config)
    save_file(stored(model, torch.float16), out / "model.safetensors")
    return Foreign(out, model, ranks)


def basis_sharing(path: Path, family: str, *, safetensors: bool = False) -> Foreign:
    """Two layers share the bases of all but o and down, which have one per layer."""
    model = dense_model(path, family)
    opt = family == "opt"
    layers = ARCHITECTURES[family].layers
    root = model.get_submodule(layers.rpartition(".")[0])
    leaves = {x: f"self_attn.{x}_proj" for x in "qkv"}
    leaves["o"] = "self_attn.out_proj" if opt else "self_attn.o_proj"
    leaves |= (
        {"up": "fc1", "down": "fc2"}
        if opt
        else {x: f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    )
    fields: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    truth: dict[str, VU] = {}
    for i, (x, leaf) in enumerate(leaves.items()):
        groups = [[0], [1]] if x in ("o", "down") else [[0, 1]]
        fields[f"{x}_groups"], fields[f"num_basis_{x}"] = groups, 5 + i
        collection = nn.ModuleDict()
        for group in groups:
            n, k = model.get_submodule(f"{layers}.{group[0]}.{leaf}").weight.shape
            basis = linear(factors(n, k, 5 + i)[1])
            for layer in group:
                name = f"{layers}.{layer}.{leaf}"
                old = model.get_submodule(name)
                coefficients = linear(factors(n, k, 5 + i)[0], old.bias)
                truth[name] = VU(coefficients.weight, basis.weight, coefficients.bias)
                truth[name].v, truth[name].u = basis, coefficients
                replace(model, name, coefficients)
                collection[str(layer)] = basis
                ranks[name] = 5 + i
        setattr(root, f"{x}_basis", collection)
    out = path / "basis"
    name = f"Share{ARCHITECTURES[family].name}ForCausalLM"
    write_json(out / "config.json", foreign_config(model, architectures=[name], **fields))
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if safetensors:  # which saves shared tensors once
        shared = [n for n in state if "_basis.1" in n and ".o_" not in n and ".down_" not in n]
        save_file({n: t for n, t in state.items() if n not in shared}, out / "model.safetensors")
    else:
        torch.save(state, out / "pytorch_model.bin")
    for name, pair in truth.items():
        replace(model, name, pair)
    return Foreign(out, model, ranks)


def lora(path: Path, family: str) -> Foreign:
    """An adapter with alpha / sqrt(r) of linears whose base weights are zero."""
    from safetensors.torch import load_file

    model = dense_model(path, family)
    ranks = {name: 6 for name in choose_ranks(model, family) if "mlp" in name}
    file = path / "dense" / "model.safetensors"
    base, adapter = load_file(file), {}
    for name, rank in ranks.items():
        old = model.get_submodule(name)
        b, a = factors(*old.weight.shape, rank)
        adapter[f"base_model.model.{name}.lora_A.weight"] = a
        adapter[f"base_model.model.{name}.lora_B.weight"] = b
        base[f"{name}.weight"] = torch.zeros_like(old.weight)
        replace(model, name, VU(b * (3 / math.sqrt(rank)), a, old.bias))
    save_file(base, file)
    out = path / "adapter"
    write_json(
        out / "adapter_config.json",
        {"peft_type": "LORA", "lora_alpha": 3, "r": 6, "use_rslora": True, "bias": "none"},
    )
    save_file(adapter, out / "adapter_model.safetensors")
    return Foreign(out, model, ranks, base=path / "dense")


LAYOUTS: dict[str, Callable[[Path, str], Foreign]] = {
    "svdllm": svdllm,
    "asvd": asvd,
    "dobi": dobi,
    "dobi-remapped": dobi_remapped,
    "deinfer": deinfer,
    "kfac": kfac,
    "palu": palu,
    "basis-sharing": basis_sharing,
    "aasvd": aasvd,
    "lora": lora,
}

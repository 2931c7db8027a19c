"""Layouts of SVD-LLM, Dobi-SVD and AA-SVD: torch's pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from foreign_parts import (
    VU,
    Foreign,
    SVDLinear,
    choose_ranks,
    dense_model,
    factors,
    foreign_config,
    halve,
    importable,
    linear,
    linear_shapes,
    of_module,
    quantize_rows,
    replace,
    stored,
    write_json,
)
from torch import Tensor, nn


class _Siblings:
    """Mixed into attention, MLP or layer: `q_proj` is `q_u_proj` after `q_v_proj`."""

    def __getattr__(self, name: str) -> Any:
        stem = name.removesuffix("_proj")
        children = self.__dict__.get("_modules", {})
        if f"{stem}_u_proj" in children:
            return lambda x: children[f"{stem}_u_proj"](children[f"{stem}_v_proj"](x))
        return super().__getattr__(name)


def siblings(module: nn.Module, cls_name: str, where: str) -> type:
    cls = type(cls_name, (_Siblings, type(module)), {})
    cls.__module__ = where
    return cls


def svdllm(path: Path, family: str) -> Foreign:
    """{'model', 'tokenizer'}: float16, but factors are float32; OPT's first ones have a bias."""
    model = dense_model(path, family)
    halve(model)
    module = {"llama": "svd_llama", "mistral": "svd_mistral", "opt": "svd_opt"}[family]
    ranks = choose_ranks(model, family)
    classes: dict[str, type] = {}
    for name, rank in ranks.items():
        parent_name, _, leaf = name.rpartition(".")
        parent, old = model.get_submodule(parent_name), model.get_submodule(name)
        if not isinstance(parent, _Siblings):
            kind = type(parent).__name__
            if kind not in classes:
                classes[kind] = siblings(parent, f"SVD_{kind}", f"component.{module}")
            parent.__class__ = classes[kind]
        u, v = factors(*old.weight.shape, rank)
        bias = None if old.bias is None else old.bias.float()
        stem = leaf.removesuffix("_proj")
        delattr(parent, leaf)
        setattr(parent, f"{stem}_u_proj", linear(u, bias))
        setattr(parent, f"{stem}_v_proj", linear(v, None if bias is None else torch.randn(rank)))
    file = path / f"{family}_7b_whitening_only_0.8.pt"
    with importable(*classes.values()):
        torch.save({"model": model, "tokenizer": fast_tokenizer()}, file)
    return Foreign(file, model.float(), ranks)


def fast_tokenizer() -> Any:
    import tokenizers
    import transformers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@of_module("modules.module")
class SVDTransformLayer(nn.Module):
    """Dobi-SVD's: A first, and a bias of the wrong size on it."""

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.name = "a name"
        self.ALinear = linear(v)
        self.BLinear = linear(u, None if bias is None else torch.randn(len(u)))
        if bias is not None:
            self.ALinear.bias = nn.Parameter(bias)


def dobi(path: Path, family: str) -> Foreign:
    """DobiSVD_Model.pt in a directory, float16. Layers with a bias cannot run as they are."""
    model = dense_model(path, family)
    halve(model)
    ranks = choose_ranks(model, family)
    layers = {}
    for name, rank in ranks.items():
        old = model.get_submodule(name)
        u, v = (factor.half() for factor in factors(*old.weight.shape, rank))
        layers[name] = SVDTransformLayer(u, v, None if old.bias is None else old.bias.half())
        bias = None if old.bias is None else old.bias.float()
        replace(model, name, SVDLinear(u.float(), v.float(), bias))
    truth = {name: model.get_submodule(name) for name in ranks}
    for name, layer in layers.items():
        replace(model, name, layer)
    (path / "dobi").mkdir()
    with importable(SVDTransformLayer):
        torch.save({"model": model, "tokenizer": None}, path / "dobi" / "DobiSVD_Model.pt")
    for name, layer in truth.items():
        replace(model, name, layer)
    return Foreign(path / "dobi", model.float(), ranks)


def dobi_remapped(path: Path, family: str) -> Foreign:
    """All linears in remapping_weight.pt; those of high rank are multiplied at load."""
    model = dense_model(path, family)
    out = path / "remapped"
    stored(model, torch.float16)
    shapes, ranks, entries = linear_shapes(model, family), {}, {}
    for i, (name, (n, k)) in enumerate(shapes.items()):
        rank = min(n, k) if i % 4 == 3 else 5 + 2 * (i % 5)
        u, v = factors(n, k, rank)
        m = min(n, k)
        us_quan, us_absmax, us = quantize_rows(u.t()[:, :m])
        vt_quan, vt_absmax, vt = quantize_rows(v[:, :m])
        info: Any = None
        if n > k:
            info = ("us", u[m:].half())
            us = torch.cat([us, info[1].t()], 1)
        elif n < k:
            info = ("vt", v[:, m:].half())
            vt = torch.cat([vt, info[1]], 1)
        entries[name] = {
            "us_quan": us_quan,
            "vt_quan": vt_quan,
            "us_absmax": us_absmax,
            "vt_absmax": vt_absmax,
            "tuple_info": info,
        }
        old = model.get_submodule(name)
        if rank * (n + k) < n * k:
            ranks[name] = rank
            replace(model, name, SVDLinear(us.t().float(), vt.float(), old.bias))
        else:
            old.weight.data = (us.t().float() @ vt.float()).half().float()
    write_json(out / "config.json", foreign_config(model, torch_dtype="float16"))
    rest = {
        name: tensor
        for name, tensor in stored(model, torch.float16).items()
        if not name.startswith(tuple(shapes))
    }
    biases = {f"{n}.bias": model.get_submodule(n).bias for n in shapes if n not in ranks}
    biases |= {f"{n}.bias": model.get_submodule(n).ALinear.bias for n in ranks}
    rest |= {name: bias.detach().half() for name, bias in biases.items() if bias is not None}
    torch.save(rest, out / "pytorch_model.bin")
    torch.save(entries, out / "remapping_weight.pt")
    return Foreign(out, model, ranks)


def aasvd(path: Path, family: str, *, quantized: bool = False) -> Foreign:
    """A directory per linear and per fine-tuned norm; biases are the dense model's."""
    model = dense_model(path, family, dtype=torch.float16)
    ranks = choose_ranks(model, family)
    out = path / "tree"
    for i, (name, rank) in enumerate(ranks.items()):
        old = model.get_submodule(name)
        u, v = factors(*old.weight.shape, rank)
        folder = out / name.replace(".", "_")
        folder.mkdir(parents=True)
        m = min(old.weight.shape)
        parts: dict[str, Tensor]
        if quantized:
            u_codes, u_scales, us = quantize_rows(u.t()[:, :m])
            v_codes, v_scales, vt = quantize_rows(v[:, :m])
            swapped = len(u) > m
            rest = (u[m:] if swapped else v.t()[m:]).half()
            u = torch.cat([us.t(), rest]) if swapped else us.t()
            v = vt if swapped else torch.cat([vt, rest.t()], 1)
            parts = {"UK_q": u_codes, "UK_absmax": u_scales, "VK_q": v_codes, "rem": rest}
            parts |= {"VK_absmax": v_scales, "swapped": torch.tensor(swapped)}
        else:
            u, v = u.half(), v.half()
            parts = {"U": u, "V": v.t()}
            if i == 0:  # an early version kept singular values apart
                parts["S"] = torch.rand(rank) + 0.5
                u = (u.float() * parts["S"].sqrt()).half()
                v = (v.t().float() * parts["S"].sqrt()).half().t()
        for file, tensor in parts.items():
            torch.save(tensor, folder / f"{file}.pt")
        replace(model, name, VU(u.float(), v.float(), old.bias))
    norm = "model.layers.1.input_layernorm"
    weight = torch.rand(model.config.hidden_size).half()
    model.get_submodule(norm).weight.data = weight.float()
    (out / norm.replace(".", "_")).mkdir()
    torch.save({"weight": weight}, out / norm.replace(".", "_") / "state_dict.pt")
    return Foreign(out, model, ranks, base=path / "dense")

"""Low-rank linears as torch modules, and `accelerate` for models that hold factor pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deinfer import torch_ops

__all__ = ["LowRankLinear", "accelerate"]

_KERNEL_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
# Names of a first and a second factor in one module: ours, ASVD's, Dobi-SVD's, KFAC-SVD's and those
# of a plain nn.Sequential. ALinear and BLinear are either's first: shapes decide.
_PAIRS = (
    ("v", "u"),
    ("BLinear", "ALinear"),
    ("ALinear", "BLinear"),
    ("mod_a", "mod_b"),
    ("0", "1"),
)
# SVD-LLM: q_v_proj and q_u_proj beside each other, out_v_proj, fc1_v_proj, ...
_FIRST, _SECOND = "_v_proj", "_u_proj"


def _identity(tensor: Tensor | None) -> tuple[int, int]:
    """What changes when a parameter gets other values or another place."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class InnerFactor(nn.Linear):
    """The first factor V of a pair: holds the weight [r, k], and passes its input on.

    The product with it is the second factor's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` [..., k] as it is."""
        return input


class OuterFactor(nn.Linear):
    """The second factor U [n, r] of a pair, with its bias: computes u (v x) + bias from x [..., k].

    Without gradients it computes with packed weights, made when first needed and again when a
    parameter has changed. Compiled graphs do not look for changes of values in place: after such,
    call `load_state_dict` or `train()`, which drop what is packed.
    """

    def __init__(self, inner: InnerFactor, n: int, *, bias: bool, **options: Any) -> None:
        """Create the factor on top of `inner`; `options` (device, dtype) are nn.Linear's."""
        super().__init__(inner.out_features, n, bias=bias, **options)
        self._inner = (inner,)  # in a tuple: its parameters have their names elsewhere
        self._packed: Tensor | None = None
        self._packed_from: tuple[tuple[int, int], ...] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Map x [..., k] to [..., n]."""
        v = self._inner[0].weight
        packs = (
            not torch.is_grad_enabled()
            and input.dtype == self.weight.dtype
            and input.dtype in _KERNEL_DTYPES.get(input.device.type, ())
            and not torch.is_autocast_enabled(input.device.type)
        )
        y: Tensor
        if packs:
            y = torch_ops.lowrank_linear_packed(
                input, self.packed(), self.out_features, [self.in_features]
            )
        else:
            y = torch_ops.lowrank_linear(input, v, self.weight, self.bias)
        return y

    def packed(self) -> Tensor:
        """The packed weights of the pair, uint8 [bytes], of the parameters as they are now."""
        v = self._inner[0].weight
        if torch.compiler.is_compiling():
            if self._packed is None:
                self._packed = torch_ops.lowrank_pack([v], [self.weight], [self.bias])
            return self._packed
        now = (_identity(v), _identity(self.weight), _identity(self.bias))
        if self._packed is None or self._packed_from != now:
            with torch.no_grad():
                self._packed = torch_ops.lowrank_pack([v], [self.weight], [self.bias])
            self._packed_from = now
        return self._packed

    def drop_packed(self) -> None:
        """Free the packed weights; the next call without gradients packs again."""
        self._packed = None
        self._packed_from = None

    def train(self, mode: bool = True) -> OuterFactor:
        """Set the mode; training drops the packed weights."""
        if mode:
            self.drop_packed()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> OuterFactor:
        self.drop_packed()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_packed()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed weights out of copies and files."""
        return {**self.__dict__, "_packed": None, "_packed_from": None}


class LowRankLinear(nn.Module):
    """y = u (v x) + bias on deinfer's kernels; parameters `v.weight`, `u.weight`, `u.bias`.

    Args:
        in_features: k.
        out_features: n.
        rank: r.
        bias: Whether there is a bias [n].
        **options: device and dtype of the parameters.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, **options: Any
    ) -> None:
        """Create the factors with nn.Linear's initial values."""
        super().__init__()
        self.v = InnerFactor(in_features, rank, bias=False, **options)
        self.u = OuterFactor(self.v, out_features, bias=bias, **options)

    @classmethod
    def from_factors(cls, v: Tensor, u: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """Make the module of v [r, k], u [n, r] and bias [n], which become its parameters.

        Raises:
            ValueError: The shapes do not fit together.
        """
        if v.dim() != 2 or u.dim() != 2 or v.shape[0] != u.shape[1]:
            raise ValueError(f"v {list(v.shape)} and u {list(u.shape)} are no factors of a matrix")
        if bias is not None and bias.shape != u.shape[:1]:
            raise ValueError(f"bias has shape {list(bias.shape)}, not [{u.shape[0]}]")
        module = cls(v.shape[1], u.shape[0], v.shape[0], bias is not None, device="meta")
        module.v.weight, module.u.weight = nn.Parameter(v), nn.Parameter(u)
        if bias is not None:
            module.u.bias = nn.Parameter(bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features]."""
        y: Tensor = self.u(self.v(x))
        return y


def _is_pair(first: object, second: object) -> bool:
    """Whether second(first(x)) is a low-rank linear."""
    return (
        type(first) is nn.Linear
        and type(second) is nn.Linear
        and first.bias is None
        and first.out_features == second.in_features
        and first.out_features <= min(first.in_features, second.out_features)
        # Square ones of full rank could stand in either order.
        and first.out_features < max(first.in_features, second.out_features)
    )


def _factor_pairs(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield (module, name of the first factor, name of the second) for the pairs of a model."""
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        names = list(_PAIRS)
        if "0" in children and not (type(parent) is nn.Sequential and len(children) == 2):
            names.remove(("0", "1"))
        stems = [name.removesuffix(_FIRST) for name in children if name.endswith(_FIRST)]
        names += [(stem + _FIRST, stem + _SECOND) for stem in stems]
        for first, second in names:
            if _is_pair(children.get(first), children.get(second)):
                yield parent, first, second


def accelerate(model: Any) -> Any:
    """Run the factor pairs of a torch model, such as one of transformers, on deinfer's kernels.

    A pair is two nn.Linear, the second applied to the output of the first, without a bias in
    between: children `v` and `u` of a module (deinfer's and DeInfer's checkpoints), `BLinear` and
    `ALinear` (ASVD; Dobi-SVD the other way round), `mod_a` and `mod_b` (KFAC-SVD), the two of an
    nn.Sequential, and siblings `X_v_proj` and `X_u_proj` (SVD-LLM). The second becomes an
    `OuterFactor`, the first an `InnerFactor` that passes its input on. Parameters, the names in
    `state_dict` and all other modules stay; packed copies of the factors are made when the model
    first runs without gradients, and take as much memory as the factors.

    Args:
        model: The model, on the CPU or, in bfloat16, on a CUDA device; it is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: There is no such pair in the model.
    """
    pairs = list(_factor_pairs(model))
    if not pairs:
        raise ValueError(f"{type(model).__name__} holds no pair of linears that are factors")
    for parent, first, second in pairs:
        v, u = getattr(parent, first), getattr(parent, second)
        inner = InnerFactor(v.in_features, v.out_features, bias=False, device="meta")
        inner.weight = v.weight
        outer = OuterFactor(inner, u.out_features, bias=u.bias is not None, device="meta")
        outer.weight, outer.bias = u.weight, u.bias
        setattr(parent, first, inner.train(v.training))
        setattr(parent, second, outer.train(u.training))
    return model

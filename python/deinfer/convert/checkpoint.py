"""The common form of what importers read: dense config, factors and other tensors by their names.

Every importer fills a `CheckpointBuilder`, which knows from the config what the model consists of:
it decides the orientation of factors by their shapes, moves biases where the canonical format has
them, and refuses what is missing, superfluous or of the wrong shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deinfer.architectures import ARCHITECTURES
from deinfer.convert.tensors import LazyTensor, product
from deinfer.decompose.checkpoint import linear_names

# Constants that old transformers saved with the weights.
_BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
# Fields that say how to load a dense or foreign model, not what it is.
_FOREIGN_FIELDS = ("architectures", "auto_map", "low_rank", "transformers_version")


@dataclass(frozen=True)
class LowRankCheckpoint:
    """A model in the canonical names.

    Attributes:
        config: config.json of the dense model.
        tensors: `X.v.weight` [r, k] and `X.u.weight` [n, r] with `X.u.bias` for decomposed linears
            X, the dense model's names for all else.
        ranks: Rank by decomposed linear.
        origin: What the `low_rank` object says besides version, base_model_type and ranks.
        save_side_files: Writes tokenizer and chat template into a directory.
        notes: What a user should know about the conversion.
    """

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    ranks: dict[str, int]
    origin: dict[str, Any]
    save_side_files: Callable[[Path], None]
    notes: list[str] = field(default_factory=list)

    def linear_names(self) -> list[str]:
        """Name the linears of the decoder, in the order in which they run."""
        return linear_names(self.config)


def dense_config(
    config: Mapping[str, Any], model_type: str | None = None, drop: Iterable[str] = ()
) -> dict[str, Any]:
    """Make the config of the dense model of a foreign one.

    Args:
        config: Foreign config.json.
        model_type: Of the dense model, where the config has another.
        drop: Fields of the foreign format.

    Returns:
        A new config.

    Raises:
        ValueError: The architecture is not supported, or the model is quantized.
    """
    kind = model_type or config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"architecture {kind!r} is not supported, only {sorted(ARCHITECTURES)}")
    if config.get("quantization_config"):
        raise ValueError("the checkpoint is quantized (quantization_config)")
    dropped = {*_FOREIGN_FIELDS, *drop}
    kept = {name: value for name, value in config.items() if name not in dropped}
    return {
        **kept,
        "model_type": kind,
        "architectures": [f"{ARCHITECTURES[kind].name}ForCausalLM"],
    }


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name all parameters of a dense model with their shapes, by building it without memory.

    Args:
        config: config.json of a supported architecture.

    Returns:
        Shapes by name; a tied lm_head is among them.

    Raises:
        ValueError: transformers rejects the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in config.items() if k not in ("model_type", *_FOREIGN_FIELDS)}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(config["model_type"], **fields)
            )
    except Exception as error:  # whatever a bad value leads to
        raise ValueError(f"config.json describes no model: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class _Reading:
    """How the two factors of a format become v and u."""

    swapped: bool
    first_turned: bool
    second_turned: bool

    def apply(self, first: LazyTensor, second: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
        if self.first_turned:
            first = first.transposed()
        if self.second_turned:
            second = second.transposed()
        return (second, first) if self.swapped else (first, second)


_OWN = _Reading(False, False, False)  # what a format says of itself
_READINGS = [_Reading(*flags) for flags in itertools.product((False, True), repeat=3)]


@dataclass(frozen=True)
class _Pair:
    """Arguments of `CheckpointBuilder.pair`, and the readings that fit."""

    first: LazyTensor
    second: LazyTensor
    bias: LazyTensor | None
    first_bias: LazyTensor | None
    readings: set[_Reading]


class CheckpointBuilder:
    """Collects the tensors of one checkpoint; `build` checks that they make a model.

    Args:
        config: Of the dense model, from `dense_config`.
        origin: As of `LowRankCheckpoint`.
        save_side_files: Likewise.
    """

    def __init__(
        self,
        config: dict[str, Any],
        origin: dict[str, Any],
        save_side_files: Callable[[Path], None],
    ) -> None:
        """Start with nothing; see the class."""
        self.config = config
        self.shapes = parameter_shapes(config)
        self.linears = linear_names(config)
        self.ranks: dict[str, int] = {}
        self.notes: list[str] = []
        self._origin = origin
        self._save_side_files = save_side_files
        self._tensors: dict[str, LazyTensor] = {}
        self._pairs: dict[str, _Pair] = {}
        self._notes_by_kind: dict[str, list[str]] = {}

    def pair(
        self,
        name: str,
        first: LazyTensor,
        second: LazyTensor,
        *,
        bias: LazyTensor | None = None,
        first_bias: LazyTensor | None = None,
    ) -> None:
        """Add the factors of a linear.

        Args:
            name: Of the linear, e.g. `model.layers.0.self_attn.q_proj`.
            first: The factor that the format applies first, [r, k].
            second: The other, [n, r]. Where these shapes fit only in another order or orientation,
                that is taken: the one that fits all pairs if there is one, else that of the pair.
            bias: Of the linear, [n].
            first_bias: Of the first factor, [r]: u times it is added to the bias. One of [n] that
                does not fit the first factor is the linear's bias, as Dobi-SVD writes it.

        Raises:
            ValueError: The model has no such linear, or shapes do not fit.
        """
        name = self._full_name(f"{name}.weight").removesuffix(".weight")
        shape = self.shapes.get(f"{name}.weight")
        if shape is None or len(shape) != 2:
            raise ValueError(f"{name!r} is no linear of a {self.config['model_type']} model")
        if name in self._pairs:
            raise ValueError(f"{name!r} has factors twice")
        if len(first.shape) != 2 or len(second.shape) != 2:
            raise ValueError(
                f"{name}: factors {list(first.shape)}, {list(second.shape)} are no matrices"
            )
        readings = _readings(first, second, shape)
        if not readings:
            raise ValueError(
                f"{name}: factors {list(first.shape)} and {list(second.shape)} do not fit a "
                f"weight {list(shape)}"
            )
        self._pairs[name] = _Pair(first, second, bias, first_bias, readings)

    def dense(self, name: str, weight: LazyTensor) -> None:
        """Add a tensor that the dense model has too.

        Args:
            name: Of the tensor.
            weight: The tensor.

        Raises:
            ValueError: The model has no such tensor, or it has another shape.
        """
        if name.endswith(_BUFFERS):
            return
        name = self._full_name(name)
        expected = self.shapes.get(name)
        if expected is None:
            raise ValueError(f"tensor {name!r} belongs to no {self.config['model_type']} model")
        if weight.shape != expected:
            raise ValueError(
                f"tensor {name!r} has shape {list(weight.shape)}, the config says {list(expected)}"
            )
        if name == "lm_head.weight" and self.config.get("tie_word_embeddings"):
            return  # as transformers does
        self._add(name, weight)

    def build(self, stated: Mapping[str, Any] | None = None, where: str = "") -> LowRankCheckpoint:
        """Finish.

        Args:
            stated: Rank by linear in the format's metadata, if it has that.
            where: Name of the metadata, for errors.

        Returns:
            The checkpoint.

        Raises:
            ValueError: Tensors are missing, the orientation of factors cannot be told, or a rank
                differs from the metadata (both are named).
        """
        common = set(_READINGS).intersection(*(pair.readings for pair in self._pairs.values()))
        for name, pair in self._pairs.items():
            if f"{name}.weight" in self._tensors:
                raise ValueError(f"the checkpoint has both '{name}.weight' and factors of it")
            fitting = common or pair.readings
            if _OWN in fitting:
                fitting = {_OWN}
            if len(fitting) > 1:
                shapes = f"{list(pair.first.shape)} and {list(pair.second.shape)}"
                weight = list(self.shapes[f"{name}.weight"])
                raise ValueError(
                    f"{name}: factors {shapes} fit in several ways to a weight {weight}"
                )
            self._add_pair(name, pair, next(iter(fitting)))
        if stated is not None:
            self._check_ranks(stated, where)
        missing = []
        for name in self.shapes:
            module, _, leaf = name.rpartition(".")
            stored = f"{module}.u.{leaf}" if module in self.ranks else name
            if stored not in self._tensors:
                missing.append(name)
        if self.config.get("tie_word_embeddings") and "lm_head.weight" in missing:
            missing.remove("lm_head.weight")
        if missing:
            raise ValueError(f"{len(missing)} tensors are missing, e.g. {missing[0]!r}")
        notes = [f"{_some(names)} {text}" for text, names in self._notes_by_kind.items()]
        return LowRankCheckpoint(
            config=self.config,
            tensors=self._tensors,
            ranks={name: self.ranks[name] for name in self.linears if name in self.ranks},
            origin=self._origin,
            save_side_files=self._save_side_files,
            notes=[*self.notes, *notes],
        )

    def _full_name(self, name: str) -> str:
        """The name of a parameter; old OPT checkpoints leave `model.` out."""
        full = f"model.{name}"
        return full if name not in self.shapes and full in self.shapes else name

    def _add_pair(self, name: str, pair: _Pair, reading: _Reading) -> None:
        v, u = reading.apply(pair.first, pair.second)
        total = self._total_bias(name, u, pair.bias, pair.first_bias)
        if name in self.linears:
            self.ranks[name] = v.shape[0]
            self._add(f"{name}.v.weight", v)
            self._add(f"{name}.u.weight", u)
            if total is not None:
                self._add(f"{name}.u.bias", total)
            return
        if name == "lm_head" and self.config.get("tie_word_embeddings"):
            raise ValueError("lm_head is decomposed although tie_word_embeddings is true")
        self._note("is decomposed, but the runtime needs it dense: multiplied", name)
        self._add(f"{name}.weight", product(u, v))
        if total is not None:
            self._add(f"{name}.bias", total)

    def _check_ranks(self, stated: Mapping[str, Any], where: str) -> None:
        for name in [*stated, *self.ranks]:
            found, said = self.ranks.get(name), stated.get(name)
            if len(self.shapes.get(f"{name}.weight", ())) != 2:
                raise ValueError(f"{where} names {name!r}, which is no linear of the model")
            if found != said and name in self.linears:
                raise ValueError(f"{where} says rank {said} for {name}, its tensors have {found}")

    def _total_bias(
        self,
        name: str,
        u: LazyTensor,
        bias: LazyTensor | None,
        first_bias: LazyTensor | None,
    ) -> LazyTensor | None:
        n, rank = u.shape
        if first_bias is not None and first_bias.shape == (rank,):
            bias = _fold(u, first_bias, bias)
            self._note("has a bias between its factors: u times it is added to the bias", name)
        elif first_bias is not None and first_bias.shape == (n,):
            bias = first_bias
            self._note("has its bias on the wrong factor: moved, and the other's dropped", name)
        elif first_bias is not None:
            raise ValueError(
                f"{name}: a bias {list(first_bias.shape)} fits neither {n} outputs nor rank {rank}"
            )
        if (bias is not None) != (f"{name}.bias" in self.shapes):
            there = "has a bias" if bias is not None else "has no bias"
            raise ValueError(f"{name} {there}, which the config contradicts")
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"{name}: bias {list(bias.shape)} does not fit {n} outputs")
        return bias

    def _add(self, name: str, tensor: LazyTensor) -> None:
        if name in self._tensors:
            raise ValueError(f"tensor {name!r} occurs twice")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}")
        self._tensors[name] = tensor

    def _note(self, text: str, name: str) -> None:
        self._notes_by_kind.setdefault(text, []).append(name)


def _readings(first: LazyTensor, second: LazyTensor, shape: tuple[int, ...]) -> set[_Reading]:
    """The ways in which two factors can be v [r, k] and u [n, r] of a weight (n, k)."""
    n, k = shape
    fitting = set()
    for reading in _READINGS:
        v, u = reading.apply(first, second)
        if v.shape[1] == k and u.shape[0] == n and v.shape[0] == u.shape[1] > 0:
            fitting.add(reading)
    return fitting


def _fold(u: LazyTensor, first_bias: LazyTensor, bias: LazyTensor | None) -> LazyTensor:
    """Bias + u first_bias, [n]."""

    def load() -> torch.Tensor:
        total = u.load().float() @ first_bias.load().float()
        if bias is not None:
            total += bias.load().float()
        return total.to(u.dtype)

    return LazyTensor((u.shape[0],), u.dtype, load)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more:"

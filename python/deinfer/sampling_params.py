"""`SamplingParams`: the native parameters plus those that only text needs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deinfer import _C

_TEXT_FIELDS = ("stop", "include_stop_str_in_output", "skip_special_tokens", "detokenize")


def field_names(native: type) -> list[str]:
    """List the fields of a native struct.

    Args:
        native: A class of `deinfer._C` that holds only fields.

    Returns:
        Their names in order of declaration.
    """
    return [name for name, value in vars(native).items() if isinstance(value, property)]


def assign_fields(target: object, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Set fields of a native struct, with errors that name the field and its value.

    Args:
        target: Native struct, or a Python subclass of one.
        values: New values by field name.
        names: The names that are allowed.

    Raises:
        TypeError: A name is unknown, or a value is of another type than the field.
        ValueError: A value of the right type does not fit into the field.
    """
    known = list(names)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unexpected keyword argument {name!r}{hint}")
        default = getattr(target, name)
        try:
            setattr(target, name, value)
        except (TypeError, OverflowError):
            # pybind11 reports a number out of a C++ type's range as a type error, too.
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not isinstance(default, str):
                raise ValueError(f"{name} = {value!r} is out of range") from None
            raise TypeError(
                f"{name} = {value!r} is a {type(value).__name__}; "
                f"a value like {default!r} is expected"
            ) from None


class SamplingParams(_C.SamplingParams):
    """How the tokens of a request are chosen; names and defaults as in vLLM.

    Args:
        n: Independent samples of one prompt, >= 1.
        max_tokens: Generated tokens, >= 1; None: until the context is full.
        min_tokens: No stop token or stop string before so many generated tokens.
        temperature: >= 0; 0 selects greedy decoding.
        top_p: In (0, 1]: the smallest set of tokens with this probability.
        top_k: >= 1 keeps the k most likely tokens; 0 and -1 keep all.
        min_p: In [0, 1]: drops tokens below min_p x the largest probability.
        repetition_penalty: > 0; divides positive logits of seen tokens.
        presence_penalty: In [-2, 2]; subtracted once from generated tokens.
        frequency_penalty: In [-2, 2]; subtracted per occurrence.
        seed: None: derived from the engine's seed and the number of the request.
        stop: Strings that end a sample; matched on its text, also across tokens.
        stop_token_ids: Tokens that end a sample, besides the model's end-of-sequence tokens.
        include_stop_str_in_output: Keep the stop string, or the text of the stop token.
        ignore_eos: Do not stop at the model's end-of-sequence tokens.
        logprobs: >= 0: report the chosen token and the k most likely.
        prompt_logprobs: The same for every prompt token but the first.
        prompt_logits: Return fp32 logits of all prompt positions (see `LLM.prompt_logits`).
        skip_special_tokens: Leave special tokens out of the text.
        detokenize: Make text at all; False saves its time.
        priority: Higher runs earlier.
        expected_tokens: > 0: a guess at the length of the answer, which scheduling prefers to any
            prediction; None: no guess.

    Raises:
        ValueError: A value is out of range; the message names the field and the value.
        TypeError: A value is of another type, or the keyword is unknown.
    """

    stop: list[str]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    detokenize: bool

    def __init__(
        self,
        *,
        n: int = 1,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        include_stop_str_in_output: bool = False,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        prompt_logits: bool = False,
        skip_special_tokens: bool = True,
        detokenize: bool = True,
        priority: int = 0,
        expected_tokens: float | None = None,
    ) -> None:
        """Check and store the parameters; see the class."""
        super().__init__()
        native = {
            "n": n,
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "seed": seed,
            "stop_token_ids": [] if stop_token_ids is None else list(stop_token_ids),
            "ignore_eos": ignore_eos,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
            "prompt_logits": prompt_logits,
            "priority": priority,
            "expected_tokens": expected_tokens,
        }
        assign_fields(self, native, native)
        self.stop = [stop] if isinstance(stop, str) else list(stop or [])
        self.include_stop_str_in_output = include_stop_str_in_output
        self.skip_special_tokens = skip_special_tokens
        self.detokenize = detokenize
        self.validate()

    def validate(self) -> None:
        """Check all fields, as after changing one.

        Raises:
            ValueError: A value is out of range.
            TypeError: `stop` holds something other than strings.
        """
        super().validate()
        for text in self.stop:
            if not isinstance(text, str):
                raise TypeError(f"stop = {self.stop!r} holds {text!r}, which is not a string")
            if not text:
                raise ValueError(f"stop = {self.stop!r} holds an empty string")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop = {self.stop!r} needs detokenize=True")

    def clone(self) -> SamplingParams:
        """Return an independent copy."""
        return SamplingParams(**self._values())

    def _values(self) -> dict[str, Any]:
        """All fields by the name of their keyword."""
        names = [*field_names(_C.SamplingParams), *_TEXT_FIELDS]
        return {name: getattr(self, name) for name in names}

    def __eq__(self, other: object) -> bool:
        """Compare all fields."""
        if not isinstance(other, SamplingParams):
            return NotImplemented
        return self._values() == other._values()

    # Mutable, so not hashable, as any class that defines equality alone.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Show the fields that differ from their defaults."""
        default = SamplingParams()._values()
        changed = {k: v for k, v in self._values().items() if v != default[k]}
        shown = (f"{k}={_show(v)}" for k, v in changed.items())
        return f"SamplingParams({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Support copy and pickle, which native classes do not on their own."""
        return _rebuild, (self._values(),)


def _show(value: object) -> str:
    # Fields are fp32: 0.7 would show as 0.699999988079071.
    return f"{value:.7g}" if isinstance(value, float) else repr(value)


def _rebuild(values: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**values)

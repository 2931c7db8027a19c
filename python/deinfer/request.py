"""Prompts in, and the state of a request while the engine works on it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from deinfer import _C
from deinfer.outputs import CompletionOutput, FinishReason, HiddenStates, Logprob, RequestOutput
from deinfer.sampling_params import SamplingParams
from deinfer.tokenizer import IncrementalDetokenizer, decode, find_stop, held_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SinglePrompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
Conversation = Sequence[Message]
_PROMPT_KEYS = ("prompt", "prompt_token_ids")


@dataclass(slots=True)
class Prompt:
    """A prompt as text, as tokens, or both.

    Attributes:
        text: What the user or the chat template wrote.
        token_ids: None until the text is tokenized.
        special_tokens: Whether the tokenizer adds its own (not to a chat template's text).
        question: The last message's text, where a chat template has been put around it.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    special_tokens: bool = True
    question: str | None = None


def parse_prompts(prompts: SinglePrompt | Sequence[SinglePrompt]) -> list[Prompt]:
    """Bring all accepted forms of prompts into one.

    Args:
        prompts: One prompt or a sequence of prompts. A prompt is a text, a sequence of token ids,
            {"prompt": text} or {"prompt_token_ids": ids}.

    Returns:
        The prompts in order.

    Raises:
        TypeError: Something is of none of these types.
        ValueError: A mapping has other keys, or a token id is out of range.
    """
    if isinstance(prompts, str | Mapping) or _is_token_ids(prompts):
        return [_parse_prompt(cast(SinglePrompt, prompts))]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts is a {type(prompts).__name__}, not a prompt or a list of prompts")
    return [_parse_prompt(cast(SinglePrompt, prompt)) for prompt in prompts]


def is_conversation(value: object) -> bool:
    """Tell a conversation, a sequence of messages, from a prompt and from several of them."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not is_list:
        return False
    first = cast(Sequence[object], value)[0]
    return isinstance(first, Mapping) and ("role" in first or "content" in first)


def _is_token_ids(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return is_list and isinstance(cast(Sequence[object], value)[0], int | np.integer)


def _parse_prompt(prompt: SinglePrompt) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if isinstance(prompt, Mapping):
        if not prompt or not set(prompt) <= set(_PROMPT_KEYS):
            raise ValueError(f"prompt has the keys {list(prompt)}; known are {list(_PROMPT_KEYS)}")
        text, token_ids = (prompt.get(key) for key in _PROMPT_KEYS)
        if not isinstance(text, str | None):
            raise TypeError(f"prompt {text!r} is not a string")
        if token_ids is None and text is None:
            raise ValueError("prompt and prompt_token_ids are both None")
        return Prompt(text, None if token_ids is None else _token_ids(token_ids))
    return Prompt(token_ids=_token_ids(prompt))


def _token_ids(values: Sequence[int]) -> list[int]:
    try:
        token_ids = [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"prompt {values!r} is neither text nor a list of token ids") from None
    for token_id in token_ids:
        if not 0 <= token_id < 2**31:
            raise ValueError(f"token id {token_id} is outside the vocabulary")
    return token_ids


class Sample:
    """One sample of a request, growing step by step.

    Args:
        index: Of the sample.
        params: The request's parameters; what is needed is copied.
        tokenizer: Makes the text; None: there is none.
        num_state_layers: Layers of its hidden states, where they are asked for.
    """

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        tokenizer: PreTrainedTokenizerBase | None,
        num_state_layers: int = 0,
    ) -> None:
        """Start empty; see the class."""
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
            if tokenizer is not None and params.detokenize
            else None
        )
        self._stops = list(params.stop)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self._state_positions: list[int] = []
        self._states: list[NDArray[np.float32]] = []  # as the engine gives them
        self._state_layers = num_state_layers
        self._stop_reason: int | str | None = None
        self._text = ""
        self._sent_tokens = 0
        self._sent_text = 0

    def update(self, output: _C.SequenceOutput) -> bool:
        """Take in what the engine made in one step.

        Args:
            output: The new tokens.

        Returns:
            Whether a stop string has ended the sample, so that the engine must be told.
        """
        if self.finish_reason is not None:
            return False  # the engine's confirmation that it has dropped the sample
        if output.hidden_states is not None:
            self._state_positions.append(output.hidden_states_position)
            self._states.append(output.hidden_states)
        for i, token_id in enumerate(output.new_token_ids):
            self.token_ids.append(token_id)
            if self._logprobs is not None:
                self._logprobs.append(convert_logprobs(output.logprobs[i], self._tokenizer))
                self._cumulative_logprob += output.logprobs[i][0].logprob
            stopped = output.finish_reason == "stop" and i == len(output.new_token_ids) - 1
            if self._detokenizer is None or (stopped and not self._include_stop):
                continue
            if self._extend(self._detokenizer.push(token_id)):
                return output.finish_reason is None
        if output.finish_reason is not None:
            self._finish(output)
        return False

    def _finish(self, output: _C.SequenceOutput) -> None:
        if self._detokenizer is not None and self._extend(self._detokenizer.finish()):
            return  # what was held back ends in a stop string
        self.finish_reason = cast(FinishReason, output.finish_reason)
        if output.stop_token_id in self._stop_token_ids:
            self._stop_reason = output.stop_token_id

    def _extend(self, new: str) -> bool:
        """Take over the new text; True if it completes a stop string, which ends the sample."""
        if self._detokenizer is not None:
            self._text = self._detokenizer.text
        if not new or not self._stops or len(self.token_ids) <= self._min_tokens:
            return False
        found = find_stop(self._text, len(self._text) - len(new), self._stops)
        if found is None:
            return False
        at, stop = found
        self._text = self._text[: at + len(stop) if self._include_stop else at]
        self.finish_reason, self._stop_reason = "stop", stop
        return True

    def _hidden_states(self) -> HiddenStates | None:
        if not self._states:
            return None
        both = np.stack(self._states).reshape(len(self._states), 2, self._state_layers, -1)
        return HiddenStates(list(self._state_positions), both[:, 0], both[:, 1])

    def output(self, *, delta: bool = False) -> CompletionOutput:
        """Describe the sample.

        Args:
            delta: Only what is new since the last call with `delta=True`.

        Returns:
            An independent snapshot. While the sample runs, its text lacks what may turn out to be
            the beginning of a stop string.
        """
        end = len(self._text)
        if self.finish_reason is None:
            end -= held_length(self._text, self._stops)
        first_token, first_text = (self._sent_tokens, self._sent_text) if delta else (0, 0)
        if delta:
            self._sent_tokens, self._sent_text = len(self.token_ids), end
        has_logprobs = self._logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self._text[first_text:end],
            token_ids=self.token_ids[first_token:],
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
            logprobs=None if self._logprobs is None else self._logprobs[first_token:],
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            hidden_states=self._hidden_states(),
        )


class Request:
    """A submitted prompt with its samples.

    Args:
        request_id: The engine's number.
        prompt: With token ids.
        params: Its parameters.
        tokenizer: Makes text; None: there is none.
        num_state_layers: Layers of its hidden states, where they are asked for.
    """

    def __init__(
        self,
        request_id: int,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: PreTrainedTokenizerBase | None,
        num_state_layers: int = 0,
    ) -> None:
        """Start without output; see the class."""
        self.request_id = request_id
        self.generated_tokens = 0
        self._prompt = prompt
        self._samples = [
            Sample(index, params, tokenizer, num_state_layers) for index in range(params.n)
        ]
        self._tokenizer = tokenizer if params.detokenize else None
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self._prompt_logits: NDArray[np.float32] | None = None

    @property
    def finished(self) -> bool:
        """All samples have ended."""
        return all(sample.finish_reason is not None for sample in self._samples)

    def update(self, output: _C.RequestOutput) -> list[int]:
        """Take in what the engine made in one step.

        Args:
            output: The engine's report on this request.

        Returns:
            Indices of the samples that a stop string has ended and the engine must drop.
        """
        if self._prompt_logprobs is not None:
            self._prompt_logprobs += [
                convert_logprobs(entry, self._tokenizer) for entry in output.prompt_logprobs
            ]
        if output.prompt_logits is not None:
            self._prompt_logits = output.prompt_logits
        ended = []
        for sequence in output.outputs:
            sample = self._samples[sequence.index]
            before = len(sample.token_ids)
            if sample.update(sequence):
                ended.append(sequence.index)
            self.generated_tokens += len(sample.token_ids) - before
        return ended

    def output(self, *, delta: bool = False) -> RequestOutput:
        """Describe the request.

        Args:
            delta: Only what is new since the last call with `delta=True`.

        Returns:
            An independent snapshot.
        """
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt.text,
            prompt_token_ids=list(self._prompt.token_ids or []),
            prompt_logprobs=None if self._prompt_logprobs is None else list(self._prompt_logprobs),
            outputs=[sample.output(delta=delta) for sample in self._samples],
            finished=self.finished,
            prompt_logits=self._prompt_logits,
        )


def convert_logprobs(
    entries: Sequence[_C.TokenLogprob], tokenizer: PreTrainedTokenizerBase | None
) -> dict[int, Logprob]:
    """Convert the engine's report on one position.

    Args:
        entries: The chosen token, then the most likely ones.
        tokenizer: Decodes each token alone; None: leave that out.

    Returns:
        Candidates by token id, the chosen one first.
    """
    return {
        entry.token: Logprob(
            entry.logprob,
            entry.rank,
            None
            if tokenizer is None
            else decode(tokenizer, [entry.token], skip_special_tokens=False),
        )
        for entry in entries
    }

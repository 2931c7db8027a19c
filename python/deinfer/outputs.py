"""What generation returns; names and meanings as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate of a position.

    Attributes:
        logprob: Natural logarithm of the model's own probability, before penalties, temperature
            and truncation.
        rank: 1 is the most likely token of the vocabulary.
        decoded_token: The token alone as text; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The model's hidden states along one sample, of the layers in `hidden_state_layers`.

    Attributes:
        positions: Generated tokens up to each report, [reports]; the first is 0, the prompt's last
            token.
        states: Of the newest token at each position, float32 [reports, layers, hidden].
        means: Means of the states of the prompt's last and all generated tokens up to each
            position, of the same shape.
    """

    positions: list[int]
    states: NDArray[np.float32]
    means: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a request.

    Attributes:
        index: Of the sample, in [0, n).
        text: Generated text without the token or string that stopped it; "" without a tokenizer
            or with `detokenize=False`.
        token_ids: Generated tokens, the one that stopped the sample included.
        cumulative_logprob: Sum over the generated tokens; None unless `logprobs` was asked for.
        logprobs: For each generated token, candidates by token id; None unless asked for.
        finish_reason: "stop", "length", "abort", or None while the sample runs.
        stop_reason: The stop string or the entry of `stop_token_ids` that ended the sample; None
            when it ended at the model's own end-of-sequence token or did not stop.
        hidden_states: Those so far; None unless asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    hidden_states: HiddenStates | None = field(default=None, compare=False, repr=False)

    def finished(self) -> bool:
        """Tell whether the sample has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its samples.

    Attributes:
        request_id: The engine's number of the request.
        prompt: Text of the prompt; None when it was given as token ids.
        prompt_token_ids: Tokens of the prompt.
        prompt_logprobs: For each prompt token, candidates by token id, with None for the first
            token, which nothing predicts; None unless `prompt_logprobs` was asked for.
        outputs: Samples, in the order of their index.
        finished: All samples have ended.
        prompt_logits: float32 [prompt length, vocabulary]; None unless asked for.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logits: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

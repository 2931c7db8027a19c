"""What recovery trains on: sequences with the dense model's last states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deinfer.decompose.calibration import RuntimeText, sample_mix
from deinfer.decompose.streaming import StreamedModel


@dataclass(frozen=True)
class Example:
    """A sequence, and what its last positions are in the dense model.

    Attributes:
        ids: Token ids.
        states: What the dense model's head is given at the last len(states) of them, that is
            after the final norm [positions, hidden].
    """

    ids: Sequence[int]
    states: Tensor

    def __len__(self) -> int:
        """Tokens."""
        return len(self.ids)

    def __getitem__(self, part: slice) -> Example:
        """Take the first tokens, with the states of those."""
        ids = self.ids[part]
        states = len(self.states) - (len(self.ids) - len(ids))
        return Example(ids, self.states[: max(states, 0)])


class ExampleSampler(RuntimeText[Example]):
    """Samples text with the native runtime, which tells the states that it has meanwhile.

    Prompts have no states but for the last token, from which the first of the answer follows.

    Args:
        model: Checkpoint directory of the dense model.
        layers: Blocks of the model.
        seed: Seed of the first prompt.
    """

    def __init__(self, model: Path, layers: int, *, seed: int) -> None:
        """Load the model."""
        super().__init__(
            model,
            seed=seed,
            engine={"hidden_state_layers": [layers]},
            sampling={"hidden_states": 1, "detokenize": False},
        )

    def sample(self, tokens: int, seed: int) -> list[Example]:
        """Sample about `tokens` tokens from prompts in the order of `seed`; see `sample_mix`."""
        return sample_mix(self, self.continue_text, tokens, seed)

    def _made(self, output: Any) -> Example:
        made = output.outputs[0]
        states = torch.from_numpy(made.hidden_states.states[:, 0])
        # What follows the last token is not asked, so it has not run.
        ids = [*output.prompt_token_ids, *made.token_ids[: len(states) - 1]]
        return Example(ids, states)


def run_examples(model: StreamedModel, sequences: Sequence[Sequence[int]]) -> list[Example]:
    """Run the dense model over sequences, for states at all of their positions."""
    streams = model.run(model.embed_all(sequences))
    return end_examples(model, sequences, streams)


def end_examples(
    model: StreamedModel, sequences: Sequence[Sequence[int]], streams: Sequence[Tensor]
) -> list[Example]:
    """Make examples of the residual streams [tokens, hidden] after the last block."""
    return [
        Example(ids, model.states(stream)) for ids, stream in zip(sequences, streams, strict=True)
    ]

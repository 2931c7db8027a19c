"""Token sequences to calibrate on: sampled from the model itself, or read from a text.

Text that the model samples follows the distribution it was trained on, chat template included, and
makes the gradient moments those of the true Fisher information rather than of some other text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from deinfer.decompose.texts import SEQUENCE_TOKENS

Sampler = Callable[[list[str]], list[list[int]]]
"""Takes user prompts, returns one full token sequence each: chat prompt and sampled answer."""

_ANSWER_TOKENS = 160  # shorter answers leave room for more prompts
_PROSE_TOKENS = 256
_TYPICAL_TOKENS = 180  # of a prompt and its answer, to guess how many are needed
_PLAIN_SHARE = 0.5  # of the tokens; plain prose needs its share or its perplexity suffers


@runtime_checkable
class PlainSampler(Protocol):
    """A sampler that can also continue plain text, without a chat template."""

    def __call__(self, prompts: list[str]) -> list[list[int]]:
        """See `Sampler`."""

    def continue_text(self, openers: list[str]) -> list[list[int]]:
        """Return the tokens of each opener followed by a sampled continuation."""


class Cuttable(Protocol):
    """Something with a length in tokens, of which slices take the first."""

    def __len__(self) -> int:
        """Tokens."""

    def __getitem__(self, part: slice, /) -> Any:
        """Take the first tokens, the same kind of thing."""


T = TypeVar("T", bound=Cuttable)


@dataclass(frozen=True)
class Calibration:
    """Calibration sequences.

    Attributes:
        sequences: Token ids, at most `SEQUENCE_TOKENS` each.
        source: What they are, for the checkpoint's config: "self-sampled" or the file's name.
    """

    sequences: list[list[int]]
    source: str

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(len(s) for s in self.sequences)


class RuntimeText(Generic[T]):
    """Text that the native runtime samples, `deinfer.LLM`; what is made of it, subclasses say.

    Args:
        model: Checkpoint directory of the dense model.
        seed: Seed of the first prompt; each further prompt and call gets another one.
        progress: Show progress bars.
        engine: Further arguments of `deinfer.LLM`.
        sampling: Further arguments of `deinfer.SamplingParams`.
    """

    def __init__(
        self,
        model: Path,
        *,
        seed: int = 0,
        progress: bool = False,
        engine: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the model."""
        import deinfer

        # The package exports LLM lazily, which a type checker cannot see from here.
        runtime: Any = deinfer
        self._llm = runtime.LLM(str(model), use_tqdm_on_load=progress, **(engine or {}))
        self._params = partial(runtime.SamplingParams, **(sampling or {}))
        self._seed = seed
        self._progress = progress

    def __call__(self, prompts: list[str]) -> list[T]:
        """Answer user prompts; see `Sampler`."""
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        params = self._sampling(len(prompts), _ANSWER_TOKENS, [(0.7, 1.0), (1.0, 0.9)])
        outputs = self._llm.chat(conversations, params, use_tqdm=self._progress)
        return [self._made(output) for output in outputs]

    def continue_text(self, openers: list[str]) -> list[T]:
        """Continue plain text; see `PlainSampler`."""
        # At T = 1 the text is the model's true distribution: cooler samples made prose worse.
        params = self._sampling(len(openers), _PROSE_TOKENS, [(1.0, 1.0)])
        outputs = self._llm.generate(openers, params, use_tqdm=self._progress)
        return [self._made(output) for output in outputs]

    def _made(self, output: Any) -> T:
        """Make what is wanted of a request's output."""
        raise NotImplementedError

    def _sampling(self, count: int, max_tokens: int, kinds: list[tuple[float, float]]) -> list[Any]:
        """Parameters for `count` requests that take turns at (temperature, top_p)."""
        params = [
            self._params(
                temperature=kinds[i % len(kinds)][0],
                top_p=kinds[i % len(kinds)][1],
                max_tokens=max_tokens,
                seed=self._seed + i,
            )
            for i in range(count)
        ]
        self._seed += count
        return params


class RuntimeSampler(RuntimeText[list[int]]):
    """A `PlainSampler`: token ids of prompts and answers."""

    def _made(self, output: Any) -> list[int]:
        return [*output.prompt_token_ids, *output.outputs[0].token_ids]


def packaged_lines(name: str) -> list[str]:
    """Read the non-empty lines of a file in `deinfer/data`.

    Args:
        name: File name, e.g. `calibration_prompts.txt`.

    Returns:
        The lines, stripped.
    """
    text = (resources.files("deinfer") / "data" / name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def sample_calibration(sampler: Sampler, tokens: int, seed: int = 0) -> Calibration:
    """Let the model write its own calibration data.

    Answers to the packaged prompts and, if the sampler can do it, continuations of the packaged
    openers of plain prose, half of the tokens each.

    Args:
        sampler: Produces the sequences.
        tokens: Tokens wanted; reached as closely as whole sequences and their cut allow.
        seed: Order of the prompts.

    Returns:
        Between about 0.9 and 1 times `tokens` tokens.

    Raises:
        ValueError: `tokens` is too small, or the sampler's answers are malformed or too short.
    """
    plain = sampler.continue_text if isinstance(sampler, PlainSampler) else None
    return Calibration(sample_mix(sampler, plain, tokens, seed), "self-sampled")


def sample_mix(
    answer: Callable[[list[str]], list[T]],
    continue_text: Callable[[list[str]], list[T]] | None,
    tokens: int,
    seed: int,
) -> list[T]:
    """Sample answers and, where that is possible, as much plain prose; see `sample_calibration`.

    Args:
        answer: Answers user prompts.
        continue_text: Continues openers of plain prose.
        tokens: Tokens wanted.
        seed: Order of the prompts.

    Returns:
        Sequences of at most `SEQUENCE_TOKENS`.

    Raises:
        ValueError: `tokens` is too small, or the answers are malformed or too short.
    """
    if tokens < 2:
        raise ValueError(f"calibration_tokens {tokens} is too small")
    wanted = int(tokens * _PLAIN_SHARE) if continue_text is not None else 0
    sequences = _sample(answer, "calibration_prompts.txt", tokens - wanted, seed)
    if continue_text is not None and wanted >= 2:
        sequences += _sample(continue_text, "calibration_openers.txt", wanted, seed)
    return sequences


def _sample(sampler: Callable[[list[str]], list[T]], file: str, tokens: int, seed: int) -> list[T]:
    """Sample from a shuffled list of prompts, again and again until there are enough tokens."""
    prompts = packaged_lines(file)
    random.Random(seed).shuffle(prompts)
    kept: list[T] = []
    rest = tokens
    while rest >= 2:
        batch = prompts[: max(8, rest // _TYPICAL_TOKENS)]
        prompts = prompts[len(batch) :] + batch
        answers = sampler(batch)
        if len(answers) != len(batch):
            raise ValueError(f"the sampler gave {len(answers)} answers to {len(batch)} prompts")
        usable = [a[:SEQUENCE_TOKENS] for a in answers if len(a) >= 2]
        if not usable:
            raise ValueError(f"the sampler gave no answer of 2 tokens to {len(batch)} prompts")
        for answer in usable:
            if rest >= 2:
                kept.append(answer[:rest])
                rest -= len(kept[-1])
    return kept

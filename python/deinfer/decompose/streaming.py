"""A transformers model of which one block at a time is in memory.

transformers builds the model without weights. Its own forward pass, with blocks that only take
note of how they are called, says what embeddings go in, with which masks and positions each block
runs, and what the head makes of the last block's output; so nothing here knows an architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deinfer.architectures import ARCHITECTURES, attention_implementation
from deinfer.decompose.source import SourceCheckpoint

Change = Callable[[int, nn.Module], None]
"""Changes a block, whose index it is given, in place."""


@dataclass
class _Pass:
    """One forward pass through blocks that do nothing.

    Attributes:
        last_output: What the last block returns; None passes its input on.
        first_input: What the first block got.
        states: What the head gets.
        arguments: Keyword arguments of every block.
    """

    last_output: Tensor | None
    first_input: Tensor | None = None
    states: Tensor | None = None
    arguments: list[dict[str, Any]] | None = None


class StreamedModel:
    """Runs a checkpoint block by block.

    Args:
        source: Dense checkpoint of a supported architecture.
        dtype: Dtype to compute in.

    Attributes:
        dtype: The same.
        hidden_size: Width of the residual stream.
        linears: Names of the linears within a block.
        prefixes: Module name of each block, with a dot at the end.

    Raises:
        ValueError: A tensor is missing.
    """

    def __init__(self, source: SourceCheckpoint, dtype: torch.dtype) -> None:
        """Build the model without weights, and load those outside of the blocks but the largest."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self._source, self.dtype = source, dtype
        config = AutoConfig.from_pretrained(str(source.path))
        architecture = ARCHITECTURES[config.model_type]
        with init_empty_weights(include_buffers=False):
            self._model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention_implementation(config)
            ).eval()
        self._model.requires_grad_(False)
        layers: Any = self._model.get_submodule(architecture.layers)
        # Blocks with weights are copies of these, which never get any.
        self._layers: list[nn.Module] = list(layers)
        self.prefixes = [f"{architecture.layers}.{i}." for i in range(len(self._layers))]
        self.linears = architecture.linears
        self.hidden_size = int(config.hidden_size)
        self._pass: _Pass | None = None
        self._calls: dict[int, list[dict[str, Any]]] = {}
        for index, layer in enumerate(self._layers):
            layer.forward = self._recorder(index)
        embedding = self._model.get_input_embeddings()
        self._ends = [embedding, self._model.get_output_embeddings()]
        self._embedded_size = int(embedding.embedding_dim)
        names = {id(m): n for n, m in self._model.named_modules()}
        self._end_names = [f"{names[id(m)]}.weight" for m in self._ends]
        inside = f"{architecture.layers}."
        others = [
            n
            for n, _ in self._model.named_parameters()
            if not n.startswith(inside) and n not in self._end_names
        ]
        self._assign(self._model, others, "")

    def embed_all(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Compute what the first block gets of several sequences; see `embed`."""
        with self.ends(), torch.no_grad():
            return [self.embed(sequence) for sequence in sequences]

    @contextmanager
    def ends(self) -> Iterator[None]:
        """Hold the embedding and the output head in memory; within another `ends`, go on to."""
        if not self._ends[0].weight.is_meta:
            yield
            return
        tied = bool(self._model.config.tie_word_embeddings)
        self._assign(self._model, self._end_names[:1] if tied else self._end_names, "")
        if tied:
            self._ends[1].weight = self._ends[0].weight
        try:
            yield
        finally:
            for end in self._ends:
                end.weight = nn.Parameter(end.weight.to("meta"), requires_grad=False)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Compute what the first block gets; within `ends`.

        Args:
            ids: Tokens of one sequence.

        Returns:
            The residual stream [tokens, hidden].
        """
        made = self._run(None, input_ids=torch.tensor([list(ids)]))
        assert made.first_input is not None
        return made.first_input[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the final norm and the head; within `ends`.

        Args:
            hidden: Residual stream [tokens, hidden] after the last block; may require gradients.

        Returns:
            Logits [tokens, vocabulary].
        """
        outputs: list[Tensor] = []
        self._run(hidden[None], outputs)
        return outputs[0][0]

    def states(self, hidden: Tensor) -> Tensor:
        """Apply the final norm, and what else a model does before its head.

        Args:
            hidden: Residual stream [tokens, hidden] after the last block.

        Returns:
            What the head is given [tokens, hidden], without gradients.
        """
        made = self._run(hidden[None])
        assert made.states is not None
        return made.states[0]

    def head(self, states: Tensor) -> Tensor:
        """Apply the head to what `states` gives; within `ends`.

        Args:
            states: [tokens, hidden].

        Returns:
            Logits [tokens, vocabulary], before a soft cap.
        """
        logits: Tensor = self._ends[1](states.to(self.dtype))
        return logits

    def run(self, streams: Sequence[Tensor], change: Change | None = None) -> list[Tensor]:
        """Run all blocks on several sequences, without gradients.

        Args:
            streams: What `embed` gives for each, [tokens, hidden]; held in memory.
            change: What is done to a block before it runs.

        Returns:
            The residual streams after the last block.
        """
        streams = list(streams)
        with torch.no_grad():
            for index in range(len(self.prefixes)):
                block = self.block(index)
                if change is not None:
                    change(index, block)
                streams = [self.call(index, block, x) for x in streams]
        return streams

    def block(self, index: int) -> nn.Module:
        """Load a block.

        Args:
            index: 0 is the first.

        Returns:
            transformers' decoder layer with weights of its own, without gradients.

        Raises:
            ValueError: A tensor is missing or has a value that is not finite.
        """
        block: nn.Module = copy.deepcopy(self._layers[index])
        del block.forward  # the recorder; the class has the real one
        self._assign(block, [n for n, _ in block.named_parameters()], self.prefixes[index])
        return block

    def call(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block on one sequence, as the model would.

        Args:
            index: Which block it is.
            block: Module like that of `block`.
            hidden: Residual stream [tokens, hidden] before it.

        Returns:
            The residual stream [tokens, hidden] after it.
        """
        result: Tensor = block(hidden[None], **self._arguments(len(hidden))[index])
        return result[0]

    def _arguments(self, length: int) -> list[dict[str, Any]]:
        """Arguments of every block for a sequence of `length` tokens."""
        if length not in self._calls:
            if len(self._calls) >= 32:  # lengths vary; masks of all of them would add up
                self._calls.pop(next(iter(self._calls)))
            made = self._run(None, embed=torch.zeros(1, length, self._embedded_size))
            assert made.arguments is not None
            self._calls[length] = made.arguments
        return self._calls[length]

    def _assign(self, module: nn.Module, names: list[str], prefix: str) -> None:
        """Load parameters of a module that stand in the checkpoint as prefix + name."""
        tensors = self._source.read(prefix + name for name in names)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            parent: Any = module.get_submodule(owner)
            value, old = tensors[prefix + name].to(self.dtype), getattr(parent, leaf)
            if value.shape != old.shape:
                raise ValueError(
                    f"tensor {prefix + name!r} has shape {tuple(value.shape)}, "
                    f"config.json asks for {tuple(old.shape)}"
                )
            setattr(parent, leaf, nn.Parameter(value, requires_grad=False))

    def _recorder(self, index: int) -> Callable[..., Tensor]:
        last = index == len(self._layers) - 1

        def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
            made = self._pass
            assert made is not None and made.arguments is not None
            if index == 0:
                made.first_input = hidden_states.detach()
            made.arguments.append(arguments)
            if last and made.last_output is not None:
                return made.last_output
            return hidden_states

        return forward

    def _run(
        self,
        last_output: Tensor | None,
        logits: list[Tensor] | None = None,
        *,
        input_ids: Tensor | None = None,
        embed: Tensor | None = None,
    ) -> _Pass:
        self._pass = made = _Pass(last_output, arguments=[])
        if input_ids is None and embed is None:
            assert last_output is not None
            embed = torch.zeros(*last_output.shape[:2], self._embedded_size)
        given: dict[str, Any] = {"use_cache": False}
        if input_ids is not None:
            given["input_ids"] = input_ids
        if embed is not None:
            given["inputs_embeds"] = embed.to(self.dtype)
        try:
            if logits is None:
                with torch.no_grad():
                    made.states = self._model.get_decoder()(**given).last_hidden_state
            else:
                logits.append(self._model(**given).logits)
        finally:
            self._pass = None
        return made


def bf16_is_native() -> bool:
    """Whether the CPU multiplies bf16."""
    native: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(native())


def compute_dtype(source: SourceCheckpoint, names: Sequence[str]) -> torch.dtype:
    """Choose the dtype to compute in.

    bf16 halves time and memory where the CPU multiplies it natively, and is far slower elsewhere;
    weights that are stored in another dtype would be rounded.

    Args:
        source: The checkpoint.
        names: Modules that will be decomposed.

    Returns:
        bfloat16 or float32.
    """
    stored = {source.entry(f"{name}.weight").dtype for name in names}
    return torch.bfloat16 if bf16_is_native() and stored == {torch.bfloat16} else torch.float32

"""`LLM`: load a model and generate; vLLM's offline interface."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from deinfer import _C
from deinfer.outputs import RequestOutput
from deinfer.perception import Belief
from deinfer.perception.beliefs import Beliefs
from deinfer.progress import progress_bar, report_to
from deinfer.request import (
    Conversation,
    Prompt,
    Request,
    SinglePrompt,
    is_conversation,
    parse_prompts,
)
from deinfer.sampling_params import SamplingParams, assign_fields, field_names, params_for
from deinfer.tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LLM:
    """A model that is loaded and ready to generate.

    Any number of LLMs work in one process, and one LLM may be used from several threads: a thread
    that steps the engine serves the requests of all.

    Args:
        model: Directory with config.json and *.safetensors, plain or decomposed.
        tokenizer: Directory of another tokenizer, or a loaded Hugging Face tokenizer. None: the
            model's own, loaded when text is first needed; token ids need none.
        use_tqdm_on_load: Show a progress bar while weights load (on a terminal).
        length_predictor: How to foresee the length of answers, for the scheduler: a name of
            `deinfer.perception.PREDICTORS`, the path of an artifact's JSON file, or several of
            these.
        **engine_args: Fields of the engine's configuration: `device`, `dtype`,
            `weight_compression`, `tensor_parallel_size`, `tensor_parallel_plan`, `emulated_link`,
            `exchange_chunks`, `num_threads`, `max_model_len`, `max_num_seqs`,
            `max_num_batched_tokens`, `block_size`, `num_kv_blocks`, `kv_cache_bytes`,
            `kv_cache`, `kv_latents`, `scheduling_policy`, `admission`, `safety`, `kv_watermark`,
            `max_pause`, `preempt_limit`, `promote_after`, `promote_per_token`, `bucket_width`,
            `static_group`, `static_batch_size`, `bucket_batch_sizes`, `recompute`,
            `enable_prefix_caching`, `hidden_state_layers` (whose states
            `SamplingParams(hidden_states=...)` reports, numbered as transformers does), `seed`.

    Raises:
        TypeError: An engine argument is unknown or of another type.
        ValueError: A value is bad (the message names it), or the checkpoint is malformed.
        NotImplementedError: The model's architecture or the device is not supported.
        MemoryError: Weights or KV cache do not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        use_tqdm_on_load: bool = True,
        length_predictor: str | Sequence[str] = "",
        **engine_args: Any,
    ) -> None:
        """Load the model; see the class."""
        self._beliefs = Beliefs(length_predictor, Path(model))
        config = _C.EngineConfig(model=str(model))
        config.length_predictor = self._beliefs.engine_head
        own = ("model", "length_predictor")
        names = [name for name in field_names(_C.EngineConfig) if name not in own]
        assign_fields(config, engine_args, names)
        self._lock = threading.RLock()  # guards the engine's step and the table of requests
        self._requests: dict[int, Request] = {}
        self._num_state_layers = len(config.hidden_state_layers)
        self._tokenizer_path = Path(model)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        if isinstance(tokenizer, str | Path):
            self._tokenizer_path = Path(tokenizer)
            self._tokenizer = load_tokenizer(tokenizer)
        else:
            self._tokenizer = tokenizer
        with progress_bar(
            use_tqdm_on_load, desc="Loading weights", unit="B", unit_scale=True
        ) as bar:
            self._engine = _C.Engine(config, report_to(bar))

    @property
    def model_info(self) -> _C.ModelInfo:
        """What was loaded: sizes, parameters, threads, KV blocks."""
        return self._engine.model_info

    @property
    def stats(self) -> _C.EngineStats:
        """A snapshot of the engine's counters."""
        return self._engine.stats

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, loading it if it was not needed so far.

        Returns:
            A Hugging Face tokenizer.

        Raises:
            FileNotFoundError: The model's directory has none.
            ValueError: Its files cannot be read.
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._tokenizer_path)
            return self._tokenizer

    def generate(
        self,
        prompts: SinglePrompt | Sequence[SinglePrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: One prompt or a sequence of prompts. A prompt is a text, a sequence of token
                ids, {"prompt": text} or {"prompt_token_ids": ids}.
            sampling_params: For all prompts, or one for each. None: `SamplingParams()`.
            use_tqdm: Show a progress bar (on a terminal).

        Returns:
            One output for each prompt, in their order.

        Raises:
            TypeError: A prompt or a parameter is of another type.
            ValueError: The numbers of prompts and parameters differ, a prompt is empty or too
                long, or a value is bad.
            FileNotFoundError: Text is needed and there is no tokenizer.
            KeyboardInterrupt: On Ctrl-C, after the requests of this call have been dropped.
        """
        parsed = parse_prompts(prompts)
        return self._run(parsed, params_for(len(parsed), sampling_params), use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, in the form that the model's chat template gives them.

        Args:
            messages: One conversation (a sequence of {"role": ..., "content": ...}) or a sequence
                of conversations.
            sampling_params: For all conversations, or one for each.
            use_tqdm: Show a progress bar (on a terminal).
            add_generation_prompt: End the prompt with the beginning of an answer.
            continue_final_message: Leave the last message open, to be continued; needs
                `add_generation_prompt=False`.
            chat_template: Jinja template to use in place of the model's.
            chat_template_kwargs: Further variables of the template.
            tools: Descriptions of tools for templates that know them.

        Returns:
            One output for each conversation, in their order.

        Raises:
            ValueError: There is no chat template, or it refuses a conversation; else as
                `generate`.
        """
        conversations = [messages] if is_conversation(messages) else list(messages)
        parsed = [
            self._render(
                cast(Conversation, conversation),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                tools=None if tools is None else list(tools),
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self._run(parsed, params_for(len(parsed), sampling_params), use_tqdm)

    def stream(
        self,
        prompt: SinglePrompt | Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        delta: bool = False,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Generate step by step.

        Closing the generator early, or dropping it, drops the request.

        Args:
            prompt: One prompt as for `generate`, or one conversation as for `chat`.
            sampling_params: Its parameters.
            delta: Each output holds only what is new, so that joined texts are the whole text.
                By default outputs are cumulative, as vLLM's are.
            add_generation_prompt: Of a conversation: end it with the beginning of an answer.
            chat_template: Of a conversation: template to use in place of the model's.

        Returns:
            A generator of outputs; the last one is finished.

        Raises:
            TypeError, ValueError, FileNotFoundError: As `generate`, at the call itself unless the
                engine refuses the request.
        """
        if is_conversation(prompt):
            parsed = [
                self._render(
                    cast(Conversation, prompt),
                    add_generation_prompt=add_generation_prompt,
                    chat_template=chat_template,
                )
            ]
        else:
            parsed = parse_prompts(cast(SinglePrompt, prompt))
        if len(parsed) != 1:
            raise ValueError(f"stream takes one prompt, not {len(parsed)}")
        params = params_for(1, sampling_params)[0]
        self._tokenize(parsed)
        return self._stream(parsed[0], params, delta)

    def prompt_logits(self, token_ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """Run the model over a prompt and return its logits.

        Args:
            token_ids: Prompt [length].

        Returns:
            float32 [length, vocabulary]; row i predicts token i + 1.

        Raises:
            ValueError: The prompt is empty or too long, or an id is outside the vocabulary.
        """
        params = SamplingParams(prompt_logits=True, max_tokens=1, temperature=0, detokenize=False)
        prompt = parse_prompts({"prompt_token_ids": token_ids})
        logits = self._run(prompt, [params], use_tqdm=False)[0].prompt_logits
        if logits is None:
            raise RuntimeError("the engine returned no prompt logits")
        return logits

    def ask(self, questions: Sequence[str], max_tokens: int) -> list[str]:
        """Answer questions greedily, without foreseeing the length of these answers.

        Args:
            questions: Of a user, put into the chat template if there is one.
            max_tokens: Most tokens of an answer.

        Returns:
            The answers.
        """
        chat = bool(self.get_tokenizer().chat_template)
        prompts = [
            self._render(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                chat_template=None,
            )
            if chat
            else Prompt(text=question)
            for question in questions
        ]
        params = [SamplingParams(temperature=0, max_tokens=max_tokens)] * len(prompts)
        outputs = self._run(prompts, params, use_tqdm=False, foresee=False)
        return [output.outputs[0].text for output in outputs]

    def _render(self, conversation: Conversation, **arguments: Any) -> Prompt:
        """Apply the chat template to one conversation."""
        tokenizer = self.get_tokenizer()
        if arguments["chat_template"] is None and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; pass chat_template")
        if not conversation:
            raise ValueError("a conversation is empty")
        from jinja2 import TemplateError

        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in conversation], tokenize=False, **arguments
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        question = conversation[-1].get("content")
        # The template writes special tokens itself.
        return Prompt(
            text=cast(str, text),
            special_tokens=False,
            question=question if isinstance(question, str) else None,
        )

    def _tokenize(self, prompts: Sequence[Prompt]) -> None:
        for special in (True, False):
            group = [p for p in prompts if p.token_ids is None and p.special_tokens is special]
            if group:
                texts = [cast(str, prompt.text) for prompt in group]
                rows = self.get_tokenizer()(texts, add_special_tokens=special)["input_ids"]
                for prompt, token_ids in zip(group, cast(list[list[int]], rows), strict=True):
                    prompt.token_ids = token_ids

    def _output_tokenizer(self, params: SamplingParams) -> PreTrainedTokenizerBase | None:
        """The tokenizer that makes a request's text; None if there is none and none is needed."""
        if not params.detokenize:
            return None
        if self._tokenizer is None and not params.stop and not has_tokenizer(self._tokenizer_path):
            return None
        return self.get_tokenizer()

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
        foresee: bool = True,
    ) -> list[RequestOutput]:
        self._tokenize(prompts)
        beliefs = self._beliefs.of(self, prompts) if foresee else [None] * len(prompts)
        requests: list[Request] = []
        try:
            for i, (prompt, own, belief) in enumerate(zip(prompts, params, beliefs, strict=True)):
                try:
                    requests.append(self._submit(prompt, own, belief))
                except (ValueError, MemoryError) as error:
                    if len(prompts) == 1:
                        raise
                    raise type(error)(f"prompt {i}: {error}") from error
            self._finish(requests, use_tqdm)
        finally:
            self._drop(requests)
        return [request.output() for request in requests]

    def _finish(self, requests: Sequence[Request], use_tqdm: bool) -> None:
        """Step until all of the requests are finished."""
        start = time.perf_counter()
        pending = list(requests)
        with progress_bar(use_tqdm, desc="Generating", unit="prompt", total=len(requests)) as bar:
            while pending:
                self._step(pending)
                running = [request for request in pending if not request.finished]
                if not bar.disable:
                    tokens = sum(request.generated_tokens for request in requests)
                    rate = tokens / (time.perf_counter() - start)
                    bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
                    bar.update(len(pending) - len(running))
                pending = running

    def _stream(
        self, prompt: Prompt, params: SamplingParams, delta: bool
    ) -> Generator[RequestOutput, None, None]:
        request = self._submit(prompt, params, self._beliefs.of(self, [prompt])[0])
        try:
            finished, seen = False, 0
            while not finished:
                # Another caller's steps serve this request, too; what they made comes first.
                if request.generated_tokens == seen:
                    self._step([request])
                if request.finished or request.generated_tokens > seen:
                    seen = request.generated_tokens
                    output = request.output(delta=delta)
                    finished = output.finished
                    yield output
        finally:
            self._drop([request])

    def _submit(self, prompt: Prompt, params: SamplingParams, belief: Belief | None) -> Request:
        tokenizer = self._output_tokenizer(params)
        token_ids = cast(list[int], prompt.token_ids)
        with self._lock:
            request_id = self._engine.submit(token_ids, params, *(belief or ()))
            request = Request(request_id, prompt, params, tokenizer, self._num_state_layers)
            self._requests[request_id] = request
        return request

    def _step(self, wanted: Sequence[Request]) -> None:
        """Run one batch for all requests, unless the wanted ones are finished meanwhile."""
        with self._lock:
            if all(request.finished for request in wanted):
                return  # another thread's step has served them
            outputs = self._engine.step()
            if not outputs and not self._engine.has_unfinished_requests():
                raise RuntimeError(f"the engine lost request {wanted[0].request_id}")
            for output in outputs:
                request = self._requests.get(output.request_id)
                if request is None:
                    # Dropped earlier; if an interrupt hit between submit and its registration,
                    # this is where it is found.
                    if not output.finished:
                        self._engine.abort(output.request_id)
                    continue
                for index in request.update(output):
                    self._engine.abort(output.request_id, index)
                if request.finished:
                    del self._requests[output.request_id]

    def _drop(self, requests: Sequence[Request]) -> None:
        """Make the engine forget those of the requests that are not finished."""
        # After a failure of the engine every call raises that failure again; the one that is
        # already on its way to the user says more.
        with self._lock, contextlib.suppress(RuntimeError):
            for request in requests:
                if self._requests.pop(request.request_id, None) is not None:
                    self._engine.abort(request.request_id)
            if not self._requests and self._engine.has_unfinished_requests():
                self._engine.step()  # frees the KV blocks of what was aborted now

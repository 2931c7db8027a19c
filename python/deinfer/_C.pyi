"""The native module: C++ structs and the engine, exactly as in csrc/include/deinfer/engine.h."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__version__: str

class SamplingParams:
    """How the tokens of a request are chosen (csrc/include/deinfer/sampling_params.h)."""

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
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        prompt_logits: bool = False,
        hidden_states: int | None = None,
        priority: int = 0,
        expected_tokens: float | None = None,
    ) -> None: ...
    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    prompt_logits: bool
    hidden_states: int | None
    priority: int
    expected_tokens: float | None
    def validate(self) -> None: ...

class EngineConfig:
    """What to load and how to run it (csrc/include/deinfer/engine.h)."""

    def __init__(
        self,
        *,
        model: str,
        device: str = "cpu",
        dtype: str = "auto",
        weight_compression: str = "auto",
        tensor_parallel_size: int = 1,
        tensor_parallel_plan: str = "auto",
        emulated_link: str = "",
        exchange_chunks: int = 0,
        num_threads: int = 0,
        max_model_len: int = 0,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 512,
        block_size: int = 16,
        num_kv_blocks: int = 0,
        kv_cache_bytes: int = 0,
        kv_cache: str = "dense",
        kv_latents: str = "auto",
        scheduling_policy: str = "fcfs",
        admission: str = "peak",
        safety: float = 0.0,
        kv_watermark: float = 0.03,
        max_pause: int = 8,
        preempt_limit: int = 2,
        promote_after: float | None = None,
        promote_per_token: float | None = None,
        bucket_width: int = 50,
        static_group: int = 256,
        static_batch_size: int = 16,
        bucket_batch_sizes: Sequence[int] = [256, 128, 64, 32],
        recompute: str = "continue",
        event_log: str = "",
        enable_prefix_caching: bool = True,
        hidden_state_layers: Sequence[int] = (),
        length_predictor: str = "",
        seed: int = 0,
    ) -> None: ...
    model: str
    device: str
    dtype: str
    weight_compression: str
    tensor_parallel_size: int
    tensor_parallel_plan: str
    emulated_link: str
    exchange_chunks: int
    num_threads: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_kv_blocks: int
    kv_cache_bytes: int
    kv_cache: str
    kv_latents: str
    scheduling_policy: str
    admission: str
    safety: float
    kv_watermark: float
    max_pause: int
    preempt_limit: int
    promote_after: float | None
    promote_per_token: float | None
    bucket_width: int
    static_group: int
    static_batch_size: int
    bucket_batch_sizes: list[int]
    recompute: str
    event_log: str
    enable_prefix_caching: bool
    hidden_state_layers: list[int]
    length_predictor: str
    seed: int
    def validate(self) -> None: ...

class TokenLogprob:
    token: int
    logprob: float
    rank: int

class SequenceOutput:
    index: int
    new_token_ids: list[int]
    logprobs: list[list[TokenLogprob]]
    finish_reason: str | None
    stop_token_id: int | None
    hidden_states: NDArray[np.float32] | None
    hidden_states_position: int

class RequestOutput:
    request_id: int
    outputs: list[SequenceOutput]
    finished: bool
    prompt_logprobs: list[list[TokenLogprob]]
    prompt_logits: NDArray[np.float32] | None

class KvLayerInfo:
    k: str
    v: str
    k_bytes: int
    v_bytes: int
    ranks: int

class ModelInfo:
    architecture: str
    dtype: str
    weight_compression: str
    isa: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    num_threads: int
    parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    num_kv_blocks: int
    block_size: int
    kv_cache: str
    kv_reason: str
    kv_bytes_per_token: int
    dense_kv_bytes_per_token: int
    kv_layers: list[KvLayerInfo]
    lowrank_matrices: int
    dense_matrices: int
    tensor_parallel_size: int
    decode_plan: str
    prefill_plan: str
    rank_weight_bytes: list[int]

class CollectiveStats:
    name: str
    calls: int
    bytes: int
    wire_bytes: int

class LengthAccuracy:
    count: int
    mae: float
    acc_50: float
    acc_100: float
    kendall_tau: float
    q90_coverage: float

class EngineStats:
    num_waiting: int
    num_running: int
    free_kv_blocks: int
    num_steps: int
    used_kv_blocks: int
    promised_kv_blocks: int
    forecast_kv_blocks: int
    kv_forecast_error: float
    num_preemptions: int
    evicted_for_decode: int
    evicted_for_prefill: int
    set_aside: int
    paused_steps: int
    num_promotions: int
    recomputed_tokens: int
    effective_token_ratio: float
    length_accuracy: LengthAccuracy
    prefix_hit_tokens: int
    prompt_tokens: int
    generated_tokens: int
    execute_us: int
    length_predictions: int
    length_predictor_us: int
    collectives: list[CollectiveStats]

class Engine:
    """Loads a checkpoint and runs requests; see csrc/include/deinfer/engine.h.

    Raises:
        ValueError, NotImplementedError, MemoryError, RuntimeError: with the operand and its value.
    """

    def __init__(
        self, config: EngineConfig, progress: Callable[[int, int], None] | None = None
    ) -> None: ...
    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        lengths: Sequence[float] = (),
        probabilities: Sequence[float] = (),
    ) -> int: ...
    def abort(self, request_id: int, index: int | None = None) -> bool: ...
    def step(self) -> list[RequestOutput]: ...
    def has_unfinished_requests(self) -> bool: ...
    @property
    def model_info(self) -> ModelInfo: ...
    @property
    def stats(self) -> EngineStats: ...

class PlannerConfig:
    """What to plan for (csrc/include/deinfer/planner.h)."""

    def __init__(
        self,
        *,
        model: str,
        tensor_parallel_size: int = 1,
        link: str = "nvlink",
        hardware: str = "h100",
        dtype: str = "bfloat16",
        keep: float = 0.0,
        memory_gib: float = 0.0,
        context: int = 1024,
        batches: Sequence[int] = (1, 4, 16, 64, 256),
        prefill: Sequence[int] = (2048,),
        mix: Mapping[str, float] = {},
        kv_cache: str = "dense",
        kv_latents: str = "auto",
        max_chunks: int = 1,
    ) -> None: ...
    model: str
    tensor_parallel_size: int
    link: str
    hardware: str
    dtype: str
    keep: float
    memory_gib: float
    context: int
    batches: list[int]
    prefill: list[int]
    mix: dict[str, float]
    kv_cache: str
    kv_latents: str
    max_chunks: int

class PhaseEstimate:
    phase: str
    seconds: float
    product_seconds: float
    operation_seconds: float
    attention_seconds: float
    exchange_seconds: float
    chunks: int

class PlanEstimate:
    plan: str
    layout: str
    all_reduces: float
    all_gathers: float
    reduce_scatters: float
    wire_bytes_per_token: float
    weight_bytes: int
    kv_bytes_per_token: int
    dense_kv_bytes_per_token: int
    latent_kv_bytes_per_token: int
    token_sharded_kv_bytes_per_token: int
    kv_token_sharded: bool
    kv_reason: str
    k_break_even: int
    v_break_even: int
    kv_tokens: int
    fits: bool
    phases: list[PhaseEstimate]

class PhaseChoice:
    phase: str
    plan: str
    weight: float
    seconds: float

class PlanReport:
    plans: list[PlanEstimate]
    layout: str
    choices: list[PhaseChoice]
    decode_plan: str
    prefill_plan: str
    reason: str
    link_latency_s: float
    link_bytes_per_s: float
    memory_bytes_per_s: float
    flops_per_s: float
    memory_bytes: int

def plan_tensor_parallelism(config: PlannerConfig) -> PlanReport:
    """Predict every tensor-parallel plan from config.json alone, and choose.

    Raises:
        ValueError, NotImplementedError: with the field and its value.
    """

class LinearDescription:
    name: str
    out_features: int
    in_features: int
    rank: int

class AttentionDescription:
    num_layers: int
    window: int
    rope_type: str
    rope_theta: float
    rope_factor: float

class TensorPrefix:
    prefix: str
    replacement: str | None

class ModelDescription:
    """What a config.json describes (csrc/include/deinfer/model_description.h)."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    tied_embeddings: bool
    activation: str
    norm: str
    norms_inputs: bool
    norms_outputs: bool
    qk_norm: str
    attention_soft_cap: float
    logit_soft_cap: float
    attention: list[AttentionDescription]
    linears: list[LinearDescription]
    embedding: str
    tensor_prefixes: list[TensorPrefix]
    parameters: int
    kv_elements_per_token: int
    latent_kv_elements_per_token: int
    latent_kv_factor_bytes_per_token: int

def describe_config(path: str) -> ModelDescription:
    """Describe a model from its config.json alone.

    Raises:
        ValueError, NotImplementedError: with the field and its value.
    """

def supported_architectures() -> list[str]: ...
def supported_isas() -> list[str]: ...

"""Decompose a whole model: calibrate, factorize, allocate ranks, write."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from deinfer.architectures import attention_implementation
from deinfer.decompose.allocate import (
    Candidate,
    allocate_ranks,
    candidate_ranks,
    parameters,
    uniform_ranks,
)
from deinfer.decompose.calibration import (
    Calibration,
    RuntimeSampler,
    Sampler,
    sample_calibration,
    text_calibration,
)
from deinfer.decompose.checkpoint import Factors, linear_names, read_config, write_checkpoint
from deinfer.decompose.compensate import compensate
from deinfer.decompose.directory import require_free
from deinfer.decompose.factorize import Moments, Spectrum, compact_moments, factorize, shrink
from deinfer.decompose.recover import STEP_TOKENS, recover
from deinfer.decompose.reference import replace_linears
from deinfer.decompose.statistics import collect_moments

METHODS = ("two_sided", "whitening", "svd")
"""`two_sided`: KFAC weights, global ranks, error compensation. `whitening`: SVD-LLM's objective,
uniform ranks. `svd`: plain truncated SVD, uniform ranks (a baseline; it leaves no usable model)."""

DEFAULT_TOKENS = 12288
_INPUT_SHRINKAGE = 0.003
_OUTPUT_SHRINKAGE = 0.3
_COMPENSATION_TOKENS = 6144  # a fit of u alone needs fewer than the moments do


@dataclass(frozen=True)
class DecompositionReport:
    """What `decompose_model` did.

    Attributes:
        destination: The checkpoint that was written.
        method: One of `METHODS`.
        keep: Parameters of the decomposed linears / their dense parameters, as reached.
        ranks: Rank by module name; None means dense.
        parameters: Parameters of those linears now.
        dense_parameters: Parameters of those linears before.
        calibration_tokens: Tokens that the statistics are from; 0 for `svd`.
        seconds: Wall time by stage.
    """

    destination: Path
    method: str
    keep: float
    ranks: dict[str, int | None]
    parameters: int
    dense_parameters: int
    calibration_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        """Describe the result in a few lines for a terminal."""
        by_type: dict[str, list[int | None]] = {}
        for name, rank in self.ranks.items():
            by_type.setdefault(name.rpartition(".")[2], []).append(rank)
        lines = [
            f"{self.method}: kept {self.keep:.4f} of {self.dense_parameters:,} parameters, "
            f"{self.calibration_tokens:,} calibration tokens"
        ]
        for leaf, ranks in by_type.items():
            some = [r for r in ranks if r is not None]
            mean = f", mean rank {sum(some) / len(some):.0f}" if some else ""
            lines.append(f"  {leaf}: {len(some)} of {len(ranks)} decomposed{mean}")
        times = ", ".join(f"{stage} {value:.1f} s" for stage, value in self.seconds.items())
        return "\n".join([*lines, f"  time: {times}"])


def decompose_model(
    source: Path,
    destination: Path,
    *,
    keep: float = 0.8,
    method: str = "two_sided",
    rank_multiple: int = 16,
    calibration_text: Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    recovery_steps: int = 0,
    seed: int = 0,
    sampler: Sampler | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> DecompositionReport:
    """Replace the linear layers of a checkpoint by low-rank factors.

    Deterministic for a seed, a sampler and a thread count.

    Args:
        source: Dense Hugging Face directory of a supported architecture
            (`deinfer.architectures`).
        destination: Directory to create.
        keep: Parameters of all decoder linears to keep, in (0, 1]; embeddings and lm_head do not
            count and are not touched.
        method: One of `METHODS`.
        rank_multiple: Ranks are multiples of this. A matrix stays dense where r(n + k) >= n k.
        calibration_text: Text to calibrate on; without it the model samples its own.
        calibration_tokens: Tokens to calibrate on.
        recovery_steps: Steps of distillation on the dense model's outputs afterwards, each about
            512 tokens of the same source; 0 leaves the decomposition free of training.
        seed: Seed of the sampling.
        sampler: Source of self-sampled sequences; the native runtime by default.
        overwrite: Replace an existing destination.
        progress: Show progress bars.

    Returns:
        A report with ranks and times.

    Raises:
        ValueError: An argument is out of range, the architecture is not supported, a weight is not
            finite, or the calibration text is too short.
        FileExistsError: The destination exists and `overwrite` is false.
    """
    source, destination = Path(source), Path(destination)
    if not 0 < keep <= 1:
        raise ValueError(f"keep {keep} is not in (0, 1]")
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {METHODS}")
    if rank_multiple < 1:
        raise ValueError(f"rank_multiple {rank_multiple} is not positive")
    if recovery_steps < 0 or (recovery_steps > 0 and method == "svd"):
        raise ValueError(f"recovery_steps {recovery_steps} is not possible with method {method!r}")
    require_free(destination, overwrite=overwrite)
    config = read_config(source)
    seconds: dict[str, float] = {}

    calibration = Calibration([], "none")
    if method != "svd":
        with _timed(seconds, "calibration"):
            if calibration_text is not None:
                calibration = text_calibration(calibration_text, source, calibration_tokens)
            else:
                # No name is bound to the default sampler: its model is freed right after.
                calibration = sample_calibration(
                    sampler or RuntimeSampler(source, seed=seed, progress=progress),
                    calibration_tokens,
                    seed,
                )
    model = _load(source)
    linears = {name: model.get_submodule(name) for name in linear_names(config)}
    for name, layer in linears.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(f"weight {name!r} of {str(source)!r} has a non-finite value")
    with _timed(seconds, "statistics"):
        moments = _moments(model, linears, method, calibration, progress)
    with _timed(seconds, "factorization"):
        spectra = _factorize(linears, moments, rank_multiple, progress)
        candidates = {
            name: Candidate(layer.out_features, layer.in_features, spectra[name].energies.numpy())
            for name, layer in linears.items()
        }
        allocate = allocate_ranks if method == "two_sided" else uniform_ranks
        ranks = allocate(candidates, keep, rank_multiple)
        factors = {
            name: Factors(*spectra[name].factors(rank))
            for name, rank in ranks.items()
            if rank is not None
        }
    del spectra
    if method == "two_sided":
        with _timed(seconds, "compensation"):
            some = _spread(calibration.sequences, _COMPENSATION_TOKENS)
            factors = compensate(model, factors, some, progress=progress)
    del model, linears
    if recovery_steps > 0:
        with _timed(seconds, "recovery"):
            sequences = calibration.sequences
            if calibration_text is None:  # text that the factors have not been fitted to
                fresh = sampler or RuntimeSampler(source, seed=seed + 10**6, progress=progress)
                sequences = sample_calibration(
                    fresh, recovery_steps * STEP_TOKENS, seed + 1
                ).sequences
            factors = recover(
                _load(source),
                _with_factors(source, factors),
                sequences,
                steps=recovery_steps,
                seed=seed,
                progress=progress,
            )
    dense = sum(parameters(c, None) for c in candidates.values())
    kept = sum(parameters(c, ranks[name]) for name, c in candidates.items())
    with _timed(seconds, "writing"):
        low_rank = {
            "method": method,
            "base_model": config.get("_name_or_path") or source.resolve().name,
            "keep_ratio": round(kept / dense, 6),
            "rank_multiple": rank_multiple,
            "calibration": {
                "source": calibration.source,
                "tokens": calibration.tokens,
                "seed": seed,
            },
            "recovery_steps": recovery_steps,
        }
        write_checkpoint(source, destination, factors, low_rank, overwrite=overwrite)
    return DecompositionReport(
        destination, method, kept / dense, ranks, kept, dense, calibration.tokens, seconds
    )


def _from_pretrained(source: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention = attention_implementation(AutoConfig.from_pretrained(str(source)))
    return AutoModelForCausalLM.from_pretrained(
        str(source), dtype=dtype, attn_implementation=attention
    )


def _load(source: Path) -> Any:
    # bf16 halves the time where the CPU multiplies it natively, and is far slower elsewhere.
    native: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    dtype = torch.bfloat16 if native() else torch.float32
    stored = read_config(source).get("dtype", read_config(source).get("torch_dtype"))
    if stored != "bfloat16":  # a float32 or float16 weight would be rounded
        dtype = torch.float32
    return _from_pretrained(source, dtype).eval()


def _with_factors(source: Path, factors: dict[str, Factors]) -> Any:
    """The model in float32 with factors in place of its linears."""
    model = _from_pretrained(source, torch.float32)
    replace_linears(model, {n: f.u.shape[1] for n, f in factors.items()}, torch.float32)
    with torch.no_grad():
        for name, pair in factors.items():
            layer: Any = model.get_submodule(name)
            layer.u.weight.copy_(pair.u)
            layer.v.weight.copy_(pair.v)
    return model


def _moments(
    model: Any,
    linears: dict[str, nn.Linear],
    method: str,
    calibration: Calibration,
    progress: bool,
) -> dict[str, Moments]:
    if method == "svd":
        return {
            n: compact_moments(layer.weight.detach(), None, None) for n, layer in linears.items()
        }
    gradients = method == "two_sided"
    return collect_moments(
        model, linears, calibration.sequences, gradients=gradients, progress=progress
    )


def _factorize(
    linears: dict[str, nn.Linear], moments: dict[str, Moments], multiple: int, progress: bool
) -> dict[str, Spectrum]:
    """Factorize every layer; moments are dropped as they are used."""
    spectra = {}
    for name, layer in tqdm(linears.items(), desc="factorize", unit="layer", disable=not progress):
        weight = layer.weight.detach()
        shrunk = shrink(weight, moments.pop(name), _INPUT_SHRINKAGE, _OUTPUT_SHRINKAGE)
        allowed = candidate_ranks(layer.out_features, layer.in_features, multiple)
        spectra[name] = factorize(weight, shrunk).truncated(max(allowed, default=1))
    return spectra


def _spread(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    """Take every n-th sequence, for about as many tokens as wanted."""
    step = max(1, round(sum(len(s) for s in sequences) / tokens))
    return sequences[::step]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start

"""What a decomposition is asked to do, checked before any work is done."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deinfer.decompose.allocate import RANKS
from deinfer.decompose.method import Method
from deinfer.decompose.methods import METHODS
from deinfer.decompose.statistics import Needs

DEFAULT_KEEP = 0.8
# Where more is kept, layers err so little that fitting them to it gains nothing and costs time.
# Measured on SmolLM2-135M (bench/decompose.py): better at 0.8 and below, worse at 0.9.
COMPENSATE_BELOW = 0.85


@dataclass(frozen=True)
class Options:
    """Options of a run; see `pipeline.decompose_model` for what they mean."""

    keep: float | None
    target_size: float | None
    target_ppl_increase: float | None
    method: Method
    ranks: str
    rank_multiple: int
    compensate: bool | None
    calibration: Path | None
    calibration_tokens: int
    recover_minutes: float
    recover_steps: int
    seed: int

    @property
    def needs(self) -> Needs:
        """Statistics that factors and ranks come from."""
        return Needs(self.method.inputs, self.method.outputs, powers=self.ranks == "allocated")

    @property
    def may_compensate(self) -> bool:
        """Whether `compensates` is true of any share."""
        return self.method.compensate if self.compensate is None else self.compensate

    def compensates(self, keep: float) -> bool:
        """Whether factors are fitted to the decomposed model's activations.

        Args:
            keep: Share of the parameters that is kept.
        """
        if self.compensate is not None:
            return self.compensate
        return self.method.compensate and keep < COMPENSATE_BELOW

    @property
    def recovers(self) -> bool:
        """Whether the factors are trained."""
        return self.recover_minutes > 0 or self.recover_steps > 0

    @property
    def calibrates(self) -> bool:
        """Whether any text is needed."""
        return self.needs.forward or self.may_compensate or self.target_ppl_increase is not None

    @property
    def target(self) -> str:
        """The target in words."""
        if self.target_size is not None:
            return f"target_size {self.target_size}"
        if self.target_ppl_increase is not None:
            return f"target_ppl_increase {self.target_ppl_increase}"
        return f"keep {self.keep}"

    def identity(self) -> dict[str, Any]:
        """Say which run this is, to recognize it when it is resumed."""
        text = "self-sampled"
        if self.calibration is not None:
            text = hashlib.sha256(self.calibration.read_bytes()).hexdigest()[:16]
        return {
            "method": self.method.name,
            "ranks": self.ranks,
            "rank_multiple": self.rank_multiple,
            "target": self.target,
            "compensate": "by keep"
            if self.compensate is None and self.method.compensate
            else self.may_compensate,
            "calibration": text,
            "calibration_tokens": self.calibration_tokens,
            "recover_minutes": self.recover_minutes,
            "recover_steps": self.recover_steps,
            "seed": self.seed,
        }


def make_options(
    *,
    keep: float | None,
    target_size: float | None,
    target_ppl_increase: float | None,
    method: str,
    ranks: str | None,
    rank_multiple: int,
    compensate: bool | None,
    calibration: Path | None,
    calibration_tokens: int,
    recover_minutes: float,
    recover_steps: int,
    seed: int,
) -> Options:
    """Check options and fill in a method's defaults.

    Raises:
        ValueError: One is out of range or contradicts another.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    targets = {
        "keep": keep,
        "target_size": target_size,
        "target_ppl_increase": target_ppl_increase,
    }
    given = [name for name, value in targets.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given, but only one of them can hold")
    if not given:
        keep = DEFAULT_KEEP
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep {keep} is not in (0, 1]")
    if target_size is not None and not 0 < target_size < math.inf:
        raise ValueError(f"target_size {target_size} GiB is not positive")
    if target_ppl_increase is not None and not 1 < target_ppl_increase < math.inf:
        raise ValueError(
            f"target_ppl_increase {target_ppl_increase} is not above 1: it is the perplexity "
            "allowed / the dense model's"
        )
    ranks = chosen.ranks if ranks is None else ranks
    if ranks not in RANKS:
        raise ValueError(f"ranks {ranks!r} is not one of {', '.join(RANKS)}")
    if rank_multiple < 1:
        raise ValueError(f"rank_multiple {rank_multiple} is not positive")
    if not 0 <= recover_minutes < math.inf or recover_steps < 0:
        raise ValueError(f"recovery of {recover_minutes} minutes, {recover_steps} steps: negative")
    if recover_minutes > 0 and recover_steps > 0:
        raise ValueError("recover_minutes and recover_steps cannot both hold")
    if calibration is not None and not Path(calibration).is_file():
        raise ValueError(f"calibration file {str(calibration)!r} is not a file")
    return Options(
        keep=keep,
        target_size=target_size,
        target_ppl_increase=target_ppl_increase,
        method=chosen,
        ranks=ranks,
        rank_multiple=rank_multiple,
        compensate=compensate,
        calibration=None if calibration is None else Path(calibration),
        calibration_tokens=calibration_tokens,
        recover_minutes=recover_minutes,
        recover_steps=recover_steps,
        seed=seed,
    )

"""Choose ranks for a target: a share of the parameters, a size, or a perplexity."""

from __future__ import annotations

from collections.abc import Mapping

from deinfer.decompose.allocate import Candidate, choose_ranks, least_keep
from deinfer.decompose.checkpoint import checkpoint_layout
from deinfer.decompose.options import Options
from deinfer.decompose.source import SourceCheckpoint
from deinfer.decompose.writer import stored_bytes

Ranks = dict[str, int | None]
_GIB = 1 << 30


def require_reachable(
    options: Options, source: SourceCheckpoint, shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse a target that no ranks can meet, before any work is done.

    Args:
        options: Of the run.
        source: Dense checkpoint.
        shapes: [n, k] of the linears by name.

    Raises:
        ValueError: The target is out of reach.
    """
    least = least_keep(shapes.values(), options.rank_multiple)
    if options.keep is not None and options.keep < least:
        raise ValueError(
            f"keep {options.keep} is below {least:.4f}, the least that "
            f"rank_multiple {options.rank_multiple} allows"
        )
    if options.target_size is not None:
        smallest: Ranks = choose_ranks(
            {name: Candidate(n, k, [0.0] * min(n, k)) for name, (n, k) in shapes.items()},
            least,
            options.rank_multiple,
            "allocated",
        )
        low, high = (_size(source, ranks) / _GIB for ranks in (smallest, {}))
        if not low <= options.target_size < high:
            raise ValueError(
                f"target_size {options.target_size} GiB is not between {low:.4f} GiB, the least "
                f"that rank_multiple {options.rank_multiple} allows, and {high:.4f} GiB of the "
                "dense checkpoint"
            )


def ranks_for_size(
    options: Options, source: SourceCheckpoint, candidates: Mapping[str, Candidate]
) -> Ranks:
    """Choose the ranks of the largest checkpoint within `target_size`.

    Args:
        options: Of the run.
        source: Dense checkpoint.
        candidates: Matrices by name.

    Returns:
        Ranks by name.

    Raises:
        ValueError: None fit.
    """
    assert options.target_size is not None
    limit = options.target_size * _GIB
    low = least_keep(((c.n, c.k) for c in candidates.values()), options.rank_multiple)
    best = choose_ranks(candidates, low, options.rank_multiple, options.ranks)
    if _size(source, best) > limit:
        raise ValueError(f"no {options.ranks} ranks fit target_size {options.target_size} GiB")
    high = 1.0
    for _ in range(20):  # to a millionth of the parameters
        middle = (low + high) / 2
        ranks = choose_ranks(candidates, middle, options.rank_multiple, options.ranks)
        if _size(source, ranks) <= limit:
            low, best = middle, ranks
        else:
            high = middle
    return best


def _size(source: SourceCheckpoint, ranks: Ranks) -> int:
    """Bytes of the checkpoint's safetensors files."""
    some = {name: rank for name, rank in ranks.items() if rank is not None}
    return stored_bytes(checkpoint_layout(source, some))

"""Decompose a whole model: the entry point."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from deinfer.decompose.calibration import Sampler
from deinfer.decompose.checkpoint import linear_shapes, read_config
from deinfer.decompose.directory import publish, require_free
from deinfer.decompose.options import make_options
from deinfer.decompose.report import DecompositionReport
from deinfer.decompose.run import Run
from deinfer.decompose.source import SourceCheckpoint
from deinfer.decompose.targets import require_reachable
from deinfer.decompose.workdir import open_state

DEFAULT_TOKENS = 65536
DEFAULT_RANK_MULTIPLE = 8


def decompose_model(
    source: Path,
    destination: Path,
    *,
    keep: float | None = None,
    target_size: float | None = None,
    target_ppl_increase: float | None = None,
    method: str = "two_sided",
    ranks: str | None = None,
    rank_multiple: int = DEFAULT_RANK_MULTIPLE,
    compensate: bool | None = None,
    calibration: Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    recover_minutes: float = 0.0,
    recover_steps: int = 0,
    seed: int = 0,
    sampler: Sampler | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> DecompositionReport:
    """Replace the linear layers of a checkpoint by low-rank factors.

    The model is read block by block; what has been found of a block goes to
    `DESTINATION.partial`, from where an interrupted run can be resumed: it loses a block at most
    (a recovery starts anew) and gives the same bits. Deterministic for a seed, a sampler and a
    thread count, unless `recover_minutes` is given.

    Args:
        source: Dense Hugging Face directory of a supported architecture
            (`deinfer.architectures`).
        destination: Directory to create.
        keep: Parameters of all decoder linears to keep, in (0, 1]; embeddings and lm_head do not
            count and are not touched. 0.8 if no target is given.
        target_size: Instead of `keep`: size of the checkpoint's safetensors files in GiB, at most.
        target_ppl_increase: Instead of `keep`: perplexity / the dense model's, at most, on
            calibration sequences that are held out; above 1.
        method: A name of `METHODS`.
        ranks: "allocated" by what they cost the loss, or "uniform"; by default the method's.
        rank_multiple: Ranks are multiples of this. A matrix stays dense where r(n + k) >= n k, and
            with allocated ranks where that is the better choice.
        compensate: Fit the second factors to the activations of the decomposed model; by default
            `two_sided` does so where less than 0.85 is kept.
        calibration: File to calibrate on, see `texts.read_sequences`; without one the model samples
            its own text.
        calibration_tokens: Tokens to calibrate on.
        recover_minutes: Minutes of training on the dense model's outputs afterwards, sampling of
            its text included; all weights of the blocks move, and 20 bytes of memory are held for
            each of them.
        recover_steps: Instead: steps of about 500 tokens.
        seed: Seed of the sampling.
        sampler: Source of self-sampled sequences; the native runtime by default.
        overwrite: Replace an existing destination.
        resume: Go on with `DESTINATION.partial` if it is there.
        progress: Show progress bars.

    Returns:
        A report with ranks and times; also written into the destination as decomposition.json and,
        where matplotlib is installed, decomposition.png.

    Raises:
        ValueError: An argument is out of range, the architecture is not supported, the source is
            incomplete or a weight not finite, the calibration text is too short, the target cannot
            be reached, or what is to be resumed is another run.
        FileExistsError: The destination exists and `overwrite` is false, or an unfinished run was
            left and `resume` is false.
        OSError: A file could not be written.
    """
    options = make_options(
        keep=keep,
        target_size=target_size,
        target_ppl_increase=target_ppl_increase,
        method=method,
        ranks=ranks,
        rank_multiple=rank_multiple,
        compensate=compensate,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        recover_minutes=recover_minutes,
        recover_steps=recover_steps,
        seed=seed,
    )
    source, destination = Path(source), Path(destination)
    require_free(destination, overwrite=overwrite)
    config = read_config(source)
    checkpoint = SourceCheckpoint(source)
    require_reachable(options, checkpoint, linear_shapes(checkpoint))
    partial = destination.with_name(f"{destination.name}.partial")
    fresh = not partial.exists()
    identity = {**options.identity(), "source": checkpoint.identity()}
    work = open_state(partial, identity, resume=resume)
    run = Run(options, checkpoint, work, sampler, progress)
    try:
        report = run.complete(
            destination, base_model=config.get("_name_or_path") or source.resolve().name
        )
        publish(partial / "checkpoint", destination, overwrite=overwrite)
    except ValueError:
        if fresh:  # bad input: there is nothing to go on with
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror} ({error.filename or str(partial)!r}); what is done is kept in "
            f"{str(partial)!r}: make room and go on with it (--resume), or remove it",
        ) from error
    shutil.rmtree(partial)
    return report

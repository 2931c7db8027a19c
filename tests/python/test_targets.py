"""Targets by size and by perplexity, and the report beside a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from decompose_helpers import VOCABULARY, decompose, tiny_llama  # noqa: E402
from deinfer.decompose import load_reference, writer  # noqa: E402
from deinfer.decompose.quality import search_keep  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def stored(path: Path) -> int:
    """Bytes of a checkpoint's safetensors files."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


@pytest.mark.parametrize("ranks", ["allocated", "uniform"])
def test_target_size(dense: Path, tmp_path: Path, ranks: str) -> None:
    target = 0.8 * stored(dense)
    gib = target / 2**30
    options: dict[str, Any] = {"ranks": ranks, "rank_multiple": 1, "method": "svd"}
    decompose(dense, tmp_path / "low", target_size=gib, **options)
    assert 0.97 * target < stored(tmp_path / "low") <= target
    for size in (1e-6, 2 * stored(dense) / 2**30):
        with pytest.raises(ValueError, match=r"target_size .* is not between"):
            decompose(dense, tmp_path / "bad", target_size=size, **options)


def test_target_perplexity(dense: Path, tmp_path: Path) -> None:
    model = load_reference(dense)
    generator = torch.Generator().manual_seed(0)

    def sampler(prompts: list[str]) -> list[list[int]]:
        """The model's own text: anything that changes the model predicts it worse."""
        ids = torch.randint(VOCABULARY, (len(prompts), 1), generator=generator)
        with torch.no_grad():
            for _ in range(31):
                likely = model(ids).logits[:, -1].mul(2).softmax(-1)
                ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], dim=1)
        return ids.tolist()

    options: dict[str, Any] = {"compensate": False, "sampler": sampler, "calibration_tokens": 1000}
    reports = {
        limit: decompose(dense, tmp_path / str(limit), target_ppl_increase=limit, **options)
        for limit in (1.05, 1.5)
    }
    for limit, report in reports.items():
        assert report.perplexity_ratio is not None
        assert 1 < report.perplexity_ratio <= limit + 1e-6
        written = json.loads((tmp_path / str(limit) / "decomposition.json").read_text())
        assert written["perplexity_ratio"] == report.perplexity_ratio
        assert f"{report.perplexity_ratio:.4f}" in report.summary()
    assert reports[1.5].keep < reports[1.05].keep < 1


def test_search_keep() -> None:
    def ratio(keep: float) -> float:
        return math.exp(1 - keep)

    keep, reached = search_keep(ratio, 1.2, 0.1)
    assert reached == ratio(keep) <= 1.2 and keep == pytest.approx(1 - math.log(1.2), abs=0.005)
    assert search_keep(ratio, 9.0, 0.1) == (0.1, ratio(0.1))
    with pytest.raises(ValueError, match=r"1\.0001 cannot be reached.*0\.99"):
        search_keep(ratio, 1.0001, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.5, "target_size": 1.0}, "keep and target_size are given"),
        ({"target_size": -1.0}, "target_size -1.0"),
        ({"target_ppl_increase": 1.0}, "target_ppl_increase 1.0 is not above 1"),
        ({"ranks": "equal"}, "'equal' is not one of allocated, uniform"),
        ({"method": "whitening"}, "'whitening' is not one of two_sided, whitened, svd"),
        ({"calibration": Path("nowhere.txt")}, "'nowhere.txt' is not a file"),
    ],
)
def test_bad_options(dense: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose(dense, tmp_path / "low", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["two_sided", "whitened", "svd"])
@pytest.mark.parametrize("ranks", ["allocated", "uniform"])
def test_report(dense: Path, tmp_path: Path, method: str, ranks: str) -> None:
    report = decompose(dense, tmp_path / "low", keep=0.7, method=method, ranks=ranks)
    written = json.loads((tmp_path / "low" / "decomposition.json").read_text())
    assert written["ranks"] == report.ranks and written["keep"] == report.keep
    assert set(written["loss"]) == set(report.ranks)
    assert all((written["loss"][n] > 0) == (r is not None) for n, r in report.ranks.items())
    assert written["peak_memory_bytes"] > 50 << 20 and written["seconds"]["statistics"] > 0
    assert written["calibration"]["tokens"] == (
        0 if (method, ranks) == ("svd", "uniform") else report.calibration_tokens
    )
    pytest.importorskip("matplotlib")
    assert (tmp_path / "low" / "decomposition.png").read_bytes().startswith(b"\x89PNG")


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files and an index read as one; a reader of Hugging Face's finds every tensor."""
    source = tiny_llama(tmp_path / "dense")
    decompose(source, tmp_path / "one", keep=0.6)
    monkeypatch.setattr(writer.plan_shards, "__defaults__", (20_000,))
    decompose(source, tmp_path / "many", keep=0.6)
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0].startswith("model-00001-of-")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    one, many = (load_reference(tmp_path / d).state_dict() for d in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)

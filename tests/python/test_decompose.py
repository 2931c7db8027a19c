"""The decomposer: closed form, allocation, calibration, checkpoint; tiny random models only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from checkpoints import write_model  # noqa: E402
from deinfer.architectures import ARCHITECTURES  # noqa: E402
from deinfer.decompose import decompose_model, load_reference  # noqa: E402
from deinfer.decompose.allocate import (  # noqa: E402
    Candidate,
    allocate_ranks,
    candidate_ranks,
    parameters,
    uniform_ranks,
)
from deinfer.decompose.calibration import (  # noqa: E402
    RuntimeSampler,
    packaged_lines,
    sample_calibration,
    text_calibration,
)
from deinfer.decompose.checkpoint import Factors, linear_names, read_config  # noqa: E402
from deinfer.decompose.compensate import compensate, embed, run_block  # noqa: E402
from deinfer.decompose.directory import atomic_directory  # noqa: E402
from deinfer.decompose.factorize import compact_moments, factorize, shrink  # noqa: E402
from deinfer.decompose.reference import replace_linears  # noqa: E402
from deinfer.decompose.statistics import collect_moments  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from oracle import relative_error  # noqa: E402
from torch import Tensor, nn  # noqa: E402

SHAPES = [(24, 40), (40, 24), (32, 32)]
VOCABULARY = 96


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices are fastest on one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def root(moment: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def problem(n: int, k: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random weight and second moments of correlated vectors; singular for few tokens."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = draw(tokens, k) @ (torch.logspace(0, -2, k, dtype=torch.float64)[:, None] * draw(k, k))
    grad = draw(tokens, n) @ draw(n, n)
    return draw(n, k), x.T @ x / tokens, grad.T @ grad / tokens


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("tokens", [400, 7])
@pytest.mark.parametrize("sides", ["both", "inputs", "outputs", "none"])
def test_factors_reach_the_eckart_young_optimum(n: int, k: int, tokens: int, sides: str) -> None:
    weight, inputs, outputs = problem(n, k, tokens)
    a = inputs if sides in ("both", "inputs") else None
    b = outputs if sides in ("both", "outputs") else None
    spectrum = factorize(weight, compact_moments(weight, a, b))
    left = root(b) if b is not None else torch.eye(n, dtype=torch.float64)
    right = root(a) if a is not None else torch.eye(k, dtype=torch.float64)
    singular = torch.linalg.svdvals(left @ weight @ right)
    for rank in (1, 5, 17, min(n, k)):
        u, v = spectrum.factors(rank)
        assert u.shape == (n, rank) and v.shape == (rank, k)
        loss = (left @ (weight - u @ v) @ right).square().sum().item()
        best = singular[rank:].square().sum().item()
        scale = singular.square().sum().item()
        assert abs(loss - best) <= 1e-9 * scale
        assert abs(spectrum.energies[rank:].sum().item() - best) <= 1e-9 * scale


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_full_rank_reproduces_the_weight(n: int, k: int) -> None:
    weight, inputs, outputs = problem(n, k, 400)
    u, v = factorize(weight, compact_moments(weight, inputs, outputs)).factors(min(n, k))
    torch.testing.assert_close(u @ v, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_factors_are_balanced_and_truncation_keeps_them(n: int, k: int) -> None:
    weight, inputs, outputs = problem(n, k, 400)
    spectrum = factorize(weight, compact_moments(weight, inputs, 1e8 * outputs))
    u, v = spectrum.factors(9)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))
    short = spectrum.truncated(9)
    assert torch.equal(short.factors(9)[0], u) and torch.equal(short.energies, spectrum.energies)
    with pytest.raises(ValueError, match="rank 10"):
        short.factors(10)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_zero_moments_are_survived(n: int, k: int) -> None:
    weight, inputs, outputs = problem(n, k, 40)
    for a, b in ((0 * inputs, outputs), (inputs, 0 * outputs)):
        u, v = factorize(weight, compact_moments(weight, a, b)).factors(4)
        assert bool(torch.isfinite(u).all()) and bool(torch.isfinite(v).all())


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_shrinkage_equals_shrinking_the_full_moments(n: int, k: int) -> None:
    weight, a, b = problem(n, k, 30)
    got = shrink(weight, compact_moments(weight, a, b), 0.1, 0.3)
    full_a = 0.9 * a + 0.1 * a.trace() / k * torch.eye(k, dtype=torch.float64)
    full_b = 0.7 * b + 0.3 * b.trace() / n * torch.eye(n, dtype=torch.float64)
    want = compact_moments(weight, full_a, full_b)
    torch.testing.assert_close(got.own, want.own)
    torch.testing.assert_close(got.seen, want.seen)


def test_factorize_names_what_is_wrong() -> None:
    weight, inputs, outputs = problem(8, 12, 40)
    moments = compact_moments(weight, inputs, outputs)
    with pytest.raises(ValueError, match="weight has a non-finite"):
        factorize(weight * float("nan"), moments)
    with pytest.raises(ValueError, match=r"\(8, 8\).*\(12, 12\)"):
        factorize(torch.ones(12, 12), moments)
    with pytest.raises(ValueError, match="do not fit"):
        compact_moments(weight, outputs, inputs)


def random_candidates(seed: int, count: int) -> dict[str, Candidate]:
    """Matrices of mixed shapes with exponential spectra of mixed steepness and scale."""
    rng = np.random.default_rng(seed)
    made = {}
    for i in range(count):
        n, k = (int(d) for d in rng.integers(3, 97, 2))
        decay = np.exp(-np.arange(min(n, k)) * rng.uniform(0.01, 0.5))
        made[f"m{i}"] = Candidate(n, k, 10 ** rng.uniform(-3, 3) * decay)
    return made


def loss(candidates: dict[str, Candidate], ranks: dict[str, int | None]) -> float:
    """Total loss of an allocation."""
    return sum(
        float(np.sum(c.energies[r:])) for name, c in candidates.items() if (r := ranks[name])
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 12),
    keep=st.floats(0.2, 1.0),
    multiple=st.sampled_from([1, 4, 8, 16]),
)
@settings(max_examples=60, deadline=None)
def test_allocation_holds_the_budget(seed: int, count: int, keep: float, multiple: int) -> None:
    candidates = random_candidates(seed, count)
    total = sum(c.n * c.k for c in candidates.values())
    try:
        ranks = allocate_ranks(candidates, keep, multiple)
    except ValueError as error:
        assert "is below" in str(error)
        return
    assert set(ranks) == set(candidates)
    spent = 0
    for name, rank in ranks.items():
        c = candidates[name]
        allowed = candidate_ranks(c.n, c.k, multiple)
        assert rank is None or (rank in allowed and rank * (c.n + c.k) < c.n * c.k)
        spent += parameters(c, rank)
    assert spent <= keep * total
    uniform = uniform_ranks(candidates, keep, multiple)
    if sum(parameters(c, uniform[name]) for name, c in candidates.items()) <= spent:
        assert loss(candidates, ranks) <= loss(candidates, uniform) * (1 + 1e-9)


def test_allocation_is_monotone_and_dense_at_one() -> None:
    candidates = random_candidates(3, 20)
    losses = [loss(candidates, allocate_ranks(candidates, k, 4)) for k in (0.4, 0.6, 0.8, 0.95)]
    assert losses == sorted(losses, reverse=True)
    assert set(allocate_ranks(candidates, 1.0, 4).values()) == {None}
    assert set(uniform_ranks(candidates, 1.0, 4).values()) == {None}


def test_allocation_prefers_the_steep_spectrum() -> None:
    steep = Candidate(64, 64, np.exp(-np.arange(64.0)))
    flat = Candidate(64, 64, np.ones(64))
    ranks = allocate_ranks({"steep": steep, "flat": flat}, 0.75, 8)
    assert ranks["flat"] is None and ranks["steep"] is not None


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_allocation_refuses_a_bad_keep(keep: float) -> None:
    with pytest.raises(ValueError, match="keep"):
        allocate_ranks(random_candidates(0, 2), keep, 8)


def test_candidate_ranks() -> None:
    assert candidate_ranks(64, 64, 16) == [16]
    assert candidate_ranks(64, 96, 16) == [16, 32]
    assert candidate_ranks(16, 16, 16) == [1, 2, 3, 4, 5, 6, 7]
    assert candidate_ranks(1, 50, 8) == []


def tiny_llama(path: Path, **changes: Any) -> Path:
    """Save a random Llama with 2 layers and grouped-query attention."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.to(torch.bfloat16).save_pretrained(path)
    (path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (path / "pytorch_model.bin").write_bytes(b"not to be copied")
    return path


def random_sampler(prompts: list[str]) -> list[list[int]]:
    """Random tokens, the same for the same number of prompts."""
    g = torch.Generator().manual_seed(len(prompts))
    return torch.randint(VOCABULARY, (len(prompts), 24), generator=g).tolist()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied tiny Llama."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "dense")


def decompose(source: Path, destination: Path, **changes: Any) -> Any:
    """Decompose quietly with the random sampler."""
    fields = {"sampler": random_sampler, "calibration_tokens": 200, "rank_multiple": 4}
    return decompose_model(source, destination, progress=False, **{**fields, **changes})


@pytest.mark.parametrize("method", ["two_sided", "whitening", "svd"])
def test_round_trip(dense: Path, tmp_path: Path, method: str) -> None:
    report = decompose(dense, tmp_path / "low", keep=0.7, method=method)
    config = json.loads((tmp_path / "low/config.json").read_text())
    base = json.loads((dense / "config.json").read_text())
    assert config["model_type"] == "lowrank_llama"
    assert config["architectures"] == ["LowRankLlamaForCausalLM"]
    low_rank = config.pop("low_rank")
    assert low_rank["version"] == 1 and low_rank["base_model_type"] == "llama"
    assert low_rank["ranks"] == {n: r for n, r in report.ranks.items() if r is not None}
    assert {k: v for k, v in config.items() if k not in ("model_type", "architectures")} == {
        k: v for k, v in base.items() if k not in ("model_type", "architectures")
    }
    names = sorted(p.name for p in (tmp_path / "low").iterdir())
    assert "chat_template.jinja" in names and "pytorch_model.bin" not in names
    if method == "two_sided":
        assert report.keep <= 0.7
    reference = load_reference(tmp_path / "low", torch.float64)
    original = load_reference(dense, torch.float64)
    for name, rank in report.ranks.items():
        got, was = reference.get_submodule(name), original.get_submodule(name)
        if rank is None:
            assert torch.equal(got.weight, was.weight)
        else:
            assert got.u.weight.shape == (was.out_features, rank)
            assert got.v.weight.shape == (rank, was.in_features)
    with torch.no_grad():
        logits = reference(torch.arange(9)[None]).logits
    assert bool(torch.isfinite(logits).all())
    assert "kept" in report.summary()


def test_keep_one_changes_nothing(dense: Path, tmp_path: Path) -> None:
    report = decompose(dense, tmp_path / "low", keep=1.0)
    assert report.keep == 1.0 and set(report.ranks.values()) == {None}
    ids = torch.arange(9)[None]
    with torch.no_grad():
        got = load_reference(tmp_path / "low")(ids).logits
        want = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        assert torch.equal(got, want.eval()(ids).logits)


def test_two_sided_predicts_less_loss_than_svd(dense: Path, tmp_path: Path) -> None:
    """On its own calibration data the weighted optimum stays closer to the dense model."""
    errors = {}
    ids = torch.tensor(random_sampler(packaged_lines("calibration_prompts.txt")[:8]))
    want = load_reference(dense)(ids).logits
    for method in ("two_sided", "svd"):
        decompose(dense, tmp_path / method, method=method, keep=0.8, calibration_tokens=1500)
        errors[method] = (load_reference(tmp_path / method)(ids).logits - want).norm().item()
    assert errors["two_sided"] < errors["svd"]


def test_compensation_lowers_the_error(dense: Path) -> None:
    """Fitting u to the model's own activations brings its hidden states closer to the dense."""
    sequences = random_sampler(["x"] * 40)
    model = load_reference(dense)
    names = linear_names(read_config(dense))
    linears = {name: model.get_submodule(name) for name in names}
    moments = collect_moments(model, linears, sequences, progress=False)
    factors = {
        name: Factors(*factorize(layer.weight.detach(), moments[name]).factors(10))
        for name, layer in linears.items()
    }
    kept = {name: pair.u.clone() for name, pair in factors.items()}
    fitted = compensate(load_reference(dense), factors, sequences, progress=False)
    errors = []
    with torch.no_grad():
        want = model(torch.tensor(sequences)).logits
        for pairs in (factors, fitted):
            low = load_reference(dense)
            replace_linears(low, dict.fromkeys(pairs, 10), torch.float32)
            for name, pair in pairs.items():
                low.get_submodule(name).u.weight.copy_(pair.u)
                low.get_submodule(name).v.weight.copy_(pair.v)
            errors.append((low(torch.tensor(sequences)).logits - want).norm().item())
    assert errors[1] < errors[0]
    assert all(torch.equal(factors[name].u, u) for name, u in kept.items())


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_compensation_without_factors_is_the_dense_model(family: str, tmp_path: Path) -> None:
    """The block-wise forward pass is the model's own."""
    architecture = ARCHITECTURES[family]
    model = load_reference(write_model(tmp_path / "dense", family=family))
    sequences = random_sampler(["x"] * 3)
    with torch.no_grad():
        hidden, rotary = embed(model, sequences)
        for block in model.get_submodule(architecture.layers):
            hidden = run_block(
                architecture, block, hidden, [24] * 3, rotary, lambda leaves, x: None
            )
        decoder = model.get_decoder()
        norm = decoder.final_layer_norm if family == "opt" else decoder.norm
        got = model.lm_head(norm(hidden))
        want = model(torch.tensor(sequences)).logits.flatten(0, 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_family_decomposes_and_runs(family: str, tmp_path: Path) -> None:
    from deinfer import LLM

    source = write_model(tmp_path / "dense", family=family)
    report = decompose(source, tmp_path / "low", keep=0.7)
    assert report.keep <= 0.7
    tokens = random_sampler(["x"])[0]
    with torch.no_grad():
        want = load_reference(tmp_path / "low", torch.float64)(torch.tensor([tokens])).logits[0]
    llm = LLM(tmp_path / "low", num_threads=1, num_kv_blocks=8)
    assert llm.model_info.lowrank_matrices == sum(r is not None for r in report.ranks.values())
    assert llm.model_info.lowrank_matrices + llm.model_info.dense_matrices == len(report.ranks)
    assert relative_error(llm.prompt_logits(tokens), want.numpy()) < 2e-5


def test_biases_and_untied_head(tmp_path: Path) -> None:
    source = tiny_llama(
        tmp_path / "dense", attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    )
    report = decompose(source, tmp_path / "low", keep=0.7)
    reference, original = load_reference(tmp_path / "low"), load_reference(source)
    name = next(n for n, r in report.ranks.items() if r is not None)
    got = reference.get_submodule(name).u.bias
    assert torch.equal(got, original.get_submodule(name).bias)


def test_deterministic_and_overwrite(dense: Path, tmp_path: Path) -> None:
    decompose(dense, tmp_path / "a", seed=3)
    decompose(dense, tmp_path / "b", seed=3)
    files = [tmp_path / d / "model.safetensors" for d in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(FileExistsError, match="already exists"):
        decompose(dense, tmp_path / "a")
    decompose(dense, tmp_path / "a", overwrite=True, method="svd")
    assert json.loads((tmp_path / "a/config.json").read_text())["low_rank"]["method"] == "svd"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.0}, "keep 0.0"),
        ({"keep": 1.5}, "keep 1.5"),
        ({"keep": 1e-3}, "keep 0.001 is below"),
        ({"method": "magic"}, "'magic'"),
        ({"rank_multiple": 0}, "rank_multiple 0"),
        ({"calibration_tokens": 1}, "calibration_tokens 1"),
        ({"sampler": lambda prompts: []}, "gave 0 answers"),
        ({"sampler": lambda prompts: [[] for _ in prompts]}, "no answer"),
    ],
)
def test_bad_arguments(dense: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose(dense, tmp_path / "low", **changes)
    assert list(tmp_path.iterdir()) == []


def edited(source: Path, destination: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a checkpoint with an edited config."""
    destination.mkdir()
    for file in source.iterdir():
        (destination / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    edit(config)
    (destination / "config.json").write_text(json.dumps(config))
    return destination


def test_bad_sources(dense: Path, tmp_path: Path) -> None:
    gpt = edited(dense, tmp_path / "gpt", lambda c: c.update(model_type="gpt_neox"))
    with pytest.raises(ValueError, match="'gpt_neox'"):
        decompose(gpt, tmp_path / "low")
    packed = edited(dense, tmp_path / "q", lambda c: c.update(quantization_config={"bits": 4}))
    with pytest.raises(ValueError, match="quantized"):
        decompose(packed, tmp_path / "low")
    decompose(dense, tmp_path / "once")
    with pytest.raises(ValueError, match="already decomposed"):
        decompose(tmp_path / "once", tmp_path / "low")
    with pytest.raises(ValueError, match=r"config\.json"):
        decompose(tmp_path / "nowhere", tmp_path / "low")


def test_non_finite_weight(dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = edited(dense, tmp_path / "nan", lambda c: None)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*non-finite"):
        decompose(source, tmp_path / "low", method="svd")


def test_reference_checks_its_tensors(dense: Path, tmp_path: Path) -> None:
    decompose(dense, tmp_path / "low", keep=0.6)

    def one_rank_less(config: dict[str, Any]) -> None:
        ranks = config["low_rank"]["ranks"]
        ranks[next(iter(ranks))] += 1

    with pytest.raises(ValueError, match="size mismatch"):
        load_reference(edited(tmp_path / "low", tmp_path / "bad", one_rank_less))

    def forget(config: dict[str, Any]) -> None:
        ranks = config["low_rank"]["ranks"]
        ranks.pop(next(iter(ranks)))

    with pytest.raises(ValueError, match="missing"):
        load_reference(edited(tmp_path / "low", tmp_path / "worse", forget))


def test_collected_moments_match_autograd(dense: Path) -> None:
    """Hooks give the same moments as per-token gradients taken one by one."""
    model = load_reference(dense, torch.float64)
    names = [n for n in linear_names(read_config(dense)) if "layers.1" in n]
    linears = {n: model.get_submodule(n) for n in names}
    sequences = random_sampler(["a", "b", "c"])
    got = collect_moments(model, linears, sequences, progress=False)
    xs: list[Tensor] = []
    gs: list[Tensor] = []

    def keep(_: nn.Module, inputs: Any, output: Any) -> None:
        xs.append(inputs[0][0].detach())
        output.register_hook(lambda grad: gs.append(grad[0]))

    for name, layer in linears.items():
        xs.clear()
        gs.clear()
        handle = layer.register_forward_hook(keep)
        for sequence in sequences:
            ids = torch.tensor([sequence])
            embedded = model.get_input_embeddings()(ids).requires_grad_(True)
            logits = model(inputs_embeds=embedded).logits[0, :-1]
            nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        handle.remove()
        x, g = torch.cat(xs), torch.cat(gs)
        want = compact_moments(layer.weight, x.T @ x / len(x), g.T @ g / len(g))
        for key in ("own", "seen", "own_power", "seen_power"):
            torch.testing.assert_close(
                torch.as_tensor(getattr(got[name], key)),
                torch.as_tensor(getattr(want, key)),
                rtol=1e-4,
                atol=1e-8,
            )


class FakeRuntime:
    """Stands in for `deinfer.LLM`."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def chat(self, conversations: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        """Answer with as many tokens as the prompt has words."""
        return self.generate([c[0]["content"] for c in conversations], params, use_tqdm)

    def generate(self, prompts: list[str], params: list[Any], use_tqdm: bool) -> list[Any]:
        """Return vLLM-shaped outputs."""
        from types import SimpleNamespace as Box

        self.seeds += [p["seed"] for p in params]
        return [
            Box(prompt_token_ids=[1, 2], outputs=[Box(token_ids=[3] * len(p.split()))])
            for p in prompts
        ]


def test_runtime_sampler_mixes_chat_and_plain_text() -> None:
    sampler = RuntimeSampler.__new__(RuntimeSampler)
    sampler._llm, sampler._params, sampler._seed = FakeRuntime(), dict, 5
    sampler._progress = False
    calibration = sample_calibration(sampler, 600)
    assert 0.9 * 600 <= calibration.tokens <= 600
    assert calibration.source == "self-sampled"
    assert len(set(sampler._llm.seeds)) == len(sampler._llm.seeds)


def test_text_calibration(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text.split())))}

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: Words())
    file = tmp_path / "text.txt"
    file.write_text("word " * 2000)
    calibration = text_calibration(file, dense, 1100)
    assert [len(s) for s in calibration.sequences] == [512, 512, 76]
    assert all(s[-1] - s[0] == len(s) - 1 for s in calibration.sequences)
    with pytest.raises(ValueError, match="2000 tokens.*2001"):
        text_calibration(file, dense, 2001)
    with pytest.raises(ValueError, match="not a file"):
        text_calibration(tmp_path / "none.txt", dense, 10)


def test_atomic_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_packaged_data() -> None:
    assert len(packaged_lines("calibration_prompts.txt")) >= 64
    assert 2500 <= sum(len(x.split()) for x in packaged_lines("heldout.txt")) <= 4000


def test_factors_must_fit(dense: Path, tmp_path: Path) -> None:
    from deinfer.decompose.checkpoint import write_checkpoint

    name = linear_names(read_config(dense))[0]
    bad = Factors(torch.ones(48, 2), torch.ones(3, 48))
    with pytest.raises(ValueError, match="do not fit"):
        write_checkpoint(dense, tmp_path / "low", {name: bad}, {})


def test_recovery_brings_the_factors_closer_to_the_dense_model(tmp_path: Path) -> None:
    import deinfer.decompose.recover as recovery

    source = tiny_llama(tmp_path / "dense")
    sequences = [[int(t) for t in np.random.default_rng(i).integers(3, 90, 60)] for i in range(24)]

    def sampler(prompts: list[str]) -> list[list[int]]:
        return (sequences * (1 + len(prompts) // len(sequences)))[: len(prompts)]

    def distance(path: Path) -> float:
        ids = torch.tensor(sequences[:8])
        with torch.no_grad():
            dense = load_reference(source)(ids).logits.log_softmax(-1)
            low = load_reference(path)(ids).logits.log_softmax(-1)
        return float((dense.exp() * (dense - low)).sum(-1).mean())

    options: Any = {"keep": 0.5, "rank_multiple": 4, "sampler": sampler, "progress": False}
    options["calibration_tokens"] = 600
    decompose_model(source, tmp_path / "plain", **options)
    decompose_model(source, tmp_path / "recovered", recovery_steps=12, **options)
    assert distance(tmp_path / "recovered") < 0.98 * distance(tmp_path / "plain")
    written = json.loads((tmp_path / "recovered" / "config.json").read_text())["low_rank"]
    assert written["recovery_steps"] == 12
    with pytest.raises(ValueError, match="recovery steps 0"):
        recovery.recover(None, None, sequences, steps=0)
    with pytest.raises(ValueError, match="recovery_steps -1"):
        decompose_model(source, tmp_path / "bad", recovery_steps=-1, **options)


def test_recovery_batches_cover_the_sequences_in_order_of_the_seed() -> None:
    from deinfer.decompose.recover import STEP_TOKENS, batches

    sequences = [[i] * (40 + i) for i in range(1, 30)]
    groups = batches(sequences, 12, seed=3)
    assert len(groups) == 12
    for ids, valid in groups:
        assert int(valid.sum()) <= STEP_TOKENS
        for row, mask in zip(ids.tolist(), valid.tolist(), strict=True):
            tokens = [t for t, m in zip(row, mask, strict=True) if m]
            assert tokens == sequences[tokens[0] - 1]
    again = batches(sequences, 12, seed=3)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(groups, again, strict=True))


def test_calibration_prompts_do_not_rehearse_the_demo() -> None:
    from deinfer.demo import QUESTIONS

    def content(text: str) -> set[str]:
        common = {
            "what",
            "which",
            "with",
            "that",
            "this",
            "from",
            "three",
            "explain",
            "give",
            "about",
        }
        words = {word.strip(".,?!'\"").lower() for word in text.split()}
        return (
            {word for word in words if len(word) > 2} - common - {"the", "and", "for", "why", "how"}
        )

    for line in [
        *packaged_lines("calibration_prompts.txt"),
        *packaged_lines("calibration_openers.txt"),
    ]:
        for question in QUESTIONS:
            assert not content(line) & content(question), (line, question)

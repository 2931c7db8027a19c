"""Perception through the engine: artifacts, the commands, beliefs at submission, LoRA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_model
from deinfer import LLM, SamplingParams
from deinfer.cli import main
from deinfer.perception.bins import Bins
from deinfer.perception.dataset import read_collection
from deinfer.perception.head import LengthHead, Stage
from deinfer.perception.lora import merge_adapter
from deinfer.perception.train import train_head
from safetensors.torch import load_file, save_file

ENGINE: dict[str, Any] = {"num_threads": 1, "num_kv_blocks": 64, "use_tqdm_on_load": False}


@pytest.fixture(scope="module")
def collected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of the tiny model, collected by the command in two goes."""
    path = tmp_path_factory.mktemp("perception")
    prompts = path / "prompts.jsonl"
    words = ["sky", "fox", "walk", "water", "blue", "Paris"]
    lines = [
        {"id": i, "prompt": " ".join(words[: 1 + i % 6]) + f" {i}", "source": "ab"[i % 2]}
        for i in range(44)
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for limit in ("10", "44"):
        arguments = ["--prompts", prompts, "--data", path / "data", "--limit", limit]
        options = "--samples 2 --cap 40 --layers 1 2 --every 8 --shard 16 --num-threads 1"
        cache = ["--kv-cache-bytes", str(1 << 24)]
        command = ["perception", "collect", tiny_model, *arguments, *options.split(), *cache]
        assert main([str(argument) for argument in command]) == 0
    return path / "data"


@pytest.fixture(scope="module")
def trained(collected: Path) -> LengthHead:
    return train_head(read_collection(collected))


def test_collections_go_on_and_hold_what_the_engine_says(collected: Path, tiny_model: Path) -> None:
    collection = read_collection(collected)
    assert len(set(collection.ids)) == len(collection.ids) == 44
    assert collection.prompt_states.shape == (44, 2, 64)
    assert len(list(collected.glob("shard-*.jsonl"))) == 4  # 10, then 16 + 16 + 2
    np.testing.assert_array_equal(collection.censored, collection.lengths == 40)
    # One answer again, alone.
    llm = LLM(tiny_model, hidden_state_layers=[1, 2], **ENGINE)
    message = [{"role": "user", "content": collection.prompts[20]}]
    params = SamplingParams(n=2, temperature=0.7, max_tokens=40, hidden_states=8, seed=20)
    sample = llm.chat(message, params, use_tqdm=False)[0].outputs[1]
    assert collection.ids[20] == "20"
    assert len(sample.token_ids) == collection.lengths[20, 1]
    assert sample.hidden_states is not None
    np.testing.assert_array_equal(collection.prompt_states[20], sample.hidden_states.states[0])
    rows = collection.refined_rows
    chosen = (rows[:, 0] == 20) & (rows[:, 1] == 1)
    assert rows[chosen, 2].tolist() == sample.hidden_states.positions[1:]
    along = np.stack([sample.hidden_states.states, sample.hidden_states.means], axis=1)[1:]
    np.testing.assert_array_equal(collection.refined_states[chosen], along.astype(np.float16))


def test_another_way_of_collecting_is_refused(
    collected: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = collected.parent / "prompts.jsonl"
    command = ["perception", "collect", tiny_model, "--prompts", prompts, "--data", collected]
    assert main([str(part) for part in [*command, "--cap", "41", "--layers", "1", "2"]]) == 2
    assert "was collected with" in capsys.readouterr().err


def test_the_commands_train_and_evaluate(
    collected: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["perception", "train", tiny_model, "--data", collected, "--output", tmp_path]
    assert main([str(part) for part in train]) == 0
    out = capsys.readouterr().out
    assert "44 prompts, layer" in out
    head = LengthHead.load(tmp_path / "hidden_state.json")
    assert head.layer in (1, 2)
    evaluate = ["perception", "evaluate", "--data", collected, "--folds", "2"]
    files = ["--json", tmp_path / "results.json", "--plots", tmp_path]
    assert main([str(part) for part in [*evaluate, *files]]) == 0
    assert "hidden_state" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["prompt_time"]) == {"constant", "tfidf_ridge", "prompt", "hidden_state"}
    for name in ("predicted", "reliability"):
        assert (tmp_path / f"perception-{name}.png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        ([*train, "--layer", "7"], "layer 7 was not collected; there are [1, 2]"),
        (["perception", "evaluate", "--data", tmp_path], "holds no collection"),
        ([*evaluate[:-1], "1"], "--folds must be at least 2"),
    ):
        assert main([str(part) for part in arguments]) == 2
        assert message in capsys.readouterr().err


def test_predictors_change_no_token(
    collected: Path, trained: LengthHead, tiny_model: Path, tmp_path: Path
) -> None:
    collection = read_collection(collected)
    head = trained.save(tmp_path)
    from deinfer.perception.prompt import PromptModel

    prompt = PromptModel.fit(collection.prompts, collection.lengths, 40).save(tmp_path)
    questions = [[{"role": "user", "content": text}] for text in collection.prompts[:12]]
    params = [SamplingParams(max_tokens=10 + i, seed=i) for i in range(12)]

    def tokens(predictor: Any) -> tuple[list[list[int]], LLM]:
        llm = LLM(tiny_model, length_predictor=predictor, **{**ENGINE, "num_kv_blocks": 24})
        outputs = llm.chat(questions, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs], llm

    expected, plain = tokens("")
    assert plain.stats.length_predictions == 0
    for predictor in ("history", str(prompt), str(head), [str(prompt), str(head)], "instructed"):
        found, llm = tokens(predictor)
        assert found == expected, predictor
        assert (llm.stats.length_predictions > 0) == (str(head) in predictor)


def test_bad_heads_are_refused(trained: LengthHead, tiny_model: Path, tmp_path: Path) -> None:
    path = trained.save(tmp_path)
    entry = json.loads(path.read_text())
    for field, value, message in (
        ("hidden_size", 32, "was trained for hidden_size=32"),
        ("layer", 9, r"layer=9 is outside \[0, 2\]"),
        ("weights", "none.safetensors", "none.safetensors"),
    ):
        path.write_text(json.dumps({**entry, field: value}))
        with pytest.raises(ValueError, match=message):
            LLM(tiny_model, length_predictor=str(path), **ENGINE)
    with pytest.raises(ValueError, match="does not exist; `deinfer perception train` makes it"):
        LLM(tiny_model, length_predictor="hidden_state", **ENGINE)


def test_python_and_the_engine_compute_the_same(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)

    def stage(inputs: int, hidden: bool) -> Stage:
        units = 5 if hidden else inputs
        layer = (numbers.standard_normal((5, inputs)), numbers.standard_normal(5))
        return Stage(
            shift=numbers.standard_normal(inputs),
            scale=numbers.uniform(0.5, 2, inputs),
            hidden=layer if hidden else None,
            output=(numbers.standard_normal((16, units)) / 3, numbers.standard_normal(16)),
            temperature=1.7,
            levels_from=np.array([0.0, 0.3, 0.6, 1.0]),
            levels_to=np.array([0.0, 0.2, 0.7, 1.0]),
        )

    bins = Bins(np.linspace(0, 64, 16), np.append(np.linspace(2, 62, 15), 64.0))
    head = LengthHead(1, 4, 64, 2, bins, stage(64, False), stage(2 * 64 + 17, True))
    path = head.save(tmp_path)
    source = Path(__file__).resolve().parents[2] / "build/cpu/tests/cpp/length_head_dump"
    if not source.is_file():
        pytest.skip("needs `cmake --build --preset cpu`")
    state, mean = numbers.standard_normal((2, 64)).astype(np.float32)
    lines = " ".join(f"{value:.9g}" for value in np.concatenate([state, mean]))
    output = subprocess.run(
        [source, path, "64", "2", "8"], input=lines, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    prompt, refined = (np.array(line.split(), np.float64) for line in output)
    np.testing.assert_allclose(prompt, head.predict_prompt(state[None])[0], atol=1e-5)
    expected = head.predict_refined(state[None], mean[None], np.array([8]), state[None])[0]
    np.testing.assert_allclose(refined, expected, atol=1e-5)


def test_training_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import deinfer.perception.train, deinfer.perception.evaluate, deinfer.perception.collect"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def write_adapter(path: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    entry = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", **settings}
    (path / "adapter_config.json").write_text(json.dumps(entry))
    save_file(
        {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()},
        path / "adapter_model.safetensors",
    )
    return path


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_merged_as_the_formula_says(tmp_path: Path, rslora: bool) -> None:
    model = write_model(tmp_path / "model", {"q_proj": 7})
    dense, factored = (
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
    )
    torch.manual_seed(1)
    tensors = {
        f"{dense}.lora_A": torch.randn(4, 48),
        f"{dense}.lora_B": torch.randn(24, 4),
        f"{factored}.lora_A": torch.randn(4, 48),
        f"{factored}.lora_B": torch.randn(48, 4),
    }
    adapter = write_adapter(
        tmp_path / "adapter", tensors, use_rslora=rslora, alpha_pattern={"q_proj": 3}
    )
    assert merge_adapter(model, adapter, tmp_path / "merged") == 2
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    divisor = 2.0 if rslora else 4.0

    def product(module: str, alpha: float) -> torch.Tensor:
        return alpha / divisor * tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"]

    expected = before[f"{dense}.weight"] + product(dense, 6)
    torch.testing.assert_close(after[f"{dense}.weight"], expected)
    old = before[f"{factored}.u.weight"] @ before[f"{factored}.v.weight"]
    new = after[f"{factored}.u.weight"] @ after[f"{factored}.v.weight"]
    torch.testing.assert_close(new, old + product(factored, 3))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["low_rank"]["ranks"][factored] == 11
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 2)[0] for name in changed if ".u." in name} == {factored}
    assert len(changed) == 3
    LLM(tmp_path / "merged", **ENGINE).prompt_logits([5, 6, 7])  # loads and runs


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    name = "model.layers.0.self_attn.v_proj"
    good = {f"{name}.lora_A": torch.zeros(4, 48), f"{name}.lora_B": torch.zeros(24, 4)}
    for tensors, settings, message in (
        (good, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (good, {"use_dora": True}, "use_dora = True"),
        (good, {"bias": "all"}, "bias = 'all'"),
        ({f"{name}.lora_A": torch.zeros(4, 48)}, {}, "lora_A alone"),
        ({**good, f"{name}.lora_B": torch.zeros(23, 4)}, {}, "do not fit a weight"),
        ({k.replace("v_proj", "x"): v for k, v in good.items()}, {}, "is no linear layer"),
        ({f"{name}.magnitude": torch.zeros(4)}, {}, "magnitude"),
    ):
        adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
        with pytest.raises(ValueError, match=message):
            merge_adapter(model, adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

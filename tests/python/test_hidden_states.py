"""The hidden states that the engine exports against transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, write_model
from deinfer import LLM, SamplingParams
from deinfer.decompose.reference import load_reference
from deinfer.outputs import CompletionOutput
from numpy.typing import NDArray

LAYERS = [2, 0, 1]  # in any order; 2 is the last, after the final norm
RANKS = {"q_proj": 7, "up_proj": 13, "fc1": 13, "out_proj": 9, "o_proj": 9}
PLANS = ["dense", "naive", "rank_gather", "hidden_sharded", "two_collective", "token_sharded"]
SMOLLM2 = Path(__file__).resolve().parents[2] / "build" / "smollm2-135m-instruct"


def prompts(vocabulary: int, lengths: tuple[int, ...] = (1, 17, 40)) -> list[list[int]]:
    numbers = np.random.default_rng(3)
    return [numbers.integers(3, vocabulary, length).tolist() for length in lengths]


def expected_states(
    path: Path, prompt: list[int], tokens: list[int], layers: list[int]
) -> NDArray[np.float32]:
    """States [1 + generated, layers, hidden] at the prompt's last and every generated token."""
    model = load_reference(path, torch.float32)
    with torch.no_grad():
        states = model(torch.tensor([prompt + tokens]), output_hidden_states=True).hidden_states
    rows = [states[layer][0, len(prompt) - 1 :].numpy() for layer in layers]
    return np.stack(rows, axis=1)


def check(
    path: Path, prompt: list[int], sample: CompletionOutput, layers: list[int], every: int
) -> None:
    found = sample.hidden_states
    assert found is not None
    states = expected_states(path, prompt, sample.token_ids, layers)
    assert found.positions == list(range(0, len(sample.token_ids), every))
    means = np.cumsum(states, axis=0) / np.arange(1, len(states) + 1)[:, None, None]
    for got, expected in ((found.states, states), (found.means, means)):
        expected = expected[found.positions]
        assert got.shape == expected.shape
        assert got.dtype == np.float32
        for layer in range(len(layers)):  # their sizes differ much
            scale = np.abs(expected[:, layer]).max()
            np.testing.assert_allclose(got[:, layer], expected[:, layer], atol=1e-4 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    for name, ranks in (("dense", None), ("decomposed", RANKS)):
        path = write_model(tmp_path / name, ranks, family=family)
        llm = LLM(path, num_kv_blocks=64, hidden_state_layers=LAYERS, use_tqdm_on_load=False)
        params = SamplingParams(max_tokens=9, ignore_eos=True, hidden_states=2, seed=5)
        given = prompts(131)
        answers = llm.generate(given, params, use_tqdm=False)
        for prompt, answer in zip(given, answers, strict=True):
            check(path, prompt, answer.outputs[0], LAYERS, 2)


@pytest.mark.parametrize("plan", PLANS)
def test_ranks_give_the_states_of_one(plan: str, tmp_path: Path) -> None:
    for family in ("llama", "olmo2", "opt"):
        path = write_model(tmp_path / family, RANKS, family=family)
        given = prompts(131, (1, 17, 40, 90))
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, hidden_states=1)
        llm = LLM(
            path,
            num_kv_blocks=64,
            tensor_parallel_size=3,
            tensor_parallel_plan=plan,
            exchange_chunks=3,
            num_threads=1,
            hidden_state_layers=LAYERS,
            use_tqdm_on_load=False,
        )
        for prompt, answer in zip(given, llm.generate(given, params, use_tqdm=False), strict=True):
            check(path, prompt, answer.outputs[0], LAYERS, 1)


def test_states_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", RANKS)
    shared = prompts(131, (40,))[0]
    given = [shared[: 20 + i] + [3 + i] for i in range(8)]
    params = [
        SamplingParams(
            max_tokens=30,
            ignore_eos=True,
            hidden_states=7,
            seed=i,
            n=1 + i % 2,
            expected_tokens=25 - 10 * (i % 3),
        )
        for i in range(len(given))
    ]

    def run(one_by_one: bool, **arguments: object) -> list[NDArray[np.float32]]:
        llm = LLM(path, hidden_state_layers=LAYERS, use_tqdm_on_load=False, **arguments)
        if one_by_one:
            outputs = [
                llm.generate(prompt, own, use_tqdm=False)[0]
                for prompt, own in zip(given, params, strict=True)
            ]
        else:
            outputs = llm.generate(given, params, use_tqdm=False)
        preempted.append(llm.stats.num_preemptions)
        hits.append(llm.stats.prefix_hit_tokens)
        recomputed.append(llm.stats.recomputed_tokens)
        states = [sample.hidden_states for output in outputs for sample in output.outputs]
        assert all(found is not None and found.positions[-1] == 28 for found in states)
        return [part for found in states if found for part in (found.states, found.means)]

    preempted: list[int] = []
    hits: list[int] = []
    recomputed: list[int] = []
    alone = run(True, num_kv_blocks=64, enable_prefix_caching=False, num_threads=1)
    restarts: dict[str, object] = {
        "scheduling_policy": "static_bucket",
        "recompute": "restart",
        "bucket_width": 10,
        "bucket_batch_sizes": [1],
    }
    for arguments in (
        {"num_kv_blocks": 12},  # preempts
        {"num_kv_blocks": 64, **restarts},  # many outlive their bucket
        {"num_kv_blocks": 64, "max_num_batched_tokens": 11, "num_threads": 3},  # chunks of prompts
        {"num_kv_blocks": 64, "max_num_seqs": 3},
    ):
        for got, expected in zip(run(False, **arguments), alone, strict=True):
            np.testing.assert_array_equal(got, expected)
    assert preempted[1] > 0
    assert recomputed[2] > 0
    assert hits[-1] > 0


def test_only_what_was_asked_for_is_reported(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    llm = LLM(path, num_kv_blocks=64, hidden_state_layers=[1], use_tqdm_on_load=False)
    params = [
        SamplingParams(max_tokens=5, ignore_eos=True),
        SamplingParams(max_tokens=5, ignore_eos=True, hidden_states=0, n=2),
    ]
    plain, asked = llm.generate([[5, 6], [5, 6]], params, use_tqdm=False)
    assert plain.outputs[0].hidden_states is None
    for sample in asked.outputs:
        assert sample.hidden_states is not None
        assert sample.hidden_states.positions == [0]
        assert sample.hidden_states.states.shape == (1, 1, 48)
        np.testing.assert_array_equal(sample.hidden_states.states, sample.hidden_states.means)


def test_bad_layers_and_requests_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    for layers, message in (
        ([3], "holds 3; the model has hidden states 0 to 2"),
        ([1, 1], "1 twice"),
    ):
        with pytest.raises(ValueError, match=message):
            LLM(path, num_kv_blocks=8, hidden_state_layers=layers, use_tqdm_on_load=False)
    llm = LLM(path, num_kv_blocks=8, use_tqdm_on_load=False)
    with pytest.raises(
        ValueError, match="hidden_states=0 needs an engine with hidden_state_layers"
    ):
        llm.generate([[5]], SamplingParams(hidden_states=0), use_tqdm=False)
    with pytest.raises(ValueError, match="hidden_states must be at least 0, got -1"):
        SamplingParams(hidden_states=-1)


@pytest.mark.skipif(
    not (SMOLLM2 / "config.json").is_file(), reason="needs `make build/smollm2-135m-instruct`"
)
def test_states_of_smollm2() -> None:
    layers = [0, 15, 20, 30]
    llm = LLM(
        SMOLLM2,
        dtype="float32",
        num_kv_blocks=64,
        hidden_state_layers=layers,
        use_tqdm_on_load=False,
    )
    prompt = prompts(40000, (33,))[0]
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, hidden_states=1)
    answer = llm.generate([prompt], params, use_tqdm=False)[0]
    check(SMOLLM2, prompt, answer.outputs[0], layers, 1)

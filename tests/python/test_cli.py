"""The `deinfer` command, run as a user runs it, and what `import deinfer` costs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deinfer
import pytest
from conftest import write_model, write_tokenizer
from deinfer import demo
from deinfer.cli import chat, main
from deinfer.cli.options import UsageError, engine_arguments

ENGINE = ("--num-threads", "1", "--kv-cache-bytes", str(1 << 22))


def run(*arguments: Any, stdin: str = "", env: dict[str, str] | None = None) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "deinfer", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )


def succeed(*arguments: Any, stdin: str = "") -> str:
    result = run(*arguments, stdin=stdin)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return str(result.stdout)


def fail(status: int, *arguments: Any, stdin: str = "") -> str:
    """Run a command that must fail; returns its one line of complaint."""
    result = run(*arguments, stdin=stdin)
    lines = result.stderr.splitlines()
    assert result.returncode == status, result.stderr
    assert len(lines) == 1 and lines[0].startswith("deinfer: error: "), result.stderr
    return str(lines[0])


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process, for tests of many; status, output, errors."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_import_is_fast_and_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import deinfer; "
        "seconds = time.perf_counter() - start; "
        "heavy = sorted({'torch', 'transformers', 'numpy', 'deinfer._C'} & set(sys.modules)); "
        "print(seconds, heavy); "
        "deinfer.LLM, deinfer.SamplingParams; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules))); "
        "print(set(deinfer.__all__) <= set(dir(deinfer)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second, third = result.stdout.splitlines()
    seconds, heavy = first.split(maxsplit=1)
    assert float(seconds) < 1
    assert heavy == second == "[]" and third == "True"


def test_generating_needs_no_torch(lowrank_model: Path) -> None:
    code = (
        "import sys, deinfer; "
        f"llm = deinfer.LLM({str(lowrank_model)!r}, num_threads=1, kv_cache_bytes=1 << 20); "
        "llm.chat([{'role': 'user', 'content': 'hi'}]); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("False\n", "")


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="LLMs"):
        _ = deinfer.LLMs


def test_version() -> None:
    assert succeed("--version") == f"deinfer {deinfer.__version__}\n"


@pytest.mark.parametrize("name", ["info", "decompose", "generate", "chat", "eval", "plan"])
def test_help_teaches_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([name, "--help"], ["--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        text = capsys.readouterr().out
        assert "examples:\n" in text and f"deinfer {name} " in text


def test_generate(tiny_model: Path) -> None:
    base = ("generate", tiny_model, *ENGINE, "--max-tokens", 8, "--ignore-eos")
    report = json.loads(succeed(*base, "--prompt", "The sky", "--prompt", "One", "--json"))
    assert report["generated_tokens"] == 16
    assert [r["prompt"] for r in report["requests"]] == ["The sky", "One"]
    (sample,) = report["requests"][0]["outputs"]
    assert len(sample["token_ids"]) == 8 and sample["finish_reason"] == "length"
    # Streamed, from an option or from standard input: the same text.
    assert succeed(*base, "--prompt", "The sky") == sample["text"] + "\n"
    assert succeed(*base, stdin="The sky\n") == sample["text"] + "\n"
    both = succeed(*base, "--prompt", "The sky", "--prompt", "One")
    assert "--- The sky\n" in both and "--- One\n" in both


def test_ranks_and_plans_are_options(tiny_model: Path) -> None:
    base = ("generate", tiny_model, *ENGINE, "--max-tokens", 8, "--prompt", "The sky")
    ranks = ("--dtype", "float32", "--tensor-parallel-size", 2, "--tensor-parallel-plan", "naive")
    assert succeed(*base, *ranks) == succeed(*base, "--dtype", "float32")
    assert "naivete" in fail(2, *base, *ranks[:-1], "naivete")


def test_the_fields_of_the_engine_are_options() -> None:
    from deinfer import _C
    from deinfer.cli import options
    from deinfer.sampling_params import field_names

    # The model is the argument MODEL; KV blocks are sized by --kv-cache-bytes; the others are for
    # tests, or belong to what a request asks for.
    own = {"model", "num_kv_blocks", "block_size", "hidden_state_layers", "seed"}
    own |= {"emulated_link", "exchange_chunks", "enable_prefix_caching"}
    flags = [name for name, _, _ in options._ENGINE]
    assert sorted(flags) == sorted(set(field_names(_C.EngineConfig)) - own)


def test_the_scheduler_has_options(tiny_model: Path, tmp_path: Path) -> None:
    base = ("generate", tiny_model, *ENGINE, "--max-tokens", 8, "--prompt", "The sky")
    plain = succeed(*base)
    log = tmp_path / "events.jsonl"
    given = ("--kv-watermark", 0.1, "--max-pause", 0, "--preempt-limit", 1, "--bucket-width", 20)
    static = ("--scheduling-policy", "static_bucket", "--static-group", 8, "--recompute", "restart")
    sizes = ("--static-batch-size", 2, "--bucket-batch-sizes", "4,3")
    assert succeed(*base, *given, *static, *sizes, "--event-log", log) == plain
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    setup, events = lines[0], lines[1:]
    assert setup["format"] == "deinfer.event_log" and setup["policy"] == "static_bucket"
    assert setup["scheduler"]["watermark"] == 0.1 and setup["scheduler"]["max_pause"] == 0
    assert setup["scheduler"]["preempt_limit"] == 1
    policy = setup["policy_config"]
    assert policy["bucket_batch_sizes"] == [4, 3] and policy["batch_size"] == 2
    assert policy["group"] == 8 and policy["bucket_width"] == 20 and policy["restart_failures"]
    # One prompt: a step that computes it, and one for each of the other tokens.
    assert [next(iter(event)) for event in events].count("update") == 8
    assert events[0]["add"]["max_new_tokens"] == 8
    assert "kv_watermark" in fail(2, *base, "--kv-watermark", 1.5)
    assert "event_log" in fail(2, *base, "--event-log", tmp_path / "no" / "log")
    assert "integers" in fail(2, *base, "--bucket-batch-sizes", "4,x")


def test_generate_chat_and_samples(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("The sky\n\nOne\n")
    report = json.loads(
        succeed(
            *(
                "generate",
                tiny_model,
                *ENGINE,
                "--prompts",
                file,
                "--chat",
                "--system",
                "Be brief.",
            ),
            *("--n", 3, "--temperature", 2, "--seed", 5, "--max-tokens", 4, "--json"),
        )
    )
    assert [len(r["outputs"]) for r in report["requests"]] == [3, 3]
    assert all(r["prompt_tokens"] > 20 for r in report["requests"])


def test_chat_from_a_pipe(tiny_model: Path) -> None:
    base = ("chat", tiny_model, *ENGINE, "--max-tokens", 6)
    once = succeed(*base, stdin="hello\n")
    assert succeed(*base, stdin="\nhello\n/clear\nhello\n/exit\nhello\n") == once * 2
    base = (*base, "--temperature", 2, "--seed", 1)
    once = succeed(*base, stdin="hello\n")
    again = succeed(*base, stdin="hello\nhello\n")
    assert again.startswith(once) and again != once * 2  # the second answer has seen the first
    assert succeed(*base, stdin="") == ""


def test_chat_is_one_sequence_unless_asked(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(options: argparse.Namespace) -> None:
        asked.append(engine_arguments(options)["max_num_seqs"])
        raise UsageError("enough")

    monkeypatch.setattr(chat, "load_model", load)
    for more in ([], ["--max-num-seqs", "3"]):
        assert main(["chat", str(tiny_model), *more]) == 2
    assert asked == [1, 3]


def test_chat_goes_on_after_a_question_that_is_too_long(tiny_model: Path) -> None:
    base = ("chat", tiny_model, *ENGINE, "--max-tokens", 6)
    result = run(*base, stdin="hello " * 300 + "\nhello\n")
    assert result.returncode == 0
    assert result.stdout == succeed(*base, stdin="hello\n")
    assert "deinfer: error: " in result.stderr and "max_model_len" in result.stderr


def test_interrupting_an_answer_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted:
        def stream(self, *_: Any, **__: Any) -> Any:
            sample = deinfer.CompletionOutput(0, "The sky", [3])
            yield deinfer.RequestOutput(0, None, [1], None, [sample], False)
            raise KeyboardInterrupt

    answer = chat._answer(Interrupted(), [], deinfer.SamplingParams())  # type: ignore[arg-type]
    assert answer == "The sky"
    assert capsys.readouterr().out == "The sky [interrupted]\n"


def test_eval(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The capital of France is Paris. " * 10)
    report = json.loads(succeed("eval", tiny_model, *ENGINE, "--text", file, "--json"))
    assert report["perplexity"] > 1 and report["tokens"] > 50 and report["window"] == 255
    assert "perplexity" in succeed("eval", tiny_model, *ENGINE, "--text", file, "--window", 32)


def test_argument_errors(
    tiny_model: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    assert "'/nowhere' is not a directory" in fail(2, "info", "/nowhere")
    (tmp_path / "latin").write_bytes(b"\xe9\xe9")
    for text, arguments in (
        ("COMMAND", ()),
        ("'frobnicate'", ("frobnicate",)),
        ("--bogus", ("info", tiny_model, "--bogus")),
        ("no config.json", ("chat", tmp_path)),
        ("'many'", ("generate", tiny_model, "--max-tokens", "many")),
        ("-1", ("generate", tiny_model, "--prompt", "x", "--temperature", "-1")),
        ("--system needs --chat", ("generate", tiny_model, "--prompt", "x", "--system", "y")),
        ("tpu", ("generate", tiny_model, "--prompt", "x", "--device", "tpu")),
        (
            'scheduling_policy="lifo"',
            ("generate", tiny_model, "--prompt", "x", "--scheduling-policy", "lifo"),
        ),
        (
            'admission="all"',
            ("generate", tiny_model, "--prompt", "x", "--admission", "all"),
        ),
        ("promote_after", ("generate", tiny_model, "--prompt", "x", "--promote-after", "nan")),
        (
            'tensor_parallel_plan="magic"',
            ("generate", tiny_model, "--prompt", "x", "--tensor-parallel-plan", "magic"),
        ),
        ("num_threads", ("generate", tiny_model, "--prompt", "x", "--num-threads", "-3")),
        ("cannot read", ("eval", tiny_model, "--text", tmp_path / "none")),
        ("not UTF-8", ("eval", tiny_model, "--text", tmp_path / "latin")),
        ("1.5", ("decompose", tiny_model, tmp_path / "new", "--keep", "1.5")),
        ("exists", ("decompose", tiny_model, tmp_path)),
        ("'magic'", ("decompose", tiny_model, tmp_path / "new", "--method", "magic")),
    ):
        status, output, errors = command(*arguments)
        assert (status, output, errors.count("\n")) == (2, "", 1)
        assert errors.startswith("deinfer: error: ") and text in errors
    assert "no prompt" in fail(2, "generate", tiny_model)


def test_failures(tmp_path: Path) -> None:
    write_model(tmp_path, write_tokenizer(tmp_path, chat_template=None))
    assert "chat template" in fail(1, "generate", tmp_path, *ENGINE, "--chat", "--prompt", "x")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    assert "safetensors" in fail(1, "generate", tmp_path, *ENGINE, "--prompt", "x")
    debug = run("generate", tmp_path, "--prompt", "x", env={"DEINFER_DEBUG": "1"})
    assert debug.returncode == 1 and "Traceback" in debug.stderr


def test_reader_that_leaves_early(tiny_model: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "deinfer", "info", str(tiny_model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


def test_interrupt(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "deinfer", "chat", str(tiny_model), *ENGINE]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has what it runs in the background ignore the signal, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        process.stdout.read(1)  # it is answering, so signal handling is in place
        for _ in range(3):  # the first may only end the answer; then it waits for the next line
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
                break
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "deinfer: interrupted\n")


def test_decompose(tiny_model: Path, tmp_path: Path) -> None:
    destination = tmp_path / "low"
    options = ("--method", "svd", "--keep", 0.5, "--rank-multiple", 4)
    report = json.loads(succeed("decompose", tiny_model, destination, *options, "--json"))
    assert 0.3 < report["keep"] <= 0.55 and report["method"] == "svd"
    info = json.loads(succeed("info", destination, "--json"))
    assert info["supported"] and info["decomposed_matrices"] == 14
    assert info["ranks"] == report["ranks"]
    succeed("generate", destination, *ENGINE, "--prompt", "The sky", "--max-tokens", 3)


def test_demo_with_models_of_an_earlier_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr(demo, "LLM", partial(deinfer.LLM, num_threads=1))
    # Measured times of a tiny model are noise, which may even leave no valid round.
    speed = deinfer.Speed(100.0, {1: 10.0, 16: 20.0})
    monkeypatch.setattr(demo, "measure_speed", lambda llms: [speed] * len(llms))
    ranks = {"model.layers.0.mlp.up_proj": 16}
    for name, own in (("", None), ("-keep0.8", ranks)):
        path = tmp_path / f"smollm2-135m-instruct{name}"
        size = write_tokenizer(path)
        write_model(path, size, ranks=own, max_position_embeddings=1024)
    config = json.loads((path / "config.json").read_text())
    config["low_rank"] |= {"rank_multiple": 8, "recovery_steps": 12}
    (path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("deinfer.decompose.decompose_model", lambda *_, **__: pytest.fail("again"))
    assert demo.main(["--build-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 90 for line in lines if "|" in line)
    assert sum(line.startswith("Q: ") for line in lines) == 3
    assert any(line.startswith("perplexity (held-out)") for line in lines)
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["keep"] == 0.8 and report["seconds"] > 0
    for side in ("dense", "decomposed"):
        assert len(report[side]["answers"]) == 3
        assert all(report[side][key] > 0 for key in report[side] if key != "answers")
    assert report["decomposed"]["parameters"] < report["dense"]["parameters"]
    # Another keep, or other settings, means another model.
    assert demo._is_decomposed(path, 0.8)
    assert not demo._is_decomposed(path, 0.7) and not demo._is_decomposed(tmp_path, 0.8)
    config["low_rank"]["recovery_steps"] = 0
    (path / "config.json").write_text(json.dumps(config))
    assert not demo._is_decomposed(path, 0.8)


def test_a_source_tree_has_no_cmake_directory_to_print() -> None:
    assert "cmake --install build/cpu" in fail(2, "--cmake-dir")

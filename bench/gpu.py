"""Build, check and measure the CUDA engine on one NVIDIA GPU.

    python bench/gpu.py            # everything; cut to fit 8 minutes of an H100, which nobody timed
    python bench/gpu.py --check    # and exit with 1 where a target is missed

Builds the preset `gpu`, runs the tests that are labelled cuda on the device (1,000 replays of a
step, and 100,000 exchanges among 8 ranks, are some) and those of torch's ops, compares greedy
tokens with the CPU engine's (of --smollm2, where there is such a folder), and measures the engine
with random weights in the shape of LLaMA-7B at keep 0.5, and dense with fewer layers, in bf16 and
(decode of 1) in int8, beside what the device itself can do: its read bandwidth and its rate of bf16
products, and the same products by torch (cuBLAS) in a CUDA graph. Then it checks every
tensor-parallel plan with up to 8 ranks on the device (gpu_ranks.py). Writes
bench/results/gpu-DEVICE-DATE.json. It has never run: there was no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import gpu_checks
import gpu_ranks
from common import ROOT, Check

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
KEEP = 0.5
DENSE_LAYERS = 8  # of the dense shape: 2 GB, which no cache holds
CONTEXT = 1024
BATCHES = (1, 16, 64, 128)
PREFILL = 2048
STEPS = 24
READ_BYTES = 6 << 30
Shapes = list[tuple[int, int]]


class NoDeviceError(Exception):
    """There is nothing here to measure."""


def find_device(run: Callable[..., Any] = subprocess.run) -> dict[str, str]:
    """Name and driver of the first GPU.

    Raises:
        NoDeviceError: There is none, or no driver.
    """
    fields = ["name", "driver_version"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoDeviceError("no NVIDIA GPU here: nvidia-smi is not installed") from error
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        said = (result.stderr or result.stdout).strip()
        raise NoDeviceError(f"no NVIDIA GPU here: nvidia-smi says {said!r}")
    return dict(zip(fields, (part.strip() for part in lines[0].split(",")), strict=True))


def result_name(device: str, date: datetime.date) -> str:
    """What the results file is called."""
    return f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-{date.isoformat()}"


def products(config: dict[str, int], keep: float) -> Shapes:
    """The shapes (n, k) of the products of a step, head included; `keep` 0 stands for dense."""
    from random_llama import layer_linears, rank_of

    shapes: Shapes = []
    for layer in range(config["num_hidden_layers"]):
        for n, k in layer_linears(config, layer).values():
            rank = rank_of(n, k, keep) if keep else 0
            shapes += [(rank, k), (n, rank)] if rank else [(n, k)]
    return [*shapes, (config["vocab_size"], config["hidden_size"])]


class Stepper:
    """An engine whose steps are timed one by one."""

    def __init__(
        self, model: Path, device: str, max_batch: int, context: int, dtype: str = "bfloat16"
    ) -> None:
        from deinfer import _C

        self.prompt = context
        tokens = context + STEPS + 2 * max_batch
        config = _C.EngineConfig(
            model=str(model),
            device=device,
            dtype=dtype,
            max_model_len=tokens,
            max_num_seqs=max_batch,
            max_num_batched_tokens=max(context, 256),
            num_kv_blocks=(tokens // 16 + 1) * max_batch,
            enable_prefix_caching=False,
        )
        self.engine = _C.Engine(config)
        self.numbers = random.Random(0)

    def _submit(self, new: int, **sampling: float) -> None:
        from deinfer import SamplingParams

        most = self.engine.model_info.vocab_size
        ids = [self.numbers.randrange(3, most) for _ in range(self.prompt)]
        params = SamplingParams(max_tokens=new, ignore_eos=True, **{"temperature": 0, **sampling})
        self.engine.submit(ids, params)

    def _step(self) -> tuple[float, float]:
        """Milliseconds of a step, and those of them within the model."""
        before = self.engine.stats.execute_us
        start = time.perf_counter()
        self.engine.step()
        total = 1e3 * (time.perf_counter() - start)
        return total, (self.engine.stats.execute_us - before) / 1e3

    def prefill(self) -> list[float]:
        """Steps of one whole prompt each, in milliseconds, after one to warm up."""
        times = []
        for _ in range(6):
            self._submit(1)
            times.append(self._step()[0])
        return times[1:]

    def decode(
        self,
        batch: int,
        watch: Callable[[Callable[[], object]], None] | None = None,
        **sampling: float,
    ) -> tuple[list[float], float]:
        """Steps of `batch` sequences in milliseconds, and the share of them outside the model.

        `watch` is given a function that makes one more step; `sampling` are SamplingParams.
        """
        for _ in range(batch):
            # The first decodes while prompts of others run.
            self._submit(STEPS + 2 * batch, **sampling)
        self._step()
        while self.engine.stats.num_waiting:
            self._step()
        for _ in range(4):  # the last prompt, and the capture of the graph
            self._step()
        steps = [self._step() for _ in range(STEPS - 8)]
        if watch:
            watch(self.engine.step)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        total = sum(step[0] for step in steps)
        return [step[0] for step in steps], 1 - sum(step[1] for step in steps) / total


def timed_graph(body: Callable[[], object], rounds: int = 20) -> list[float]:
    """Milliseconds of replays of `body` in a CUDA graph of torch."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def ceilings() -> dict[str, float]:
    """What the device can do: bytes read and operations of bf16 products, per second."""
    import torch

    data = torch.ones(READ_BYTES // 4, dtype=torch.float32, device="cuda")
    read = min(timed_graph(data.sum))
    del data
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = min(timed_graph(lambda: a @ b))
    return {
        "read_gb_per_s": READ_BYTES / read / 1e6,
        "bf16_tflop_per_s": 2 * size**3 / product / 1e9,
    }


def torch_products(shapes: Shapes, m: int) -> list[float]:
    """Milliseconds of torch's products of m tokens with cold weights of these shapes."""
    import torch

    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for n, k in shapes]
    inputs = {k: torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _, k in shapes}

    def run() -> None:
        for weight in weights:
            inputs[weight.shape[1]] @ weight.T

    return timed_graph(run)


def judge(measured: dict[str, Any]) -> list[Check]:
    """The checks on what measure() and the tests gave."""
    checks = [
        Check("device tests failed", measured["failed_tests"], 0, at_least=False),
        Check("tests of torch's ops failed", measured["failed_torch_tests"], 0, at_least=False),
    ]
    if measured["sanitizer"] is not None:
        found = len(measured["sanitizer"])
        checks.append(Check("findings of compute-sanitizer", found, 0, at_least=False))
    if agreement := measured["agreement"]:
        others = len(agreement["others"])
        checks.append(Check("answers that differ, no ties", others, 0, at_least=False))
    engine = {name: statistics.median(times) for name, times in measured["engine_ms"].items()}
    torch_ms = {name: statistics.median(times) for name, times in measured["torch_ms"].items()}
    bound = 1e3 * measured["weight_bytes"] / (measured["ceilings"]["read_gb_per_s"] * 1e9)
    checks += [
        Check("decode of 1 [ms]", engine["decode 1"], 4.5, at_least=False),
        Check(
            "decode of 1 / torch", engine["decode 1"] / torch_ms["decode 1"], 0.75, at_least=False
        ),
        Check("bandwidth bound / decode of 1", bound / engine["decode 1"], 0.5),
    ]
    dense = 1e3 * measured["dense_bytes"] / (measured["ceilings"]["read_gb_per_s"] * 1e9)
    checks.append(Check("bandwidth bound / dense decode of 1", dense / engine["dense 1"], 0.7))
    for shape, int8 in (("decode 1", "int8 1"), ("dense 1", "dense int8 1")):
        checks.append(Check(f"{shape}: bf16 / int8", engine[shape] / engine[int8], 1.4))
    for name in ("decode 16", "decode 128", "prefill"):
        checks.append(Check(f"torch's products / {name}", torch_ms[name] / engine[name], 0.95))
    overhead = measured["outside_model"]["decode 64"]
    idle = 1 - measured["busy_ms"]["decode 64"] / engine["decode 64"]
    sampled = engine["sampled 64"] / engine["decode 64"]
    return [
        *checks,
        Check("outside the model, decode of 64", overhead, 0.05, at_least=False),
        Check("no kernel runs, decode of 64", idle, 0.05, at_least=False),
        Check("sampled / greedy decode of 64", sampled, 1.05, at_least=False),
        *gpu_ranks.judge(measured["ranks"]),
    ]


def measure(folder: Path, smollm2: Path) -> dict[str, Any]:
    """All times, on the device, and how its answers agree with the CPU's."""
    from random_llama import write_random_llama

    has_model = (smollm2 / "config.json").is_file()
    agreement = gpu_checks.agreement(smollm2) if has_model else None
    if not has_model:
        print(f"answers are not compared: there is no model in {smollm2}")
    model = write_random_llama(folder / "llama-7b-keep0.5", keep=KEEP, **LLAMA_7B)
    results: dict[str, Any] = {"engine_ms": {}, "outside_model": {}, "busy_ms": {}}
    results |= {"ceilings": ceilings(), "agreement": agreement}
    shapes = products(LLAMA_7B, KEEP)
    results["torch_ms"] = {f"decode {m}": torch_products(shapes, m) for m in BATCHES}
    results["torch_ms"]["prefill"] = torch_products(shapes[:-1], PREFILL)
    results["weight_bytes"] = 2 * sum(n * k for n, k in shapes)
    stepper = Stepper(model, "cuda", max(BATCHES), CONTEXT)

    def watch(step: Callable[[], object]) -> None:
        results["busy_ms"]["decode 64"] = gpu_checks.busy_ms(step)

    for m in BATCHES:
        times, outside = stepper.decode(m, watch if m == 64 else None)
        results["engine_ms"][f"decode {m}"] = times
        results["outside_model"][f"decode {m}"] = outside
    sampling = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}
    results["engine_ms"]["sampled 64"] = stepper.decode(64, **sampling)[0]
    del stepper
    few = {**LLAMA_7B, "num_hidden_layers": DENSE_LAYERS}
    dense = write_random_llama(folder / "llama-7b-dense", **few)
    results["dense_bytes"] = 2 * sum(n * k for n, k in products(few, 0))
    results["engine_ms"]["dense 1"] = Stepper(dense, "cuda", 1, CONTEXT).decode(1)[0]
    for name, path in (("int8 1", model), ("dense int8 1", dense)):
        results["engine_ms"][name] = Stepper(path, "cuda", 1, CONTEXT, "int8").decode(1)[0]
    results["engine_ms"]["prefill"] = Stepper(model, "cuda", 1, PREFILL).prefill()
    return results


def build() -> Path:
    """Builds for the device; a folder with the Python package."""
    configure = ["cmake", "--preset", "gpu", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", "--preset", "gpu"]):
        subprocess.run(command, cwd=ROOT, check=True)
    package = ROOT / "build" / "gpu" / "python"
    shutil.copytree(
        ROOT / "python" / "deinfer",
        package / "deinfer",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.so*"),
    )
    return package


def failed_tests() -> int:
    """Runs the tests on the device; how many failed."""
    run = subprocess.run(["ctest", "--preset", "gpu"], cwd=ROOT, capture_output=True, text=True)
    print(run.stdout)
    found = re.search(r"(\d+) tests failed out of", run.stdout)
    return int(found[1]) if found else int(run.returncode != 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; 2 where there is no device."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "gpu" / "models")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="run the kernel tests under compute-sanitizer, too (many minutes)",
    )
    parser.add_argument(
        "--smollm2",
        type=Path,
        default=ROOT / "build" / "smollm2-135m-instruct-keep0.8",
        help="SmolLM2 at keep 0.8, as `make demo` leaves it",
    )
    parser.add_argument("--measure", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        device = find_device()
    except NoDeviceError as error:
        print(f"bench/gpu.py: {error}", file=sys.stderr)
        return 2
    if options.measure:  # within the package that was built for the device
        options.measure.write_text(json.dumps(measure(options.models, options.smollm2)))
        return 0
    package = build()
    failed = failed_tests()
    out = ROOT / "build" / "gpu" / "measured.json"
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, __file__, "--measure", str(out), "--models", str(options.models)]
    command += ["--smollm2", str(options.smollm2)]
    subprocess.run(command, env=environment, check=True)
    ranks = ROOT / "build" / "gpu" / "ranks.json"
    # In a process of its own, whose CUDA nobody has set up before.
    command = [sys.executable, gpu_ranks.__file__, str(options.models), "--out", str(ranks)]
    subprocess.run(command, env=environment, check=True)
    tests = ROOT / "build" / "gpu" / "tests" / "cpp"
    measured = {
        "failed_tests": failed,
        "sanitizer": gpu_checks.sanitizer_findings(tests) if options.sanitize else None,
        "failed_torch_tests": gpu_checks.failed_torch_tests(package),
        **json.loads(out.read_text()),
        "ranks": json.loads(ranks.read_text()),
    }
    results = {"environment": {**common.environment(), **device}, **measured}
    name = result_name(device["name"], datetime.date.today())
    common.finish(name, results, judge(measured), None, options.check)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""libdeinfer_bench by ctypes: our operations and the machine's limits, timed in native code.

Every `run(calls)` returns the seconds that each of its calls took.
"""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
import subprocess
import sys
import weakref
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from common import ROOT

BUILD = ROOT / "build" / "cpu"
LIBRARY = BUILD / "bench" / "native" / "libdeinfer_bench.so"
MIN_PEAK_ITERATIONS = 100_000
SLICE_BYTES = 16 << 20  # about as long a call as a linear at m = 1

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "error": (c_char_p, []),
    "isa": (c_char_p, []),
    "instruction": (c_char_p, []),
    "team_create": (c_void_p, [c_int]),
    "team_destroy": (None, [c_void_p]),
    "stream_create": (c_void_p, [c_void_p, c_size_t]),
    "stream_destroy": (None, [c_void_p]),
    "stream": (c_int, [c_void_p, c_void_p, c_size_t, c_int, c_int, POINTER(c_double)]),
    "peak_flops": (c_int, []),
    "peak": (c_int, [c_void_p, c_int64, c_int, POINTER(c_double)]),
    "linear_create": (
        c_void_p,
        [c_void_p, c_char_p, c_char_p, c_void_p, c_void_p, c_int, c_int, c_int],
    ),
    "linear_destroy": (None, [c_void_p]),
    "linear_bytes": (c_double, [c_void_p]),
    "linear_unpack": (c_int, [c_void_p, POINTER(c_float), POINTER(c_float)]),
    "workspace_create": (c_void_p, [c_void_p, c_int, c_void_p]),
    "workspace_destroy": (None, [c_void_p]),
    "workspace_output": (POINTER(c_float), [c_void_p]),
    "run": (c_int, [c_void_p, c_void_p, POINTER(c_void_p), c_int, POINTER(c_double)]),
    "group_create": (c_void_p, [c_int, c_size_t]),
    "group_destroy": (None, [c_void_p]),
    "all_reduce": (c_int, [c_void_p, c_size_t, c_int, POINTER(c_double)]),
    "latent_create": (c_void_p, [c_void_p, c_char_p] + 6 * [c_int]),
    "latent_destroy": (None, [c_void_p]),
    "latent_run": (c_int, [c_void_p, c_void_p, c_int, POINTER(c_double)]),
    "latent_output": (c_int, [c_void_p, POINTER(c_float)]),
    "schedule": (
        c_char_p,
        [c_char_p, c_int, POINTER(c_double), POINTER(c_int), POINTER(c_int)]
        + 3 * [c_int]
        + 2 * [POINTER(c_float)]
        + 3 * [POINTER(c_double)],
    ),
    "schedule_soak": (c_char_p, [c_char_p, c_int, c_int]),
}


def build() -> Path:
    """Build the library when its sources have changed; its path."""
    environment = {**os.environ}
    # The virtual environment's cmake and ninja, also when it is not activated.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    cache = BUILD / "CMakeCache.txt"
    if not cache.is_file() or "DEINFER_BENCH:BOOL=ON" not in cache.read_text():
        configure = ["cmake", "--preset", "cpu", f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run(configure, cwd=ROOT, env=environment, check=True)
    command = ["cmake", "--build", "--preset", "cpu", "--target", "deinfer_bench"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    return LIBRARY


@functools.cache
def _library() -> dict[str, Callable[..., Any]]:
    library = ctypes.CDLL(str(build()))
    functions = {}
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"bench_{name}")
        function.restype = result
        function.argtypes = arguments
        functions[name] = function
    return functions


def call(name: str, *arguments: Any) -> Any:
    """The result of a native function; RuntimeError with its message when it failed."""
    result = _library()[name](*arguments)
    restype = _SIGNATURES[name][0]
    if (restype is c_int and result < 0) or (restype in (c_void_p, c_char_p) and result is None):
        raise RuntimeError(_library()["error"]().decode())
    return result


def isa() -> str:
    """The instruction set of the kernels."""
    return str(call("isa").decode())


def instruction() -> str:
    """The instruction by which they multiply bf16, whose rate Peak measures."""
    return str(call("instruction").decode())


class _Handle:
    """Owner of a native object of one kind ("team", ...)."""

    def __init__(self, kind: str, *arguments: Any) -> None:
        self.handle = c_void_p(call(f"{kind}_create", *arguments))
        weakref.finalize(self, _library()[f"{kind}_destroy"], self.handle)


class Team(_Handle):
    """The thread team of a rank: the calling thread and threads - 1 others."""

    def __init__(self, threads: int) -> None:
        super().__init__("team", threads)
        self.threads = threads


class Stream(_Handle):
    """Memory in huge pages that is read from one end to the other."""

    def __init__(self, team: Team, size: int) -> None:
        super().__init__("stream", team.handle, size)
        self.next = 0

    @staticmethod
    def slice_bytes(team: Team) -> int:
        """What one call reads."""
        part = SLICE_BYTES // team.threads // 4096 * 4096
        return part * team.threads

    def run(self, team: Team, calls: int) -> list[float]:
        times = (c_double * calls)()
        size = self.slice_bytes(team)
        call("stream", team.handle, self.handle, size, self.next, calls, times)
        self.next += calls
        return [time * 1e-9 for time in times]

    def bandwidth(self, team: Team) -> float:
        """Bytes/s now: the median of a tenth of a second or so, after a warm-up."""
        times = self.run(team, 256)
        return self.slice_bytes(team) / statistics.median(times[32:])


class Peak:
    """The dot instruction on registers only, on every thread.

    A call has about as many floating point operations as are asked for (and takes at least a
    fraction of a millisecond), so that a disturbance meets it as it would meet a linear.
    """

    def __init__(self, team: Team, flops: float) -> None:
        per_iteration = float(call("peak_flops")) * team.threads
        self.team = team
        self.iterations = max(MIN_PEAK_ITERATIONS, round(flops / per_iteration))
        self.flops = self.iterations * per_iteration

    def run(self, calls: int) -> list[float]:
        times = (c_double * calls)()
        call("peak", self.team.handle, self.iterations, calls, times)
        return [time * 1e-9 for time in times]


class LatentLayer(_Handle):
    """Attention of one decoded token over one layer's cache of a sequence, in bf16.

    Kinds: "dense"; "v_latent", K dense; "latent"; "rebuild_all", which copies all latents and
    rebuilds all K and V before a dense attention. Latents are the same in all kinds.
    """

    def __init__(
        self,
        team: Team,
        kind: str,
        *,
        rotary: bool,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rank: int,
        context: int,
    ) -> None:
        self.team = team
        self.width = heads * head_dim
        sizes = (int(rotary), heads, kv_heads, head_dim, rank, context)
        super().__init__("latent", team.handle, kind.encode(), *sizes)

    def run(self, calls: int) -> list[float]:
        times = (c_double * calls)()
        call("latent_run", self.team.handle, self.handle, calls, times)
        return [time * 1e-9 for time in times]

    def output(self) -> torch.Tensor:
        """[heads * head_dim] of the last run."""
        out = torch.empty(self.width, dtype=torch.float32)
        call("latent_output", self.handle, ctypes.cast(out.data_ptr(), POINTER(c_float)))
        return out


class Linear(_Handle):
    """Packed weights: dense of (W[n, k],), or low-rank of (U[n, r], V[r, k])."""

    def __init__(self, team: Team, dtype: str, weights: tuple[torch.Tensor, ...]) -> None:
        weights = tuple(weight.contiguous() for weight in weights)
        first, last = weights[0], weights[-1]
        rank = first.shape[1] if len(weights) == 2 else 0
        if rank and last.shape[0] != rank:
            raise ValueError(f"U{list(first.shape)} and V{list(last.shape)} do not fit together")
        self.shapes = [weight.shape for weight in weights]
        self.activations = torch.float32 if dtype == "float32" else torch.bfloat16
        super().__init__(
            "linear",
            team.handle,
            dtype.encode(),
            str(first.dtype).removeprefix("torch.").encode(),
            first.data_ptr(),
            last.data_ptr(),
            first.shape[0],
            last.shape[1],
            rank,
        )

    @property
    def bytes(self) -> float:
        """Bytes of the weights as stored, scales included, padding not."""
        return float(call("linear_bytes", self.handle))

    def unpack(self) -> tuple[torch.Tensor, ...]:
        """The stored weights as fp32, shaped as they were given."""
        weights = tuple(torch.empty(shape, dtype=torch.float32) for shape in self.shapes)
        pointers = [ctypes.cast(weight.data_ptr(), POINTER(c_float)) for weight in weights]
        call("linear_unpack", self.handle, pointers[0], pointers[-1])
        return weights


class Rotation:
    """Linears of one shape and type that take turns on the input x[m, k]."""

    def __init__(self, team: Team, linears: list[Linear], x: torch.Tensor) -> None:
        self.team = team
        self.linears = linears
        self.shape = (x.shape[0], linears[0].shapes[0][0])
        if x.shape[1] != linears[0].shapes[-1][1]:
            raise ValueError(f"x{list(x.shape)} is no input of weights {linears[0].shapes}")
        x = x.to(linears[0].activations).contiguous()
        self.workspace = _Handle("workspace", linears[0].handle, x.shape[0], x.data_ptr())
        self.next = 0

    def run(self, calls: int) -> list[float]:
        turns = [(self.next + call) % len(self.linears) for call in range(calls)]
        self.next += calls
        handles = (c_void_p * calls)(*[self.linears[turn].handle.value for turn in turns])
        times = (c_double * calls)()
        call("run", self.team.handle, self.workspace.handle, handles, calls, times)
        return [time * 1e-9 for time in times]

    def once(self) -> torch.Tensor:
        """One call's result y[m, n], fp32."""
        self.run(1)
        output = torch.empty(self.shape, dtype=torch.float32)
        ctypes.memmove(
            output.data_ptr(),
            call("workspace_output", self.workspace.handle),
            output.numel() * output.element_size(),
        )
        return output


class LocalRanks(_Handle):
    """A group of ranks that are threads of this process: the calling thread and size - 1 others."""

    def __init__(self, size: int, max_floats: int) -> None:
        super().__init__("group", size, 4 * max_floats)

    def all_reduce(self, floats: int, calls: int) -> list[float]:
        """Sums so many floats over the ranks."""
        times = (c_double * calls)()
        call("all_reduce", self.handle, floats, calls, times)
        return [time * 1e-9 for time in times]

"""Our all-reduce among two ranks against Gloo's (torch.distributed), in one run.

Ours are two threads of one process, Gloo's two processes. They take turns in every round, on the
same cores and unpinned; while one side runs, the other sleeps. A time is what a call takes in a
row of calls. Ratios are taken within a round; their median counts.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import native_cpu as native
import torch
from common import ROOT, Check, environment, finish, summary
from linear_cases import round_ratios
from timing import Run, interleave
from torch import distributed

RANKS = 2
SIZES = [1 << 10, 16 << 10, 256 << 10, 4 << 20]  # bytes of fp32
TARGETS = {16 << 10: 5.0}  # how many times faster than Gloo


def size_name(size: int) -> str:
    """E.g. 16 KB, of 1024 bytes."""
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def join_gloo(rank: int, store: str) -> None:
    """Makes this process a rank of the Gloo group."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )


def gloo_calls(floats: int, calls: int) -> list[float]:
    """Seconds of each all-reduce on this rank, after one that is verified."""
    data = torch.full((floats,), float(distributed.get_rank() + 1))
    distributed.all_reduce(data)
    if not bool((data == RANKS * (RANKS + 1) / 2).all()):
        raise RuntimeError(f"Gloo: wrong sums of {floats} floats")
    data.zero_()  # sums of sums would overflow
    distributed.barrier()
    times = []
    before = time.perf_counter()
    for _ in range(calls):
        distributed.all_reduce(data)
        now = time.perf_counter()
        times.append(now - before)
        before = now
    return times


def gloo_peer(store: str, requests: Connection) -> None:
    """The other rank: takes part in what rank 0 asks for, until it asks for nothing."""
    join_gloo(1, store)
    while (request := requests.recv()) is not None:
        gloo_calls(*request)
    distributed.destroy_process_group()


class Gloo:
    """A Gloo group of this process (rank 0) and another one."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        context = multiprocessing.get_context("spawn")
        self.requests, theirs = context.Pipe()
        self.peer = context.Process(target=gloo_peer, args=(store, theirs), daemon=True)
        self.peer.start()
        join_gloo(0, store)

    def close(self) -> None:
        """Ends the other process."""
        self.requests.send(None)
        distributed.destroy_process_group()
        self.peer.join(10)
        self.folder.cleanup()

    def all_reduce(self, floats: int, calls: int) -> list[float]:
        """Sums so many floats over the ranks."""
        self.requests.send((floats, calls))
        return gloo_calls(floats, calls)


def measure(
    ours: native.LocalRanks, gloo: Gloo, size: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Both sides on `size` bytes."""
    floats = size // 4
    runs: dict[str, Run] = {
        "ours": lambda calls: ours.all_reduce(floats, calls),
        "gloo": lambda calls: gloo.all_reduce(floats, calls),
    }
    samples = interleave(runs, rounds, seconds)
    return {
        "bytes": size,
        "seconds": {name: summary(times) for name, times in samples.items()},
        "speedup": round_ratios(samples["gloo"], samples["ours"]),
    }


def main() -> None:
    """Run the comparison and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, help="default: 15, or 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="short, to see that it works")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--out", type=Path, help="default: bench/results, build with --quick")
    options = parser.parse_args()
    rounds = options.rounds if options.rounds is not None else (2 if options.quick else 15)
    if rounds < 1:
        raise SystemExit(f"--rounds {rounds}: there must be at least 1")
    if len(os.sched_getaffinity(0)) < RANKS:
        raise SystemExit(f"{RANKS} ranks need as many cores")
    if options.quick and options.out is None:
        options.out = ROOT / "build" / "collectives-quick.json"

    results: dict[str, Any] = {
        "name": "collectives",
        **environment(),
        "torch": torch.__version__,
        "ranks": RANKS,
        "rounds": rounds,
        "quick": options.quick,
        "all_reduce": [],
    }
    checks = []
    ours = native.LocalRanks(RANKS, max(SIZES) // 4)
    with contextlib.closing(Gloo()) as gloo:
        for size in SIZES:
            case = measure(ours, gloo, size, rounds, 0.02 if options.quick else 0.1)
            results["all_reduce"].append(case)
            micros = {name: 1e6 * t["median"] for name, t in case["seconds"].items()}
            speedup = case["speedup"]["median"]
            print(
                f"all_reduce {size_name(size):>6}: ours {micros['ours']:8.1f} us, "
                f"Gloo {micros['gloo']:8.1f} us, {speedup:.1f} times faster",
                flush=True,
            )
            if size in TARGETS:
                name = f"all_reduce {size_name(size)}: Gloo / ours"
                checks.append(Check(name, speedup, TARGETS[size]))
    finish("collectives", results, checks, options.out, options.check)


if __name__ == "__main__":
    main()

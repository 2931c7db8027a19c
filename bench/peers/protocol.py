"""JSON lines between bench/peers.py and the programs it compares; only the standard library.

A driver first writes one line: {"ready": {...}} with its versions, or {"error": text}. Then each
line it reads gets one line back:

    {"op": "generate", "prompts": [[ids]...], "new": N} -> {"seconds": s, "tokens": [[ids]...]}
    {"op": "score", "prompts": [[ids]...], "answers": [[ids]...]}
        -> {"choices": [[ids]...], "gaps": [[logits]...]}     (only the reference)
    {"op": "quit"} -> the driver exits

A driver generates greedily, ignores end-of-sequence, and blocks in a read while it waits.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Tokens = list[list[int]]


@dataclass(frozen=True)
class Driver:
    """A loaded program."""

    info: dict[str, Any]  # what is worth recording: versions, settings
    generate: Callable[[Tokens, int], Tokens]  # (prompts, new tokens of each) -> the new tokens
    # (prompts, answers) -> at each token of an answer, given those before it: what this program
    # would choose, and how far the token's logit is below that choice's
    score: Callable[[Tokens, Tokens], tuple[Tokens, list[list[float]]]] | None = None


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {name: importlib.metadata.version(name) for name in distributions}


def serve(load: Callable[[argparse.Namespace], Driver]) -> None:
    """Be a driver: parse the arguments, load, answer until told to quit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cpus", type=int, nargs="+", required=True, help="ids; a thread on each")
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True, help="of prompt and answer")
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, options.cpus)
    # Libraries print to stdout; the protocol keeps the real one to itself.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        driver = load(options)
        reply({"ready": driver.info})
        for line in sys.stdin:
            request = json.loads(line)
            if request["op"] == "quit":
                return
            if request["op"] == "generate":
                start = time.perf_counter()
                tokens = driver.generate(request["prompts"], request["new"])
                reply({"seconds": time.perf_counter() - start, "tokens": tokens})
            elif request["op"] == "score" and driver.score:
                choices, gaps = driver.score(request["prompts"], request["answers"])
                reply({"choices": choices, "gaps": gaps})
            else:
                raise ValueError(f"unknown op {request['op']!r}")
    except Exception as error:
        traceback.print_exc()
        reply({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


class PeerError(Exception):
    """A program could not be started, failed, or broke the protocol."""


class Peer:
    """A running driver.

    Args:
        command: Program and arguments.
        env: Its whole environment.
        log: File that receives what it prints.
        load_timeout: Seconds it may take to load.

    Raises:
        PeerError: It cannot be started, fails to load, or takes too long.
    """

    def __init__(
        self, command: list[str], env: dict[str, str], log: Path, load_timeout: float = 900
    ) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("wb") as errors:
                # A session of its own, so that close() reaches its children too.
                self._process = subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                )
        except OSError as error:
            raise PeerError(f"cannot start {command[0]}: {error.strerror}") from error
        try:
            self.info: dict[str, Any] = self._receive(load_timeout)["ready"]
        except KeyError as error:
            self.close()
            raise PeerError("the first line is no 'ready'") from error
        except PeerError:
            self.close()
            raise

    def generate(self, prompts: Tokens, new: int, timeout: float = 1800) -> tuple[float, Tokens]:
        """Let it complete a batch.

        Args:
            prompts: Token ids of each prompt.
            new: Tokens to add to each.
            timeout: Seconds it may take.

        Returns:
            The seconds that it took, and the new tokens [batch][new].

        Raises:
            PeerError: It failed, took too long, or gave another number of tokens.
        """
        reply = self._ask({"op": "generate", "prompts": prompts, "new": new}, timeout)
        tokens = reply["tokens"]
        lengths = [len(answer) for answer in tokens]
        if lengths != [new] * len(prompts):
            raise PeerError(f"asked for {len(prompts)} x {new} tokens, got lengths {lengths[:8]}")
        return reply["seconds"], tokens

    def score(self, prompts: Tokens, answers: Tokens) -> tuple[Tokens, list[list[float]]]:
        """Let the reference judge answers: see `Driver.score`; raises PeerError."""
        reply = self._ask({"op": "score", "prompts": prompts, "answers": answers}, 600)
        return reply["choices"], reply["gaps"]

    def cpu_seconds(self) -> float:
        """CPU time it has used so far, all threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self, patience: float = 10) -> None:
        """Let it quit; end it if it does not within `patience` seconds. Twice does no harm."""
        if self._process.stdin.closed:
            return
        with contextlib.suppress(OSError):
            self._write({"op": "quit"})
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # a broken pipe can fail again as it closes
                pipe.close()

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        try:
            self._write(request)
        except OSError as error:
            raise PeerError(f"has ended{self._last_words()}") from error
        return self._receive(timeout)

    def _write(self, message: dict[str, Any]) -> None:
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, timeout: float) -> dict[str, Any]:
        # Lines alternate, so nothing of a later reply can sit in the buffer unseen by select.
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise PeerError(f"no answer within {timeout:.0f} s{self._last_words()}")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"ended without an answer{self._last_words()}")
        try:
            reply = json.loads(line)
        except json.JSONDecodeError as error:
            raise PeerError(f"wrote {line[:80]!r}, which is not JSON") from error
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""

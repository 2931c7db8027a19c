"""The pure parts of bench/peers.py: protocol, agreement, rates, checks. No peer is needed."""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"

# A driver that answers with the last token of each prompt, counted up.
DRIVER = """
import sys
sys.path.insert(0, {drivers!r})
from protocol import Driver, serve

def load(options):
    print("libraries print to stdout")
    if options.dtype == "unloadable":
        raise ValueError("dtype 'unloadable' is unknown")
    def generate(prompts, new):
        print("even then")
        if new == 13:
            raise RuntimeError("13 tokens are unlucky")
        if new == 14:
            sys.stderr.write("killed by a kernel\\n")
            sys.stderr.flush()
            import os
            os._exit(9)
        if new == 15:
            import time
            time.sleep(60)
        short = new == 16
        return [[p[-1] + i + 1 for i in range(new - short)] for p in prompts]
    def score(prompts, answers):
        choices = [[p[0]] * len(a) for p, a in zip(prompts, answers)]
        return choices, [[0.5] * len(a) for a in answers]
    info = {{"dtype": options.dtype, "cpus": options.cpus, "max": options.max_tokens}}
    return Driver(info, generate, score if options.dtype == "float32" else None)

serve(load)
"""


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """`peers.protocol` and `peers.analysis`, imported as bench/peers.py imports them."""
    sys.path.insert(0, str(BENCH))
    try:
        from peers import analysis, protocol
    finally:
        sys.path.remove(str(BENCH))
    return {"analysis": analysis, "protocol": protocol}


@pytest.fixture
def analysis(modules):
    return modules["analysis"]


@pytest.fixture
def start(modules, tmp_path):
    """Starts the driver above; ends it with the test."""
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER.format(drivers=str(BENCH / "peers"))))
    started = []

    def run(dtype="bf16", **kwargs):
        cpu = min(os.sched_getaffinity(0))
        command = [sys.executable, str(script), "--model", "m", "--cpus", str(cpu)]
        command += ["--max-batch", "4", "--max-tokens", "64", "--dtype", dtype]
        peer = modules["protocol"].Peer(command, dict(os.environ), tmp_path / "log", **kwargs)
        started.append(peer)
        return peer

    yield run
    for peer in started:
        peer.close()


def test_driver_answers_and_quits(start) -> None:
    peer = start()
    cpu = min(os.sched_getaffinity(0))
    assert peer.info == {"dtype": "bf16", "cpus": [cpu], "max": 64}
    for _ in range(2):
        seconds, tokens = peer.generate([[1, 2], [7]], 3)
        assert tokens == [[3, 4, 5], [8, 9, 10]]
        assert 0 < seconds < 5
    peer.close()
    assert peer._process.returncode == 0


def test_a_waiting_driver_uses_no_cpu(start) -> None:
    peer = start()
    peer.generate([[1]], 1)
    before = peer.cpu_seconds()
    assert before > 0
    time.sleep(0.3)
    assert peer.cpu_seconds() - before <= 0.02


def test_failures_are_reported_with_their_reason(start, modules) -> None:
    error = modules["protocol"].PeerError
    with pytest.raises(error, match="ValueError: dtype 'unloadable' is unknown"):
        start("unloadable")
    with pytest.raises(error, match="RuntimeError: 13 tokens are unlucky"):
        start().generate([[1]], 13)
    with pytest.raises(error, match="killed by a kernel"):
        start().generate([[1]], 14)
    with pytest.raises(error, match=r"2 x 16 tokens, got lengths \[15, 15\]"):
        start().generate([[1], [2]], 16)


def test_a_hanging_driver_is_given_up(start, modules) -> None:
    peer = start()
    with pytest.raises(modules["protocol"].PeerError, match=r"no answer within 0 s"):
        peer.generate([[1]], 15, timeout=0.2)
    peer.close(patience=0.1)
    assert peer._process.returncode == -9


def test_a_program_that_is_not_there(modules, tmp_path) -> None:
    with pytest.raises(modules["protocol"].PeerError, match="cannot start no-such-program"):
        modules["protocol"].Peer(["no-such-program"], {}, tmp_path / "log")


def test_only_a_reference_scores(start, modules) -> None:
    choices, gaps = start("float32").score([[4, 5]], [[6, 7, 8]])
    assert choices == [[4, 4, 4]]
    assert gaps == [[0.5, 0.5, 0.5]]
    with pytest.raises(modules["protocol"].PeerError, match="unknown op 'score'"):
        start("bf16").score([[4]], [[5]])


def test_agreement_judges_each_token_after_its_own_beginning(analysis) -> None:
    expected = [[1, 2, 3, 4], [5, 6, 7, 8]]
    zeros = [[0.0] * 4] * 2
    equal = analysis.agreement(expected, expected, expected, zeros, eos=0)
    assert equal == analysis.Agreement(same=1, gap=0, prefix=1)
    # A near tie goes the other way at once; from there on it is consistent with itself.
    answers, choices = [[9, 8, 7, 6], [5, 6, 7, 9]], [[1, 8, 7, 6], [5, 6, 7, 9]]
    gaps = [[0.2, 0, 0, 0], [0, 0, 0, 0]]
    near = analysis.agreement(expected, answers, choices, gaps, eos=0)
    assert near == analysis.Agreement(same=7 / 8, gap=0.2, prefix=(0 + 0.75) / 2)
    assert near.ok


def test_other_tokens_and_far_tokens_are_not_the_same_model(analysis) -> None:
    limit = analysis.MAX_GAP
    assert analysis.Agreement(same=analysis.MIN_SAME, gap=limit, prefix=0).ok
    assert not analysis.Agreement(same=analysis.MIN_SAME - 0.01, gap=0.1, prefix=1).ok
    assert not analysis.Agreement(same=0.99, gap=limit + 0.1, prefix=1).ok


def test_agreement_ends_where_the_reference_would_end(analysis) -> None:
    judged = analysis.agreement(
        [[1, 2, 0, 4]], [[1, 2, 7, 7]], [[1, 2, 0, 3]], [[0.0, 0.0, 9.0, 9.0]], eos=0
    )
    assert judged == analysis.Agreement(same=1, gap=0, prefix=1)
    with pytest.raises(ValueError, match="nothing to compare"):
        analysis.agreement([[0]], [[1]], [[0]], [[9.0]], eos=0)
    with pytest.raises(ValueError, match="lengths differ"):
        analysis.agreement([[1, 2]], [[1]], [[1]], [[0.0]], eos=0)


def test_rates(analysis) -> None:
    assert analysis.prefill_rate(batch=8, prompt=128, first=0.5) == 2048
    assert analysis.decode_rate(batch=8, new=128, first=0.5, last=2.5) == 508
    assert analysis.decode_rate(batch=8, new=128, first=0.5, last=0.5) is None


def test_checks_compare_with_the_best_peer_of_each_key(analysis) -> None:
    peers = {
        "a": {"decode_b1": 100.0, "decode_b8": 300.0, "prefill_b1": 800.0, "prefill_b8": 800.0},
        "b": {"decode_b1": 50.0, "decode_b8": 400.0, "prefill_b1": 1000.0},
    }
    own = {"decode_b1": 160.0, "decode_b8": 700.0, "prefill_b1": 1000.0, "prefill_b8": 880.0}
    checks = {check.name: check for check in analysis.speed_checks(own, peers, [1, 8])}
    assert {name: (check.value, check.target, check.ok) for name, check in checks.items()} == {
        "decode, batch 1, against a": (1.6, 1.5, True),
        "decode, batch 8, against b": (1.75, 1.8, False),
        "prefill, batch 1, against b": (1.0, 1.05, False),
        "prefill, batch 8, against a": (1.1, 1.05, True),
    }


def test_what_was_not_measured_passes_no_check(analysis) -> None:
    own = {"decode_b1": 160.0, "prefill_b1": 1000.0}
    for checks in (
        analysis.speed_checks(own, {}, [1]),
        analysis.speed_checks({}, {"a": own}, [1]),
    ):
        assert len(checks) == 2
        assert all(math.isnan(check.value) and not check.ok for check in checks)
    assert analysis.best_peer({}, "decode_b1")[0] == "none"


def test_batches_without_a_target_are_not_checked_for_decoding(analysis) -> None:
    rates = {"decode_b2": 1.0, "prefill_b2": 2.0}
    names = [check.name for check in analysis.speed_checks(rates, {"a": rates}, [2])]
    assert names == ["prefill, batch 2, against a"]

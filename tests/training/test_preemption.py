"""SIGTERM and SIGINT: where a signal finds work to save, where it does not, and a second one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxdpo.training import preemption
from tests.training.test_watchdog import until

ROOT = Path(__file__).parents[2]


BUSY = """
import hashlib, os, signal, sys, time
from jaxdpo.training.preemption import stop_on_signals
with stop_on_signals(os._exit) as stop:
    stop.unsaved = sys.argv[1] == "unsaved"
    if sys.argv[1] == "fork":
        child = os.fork()
        if child == 0:
            print("ready", flush=True)
            time.sleep(60)
        time.sleep(0.5)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.5)
        sys.exit(0 if os.WTERMSIG(status) == signal.SIGTERM and not stop.requested else 1)
    print("ready", flush=True)
    # Minutes outside of Python, like a compilation.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)
"""


@contextlib.contextmanager
def busy(kind: str) -> Iterator[subprocess.Popen[str]]:
    """A process whose main thread is where no handler runs."""
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, kind], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_sigterm_and_sigint_end_a_busy_process_that_has_nothing_to_save(
    number: signal.Signals,
) -> None:
    with busy("nothing") as process:
        process.send_signal(number)
        assert process.wait(10) == 75


@pytest.mark.slow
def test_a_second_sigterm_ends_a_process_that_has_something_to_save() -> None:
    with busy("unsaved") as process:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) in (128 + signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.slow
def test_sigterm_to_a_forked_worker_does_not_stop_its_parent() -> None:
    with busy("fork") as process:
        assert process.wait(20) == 0


def test_preemption_ends_the_process_at_once_only_if_nothing_is_unsaved() -> None:
    left: list[int] = []
    with preemption.stop_on_signals(left.append) as stop:
        stop.unsaved = True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.requested and left == []
    with preemption.stop_on_signals(left.append) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: left == [75])
        with pytest.raises(preemption.Interrupted):
            stop.poll()
    with preemption.stop_on_signals(left.append) as stop:
        stop.poll()


def test_sigterm_handlers_are_restored_and_a_second_signal_is_the_systems() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with preemption.stop_on_signals() as stop:
        assert signal.getsignal(signal.SIGTERM) is stop and not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before

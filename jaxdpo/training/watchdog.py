"""A run as seen from outside: heartbeat, a watchdog against hangs, and checkpoints on demand.

<run>/heartbeat.json   {"step", "time", "phase"}: its progress; time in seconds since 1970
<run>/save             created by a user who wants a checkpoint now; removed when it is on disk
<run>/stacks-0.txt     stack traces of all threads of process 0 when the watchdog ended it
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxdpo.distributed import processes
from jaxdpo.utils.files import write_json

HANGS = 70
"""Exit status of a process that hung and that the watchdog ended (EX_SOFTWARE)."""
SECONDS_BETWEEN = 1.0
"""Files are read and written at most so often: a step may take a millisecond, and disks be slow."""


class Watchdog:
    """Heartbeat, watchdog and checkpoints on demand; a context manager around the loop.

    The first process reads and writes the files; every process has a watchdog.
    """

    def __init__(self, run_dir: Path, minutes: float, leave: Callable[[int], object] | None = None):
        """Not started yet.

        Args:
            run_dir: the run's folder, which exists.
            minutes: without progress for so long the watchdog ends the process. 0: never.
            leave: ends the process with an exit status, from any thread. None: no watchdog.
        """
        self._folder = run_dir
        self._limit = minutes * 60
        self._leave = leave
        self._step, self._phase = 0, "start"
        self._last_beat = time.monotonic()
        self._paused = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._last_write = self._last_look = -SECONDS_BETWEEN
        self._request: int | None = None
        """Time of the newest <run>/save that was seen; st_mtime_ns."""

    def __enter__(self) -> "Watchdog":
        self.beat()
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        if self._limit > 0 and self._leave is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ended.set()
        jax.monitoring.unregister_event_duration_listener(self._compiled)
        self.beat(phase="failed" if error is not None else "ended")

    def beat(self, step: int | None = None, phase: str | None = None) -> None:
        """Something was finished: restart the watchdog's clock and update heartbeat.json."""
        now = time.monotonic()
        changed = phase is not None and phase != self._phase
        self._last_beat = now
        if changed:
            self._phase = phase
        if step is not None:
            self._step = step
        if processes.is_first() and (changed or now - self._last_write >= SECONDS_BETWEEN):
            self._last_write = now
            self._write_heartbeat()

    def _write_heartbeat(self) -> None:
        heartbeat = {"step": self._step, "time": time.time(), "phase": self._phase}
        # A full disk is reported by the checkpoints; an outdated heartbeat is a sign by itself.
        with contextlib.suppress(OSError):
            write_json(self._folder / "heartbeat.json", heartbeat, durable=False)

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Around what may take any time, such as a save to a slow disk: it is no hang."""
        before = self._phase
        self.beat(phase=phase)
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self.beat(phase=before)

    def save_wanted(self) -> bool:
        """Whether <run>/save was created since the last call that returned True."""
        now = time.monotonic()
        if not processes.is_first() or now - self._last_look < SECONDS_BETWEEN:
            return False
        self._last_look = now
        try:
            created = (self._folder / "save").stat().st_mtime_ns
        except OSError:
            return False
        is_new = created != self._request
        self._request = created
        return is_new

    def saved(self) -> None:
        """The checkpoint that was asked for is on disk."""
        (self._folder / "save").unlink(missing_ok=True)

    def _compiled(self, event: str, duration_secs: float, **_: Any) -> None:
        """Compiling may take longer than any step; a compiled program is progress."""
        del duration_secs
        if event.endswith("backend_compile_duration"):
            self._last_beat = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(SECONDS_BETWEEN, self._limit / 10)):
            silent = time.monotonic() - self._last_beat
            if silent > self._limit and not self._paused:
                self._end_process(silent)
                return

    def _end_process(self, silent: float) -> None:
        """Not an exception in the main thread: it hangs outside of Python and would not see it."""
        path = self._folder / f"stacks-{jax.process_index()}.txt"
        text = (
            f"no step was finished for {silent:.0f} s "
            f"(train.watchdog_minutes={self._limit / 60:g}); phase {self._phase}, "
            f"step {self._step}. The process ends; the same command resumes from the newest "
            "checkpoint. Stack traces of all threads:\n"
        )
        os.write(2, f"\n{text}".encode())
        faulthandler.dump_traceback(2)
        with contextlib.suppress(OSError), path.open("w") as file:
            file.write(text)
            file.flush()
            faulthandler.dump_traceback(file)
        assert self._leave is not None
        self._leave(HANGS)

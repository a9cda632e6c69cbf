"""What a run tells those who watch it from outside, and what it takes from them.

<run>/heartbeat.json   {"step", "time", "phase"}: how far it has come, and when it said so last (seconds since 1970)
<run>/save             made by someone who wants a checkpoint now; removed when it is on disk
<run>/stacks-0.txt     what every thread of process 0 was doing when the watchdog ended it
"""

import contextlib
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxdpo.distributed import processes

HANGS = 70
"""Exit status of a process that the watchdog ended."""
SECONDS_BETWEEN = 1.0
"""Files are looked at and written at most so often."""


class Watch:
    """Heartbeat, watchdog and the wish for a checkpoint; a context manager around the loop.

    The first process has the files; every process has a watchdog.
    """

    def __init__(self, run_dir: Path, minutes: float, leave: Callable[[int], object] | None = None):
        """Watch a run.

        Args:
            run_dir: the run's folder, which exists.
            minutes: without a beat for so long the watchdog ends the process. 0: it never does.
            leave: ends the process with a status, from any thread. None: there is no watchdog.
        """
        self._folder, self._limit, self._leave = run_dir, minutes * 60, leave
        self._step, self._phase = 0, "start"
        self._beat = time.monotonic()
        self._paused = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._guard, name="watchdog", daemon=True)
        self._written = self._looked = -SECONDS_BETWEEN
        self._wish: int | None = None

    def __enter__(self) -> "Watch":
        self.beat()
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        if self._limit > 0 and self._leave is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._over.set()
        jax.monitoring.unregister_event_duration_listener(self._compiled)
        self.beat(phase="failed" if error is not None else "ended")

    def beat(self, step: int | None = None, phase: str | None = None) -> None:
        """Something got done: the watchdog counts anew, and the heartbeat is told."""
        now, changed = time.monotonic(), phase not in (None, self._phase)
        self._beat, self._phase = now, phase or self._phase
        self._step = self._step if step is None else step
        if processes.is_first() and (changed or now - self._written >= SECONDS_BETWEEN):
            self._written = now
            self._tell()

    def _tell(self) -> None:
        draft = self._folder / ".heartbeat.json"
        with contextlib.suppress(
            OSError
        ):  # a full disk is for the checkpoints to tell; a heartbeat that stays old is a sign itself
            draft.write_text(
                json.dumps({"step": self._step, "time": time.time(), "phase": self._phase})
            )
            draft.replace(self._folder / "heartbeat.json")

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Around what may take any time, such as a save to a slow disk: the watchdog does not count."""
        before = self._phase
        self.beat(phase=phase)
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self.beat(phase=before)

    def save_wanted(self) -> bool:
        """Whether someone has made <run>/save since the last time that this was true."""
        now = time.monotonic()
        if not processes.is_first() or now - self._looked < SECONDS_BETWEEN:
            return False
        self._looked = now
        try:
            made = (self._folder / "save").stat().st_mtime_ns
        except OSError:
            return False
        before, self._wish = self._wish, made
        return made != before

    def saved(self) -> None:
        """The checkpoint that someone wanted is on disk."""
        (self._folder / "save").unlink(missing_ok=True)

    def _compiled(self, event: str, duration_secs: float, **_: Any) -> None:
        """Compiling takes long and is no step; having compiled is progress."""
        del duration_secs
        if event.endswith("backend_compile_duration"):
            self._beat = time.monotonic()

    def _guard(self) -> None:
        while not self._over.wait(min(SECONDS_BETWEEN, self._limit / 10)):
            silent = time.monotonic() - self._beat
            if silent > self._limit and not self._paused:
                self._end(silent)
                return

    def _end(self, silent: float) -> None:
        path = self._folder / f"stacks-{jax.process_index()}.txt"
        text = (
            f"no step was finished for {silent:.0f} s (train.watchdog_minutes={self._limit / 60:g}); phase {self._phase}, "
            f"step {self._step}. The process ends; the same command resumes from the newest checkpoint. What each thread does:\n"
        )
        os.write(2, f"\n{text}".encode())
        faulthandler.dump_traceback(2)
        with contextlib.suppress(OSError), path.open("w") as file:
            file.write(text)
            file.flush()
            faulthandler.dump_traceback(file)
        assert self._leave is not None
        self._leave(HANGS)

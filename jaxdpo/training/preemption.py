"""SIGTERM (preemption) and Ctrl-C: finish the step, save a checkpoint and exit with status 75.

Python runs a signal handler when its main thread returns to the interpreter, which may take minutes
while XLA compiles; clusters kill sooner. So where no work would be lost, a second thread, which the
kernel wakes through a pipe, ends the process at once. That leaves on disk what a SIGKILL leaves,
and a start copes with it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from jaxdpo.distributed import processes
from jaxdpo.utils.early_signals import REQUEUE, SIGNALS


class Interrupted(Exception):
    """A signal asked to stop, and what was being done was abandoned."""


class Stop:
    """The signal handler, and whether a signal came. A second signal ends the process at once.

    Attributes:
        requested: a signal came.
        unsaved: work was done that is in no checkpoint.
    """

    def __init__(self, leave: Callable[[int], object] | None = None):
        """No signal yet.

        Args:
            leave: ends the process with an exit status, from any thread. None: nothing happens
                until the main thread looks at `requested`.
        """
        self.requested = False
        self.unsaved = False
        self._leave = leave

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler, run by the main thread."""
        del frame
        signal.signal(number, signal.SIG_DFL)
        self.requested = True
        # Not print: the signal may have come in the middle of one, whose buffer is locked.
        os.write(2, b"\nstopping after this step; signal again to stop at once\n")

    def poll(self) -> None:
        """Stop here if asked to; called by all processes between parts of abandonable work.

        Raises:
            Interrupted: a signal came, to any of the processes.
        """
        if processes.any_of(self.requested):
            raise Interrupted

    def watch(self, wakeups: int) -> None:
        """In a thread of its own: read signal numbers from a pipe until its other end is closed."""
        count = 0
        while number := os.read(wakeups, 1):
            if number[0] not in SIGNALS or self._leave is None:
                continue
            count += 1
            if count > 1:
                self._leave(128 + number[0])  # as a shell reports a process ended by this signal
            elif not self.unsaved:
                os.write(2, b"\nstopped; there was nothing new to save\n")
                self._leave(REQUEUE)


@contextlib.contextmanager
def stop_on_signals(leave: Callable[[int], object] | None = None) -> Iterator[Stop]:
    """Within it, SIGTERM and SIGINT ask for a stop instead of ending the process.

    Args:
        leave: as Stop takes it.
    """
    stop = Stop(leave)
    wakeups, wakeup_fd = os.pipe()
    os.set_blocking(wakeup_fd, False)  # set_wakeup_fd demands it
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    previous_fd = signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)
    watcher = threading.Thread(target=stop.watch, args=(wakeups,), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(wakeup_fd)
        watcher.join()
        os.close(wakeups)


def _reset_in_child() -> None:
    """A forked data worker is ended by its own signals, and must not wake its parent's watcher."""
    if isinstance(signal.getsignal(signal.SIGTERM), Stop):
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_reset_in_child)

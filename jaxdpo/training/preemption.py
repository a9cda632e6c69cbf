"""SIGTERM and Ctrl-C at any moment: finish the step, save and leave; leave at once where there is nothing to save.

Python runs a signal's handler when its main thread comes back to Python, which a compilation may take minutes to do. Where no work would
be lost, nothing needs the main thread: a second thread, which the system itself wakes, ends the process as it is. Whatever such an end
leaves on disk is what a SIGKILL leaves, and a start copes with that.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from jaxdpo.distributed import processes

REQUEUE = 75
"""Exit status of a run that a signal stopped: the same command goes on."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A signal asked to stop, and what was going on was given up."""


class Stop:
    """Set by a signal. A second one ends the process at once.

    Attributes:
        requested: a signal came.
        unsaved: work has been done that is in no checkpoint.
    """

    def __init__(self, leave: Callable[[int], object] | None = None):
        """`leave` ends the process with a status, from any thread; None: the main thread has to look at `requested`."""
        self.requested = False
        self.unsaved = False
        self._leave = leave

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        del frame
        signal.signal(number, signal.SIG_DFL)
        self.requested = True
        os.write(2, b"\nstopping after this step; signal again to stop at once\n")

    def poll(self) -> None:
        """To be called by all processes between the parts of what can be given up.

        Raises:
            Interrupted: a signal came, to any of them.
        """
        if processes.any_of(self.requested):
            raise Interrupted

    def watch(self, arrivals: int) -> None:
        """In a thread of its own: read the numbers of signals as they come, until the other end is closed."""
        came = 0
        while number := os.read(arrivals, 1):
            if number[0] not in SIGNALS or self._leave is None:
                continue
            came += 1
            if came > 1:
                self._leave(128 + number[0])
            elif not self.unsaved:
                os.write(2, b"\nstopped; there was nothing new to save\n")
                self._leave(REQUEUE)


@contextlib.contextmanager
def stop_on_signals(leave: Callable[[int], object] | None = None) -> Iterator[Stop]:
    """Within it SIGTERM and SIGINT ask for a stop instead of ending the process; see Stop for `leave`."""
    stop = Stop(leave)
    arrivals, wake = os.pipe()
    os.set_blocking(wake, False)
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    woken_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    watcher = threading.Thread(target=stop.watch, args=(arrivals,), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(woken_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake)
        watcher.join()
        os.close(arrivals)


def _forget_in_child() -> None:
    """A forked worker is ended by its own signals, and must not wake its parent's watcher."""
    if isinstance(signal.getsignal(signal.SIGTERM), Stop):
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)

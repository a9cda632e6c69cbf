"""SIGTERM and Ctrl-C while a command still imports: nothing is lost, so it ends with 75 at once.

Imports nothing that is slow: JAX alone takes seconds, during which Python's own handlers would end
the process by the signal, which launchers take for a fault.
"""

import os
import signal
from types import FrameType

REQUEUE = 75
"""Exit status of a run that a signal stopped (EX_TEMPFAIL): the same command resumes it."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def exit_on_signals() -> None:
    """From now on, until other handlers are installed, SIGTERM and SIGINT end this process with
    status 75."""
    for number in SIGNALS:
        signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, b"\nstopped before the run began; there was nothing to save\n")
    os._exit(REQUEUE)

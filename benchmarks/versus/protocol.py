"""How the driver talks to a worker: one JSON object a line.

Standard library only, as both environments import it. A worker starts, trains its first step and
reports it. Then it gets one request at a time:

    {"do": "prepare"}                                get ready for all steps of the plan, untimed
    {"do": "round", "phase": "grouped", "steps": 2}  train the next steps of a phase -> seconds
    {"do": "quit"}

Rounds come in the order of the plan: after the first step, a round of each phase in turn.
"""

import json
import os
import resource
import sys
from typing import Any


class Channel:
    """A worker's end. It takes stdout; whatever else the worker prints goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, **message: Any) -> None:
        """Answer, with the peak memory of this process so far in bytes."""
        print(json.dumps({**message, "peak_bytes": peak_bytes()}), file=self._out, flush=True)

    def receive(self) -> dict[str, Any]:
        """Wait for the next request."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "quit"}


def peak_bytes() -> int:
    """The largest resident memory of this process so far (ru_maxrss, which Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

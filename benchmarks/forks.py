"""Processes of `python -m jaxdpo.train` that share their imports: a server that forks.

The server imports once and forks for each command, before JAX has devices. A fork has its own
process id, is ended by signals, and runs the command's main from its first line on. This saves the
ten seconds of imports that each of a hundred starts would take.

    python -m benchmarks.forks

reads lines of JSON, {"argv", "before", "out"}, and answers each with the process id and, when the
process has ended, with its exit status.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from jaxdpo.train import main

ROOT = Path(__file__).parent.parent


class Forked:
    """A fork of the server, with the methods of subprocess.Popen."""

    def __init__(self, server: "Server", pid: int):
        """The newest process of the server."""
        self.pid, self._server, self._ended, self._code = pid, server, threading.Event(), 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        self._code = int(self._server.answer())
        self._ended.set()

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._code if self._ended.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal.

        Raises:
            TimeoutExpired: it is still running.
        """
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("fork", timeout or 0)
        return self._code

    def send_signal(self, number: signal.Signals) -> None:
        """Signal it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Server:
    """The importing process. It has one fork at a time."""

    def __init__(self, env: dict[str, str]):
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.forks"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> str:
        """Its next line."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def start(self, argv: list[str], before: str, out: Path) -> Forked:
        """Run jaxdpo.train's main in a fork.

        Args:
            argv: the command's options.
            before: Python source to run first.
            out: file that the output is appended to.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps({"argv": argv, "before": before, "out": str(out)}) + "\n"
        )
        self._process.stdin.flush()
        return Forked(self, int(self.answer()))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """Fork for each line of standard input."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            exec(request["before"], {})
            code = 1
            try:
                code = main(request["argv"], leave=os._exit)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()

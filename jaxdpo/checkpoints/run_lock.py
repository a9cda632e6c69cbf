"""One owner for a run folder: <run>/.lock, from before the first file is touched to the end.

    {"host", "pid", "since", "kernel", "command", "options", "token"}   who owns the folder

The lock itself is the kernel's (flock): of several starts at once exactly one gets it, and it is
gone with its process, however that ended. The content is for people, and for folders that several
machines share. There, flock may hold for all of them (NFS) or only on each by itself (nolock,
most FUSE); so the owner also touches the file every BEAT_SECONDS, and an owner on another machine
whose file was not touched for STALE_SECONDS is dead. A process of the same kernel needs no such
wait: if its lock is free, it is dead.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxdpo.config.addresses import remote_paths
from jaxdpo.distributed import processes
from jaxdpo.utils.files import make_writable, pattern_problem

LOCK = ".lock"
BEAT_SECONDS = 10.0
"""How often the owner touches the lock."""
STALE_SECONDS = 60.0
"""Without a touch for so long an owner on another machine is dead: several beats, and longer than
network file systems cache the time of a file (NFS's acregmax is 60 s, but opening a file asks its
server)."""
LEASE_SECONDS = 180.0
"""How long a server may hold the lock of a machine that is gone: NFS 4 leases end after 90 s, and
a server that restarts waits for as long."""
EXIT_SECONDS = 10.0
"""How long a killed process may take to give back its memory, during which its lock is not free."""
PAUSE_SECONDS = 0.2
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says on file systems that have no locks: there, content and touches decide alone."""

_EXITING = 0x4
"""PF_EXITING in /proc/<pid>/stat's flags: a process that gives back its memory."""

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


class RunLock:
    """The lock of a run folder; a context manager. Of several processes of one run the first one
    owns the folder for all, and each calls every method at the same point.

    Attributes:
        path: of the lock's file, which is removed when the folder is given back in good order.
    """

    def __init__(self, run_dir: str | Path, options: Mapping[str, Any], *, command: str = "train"):
        """Not taken yet.

        Args:
            run_dir: the run's folder; made if need be.
            options: of the run, as JSON values: whether a second start is the same run.
            command: which command wants the folder.
        """
        self._run_dir = run_dir
        self._folder = Path(run_dir).expanduser().resolve()
        self.path = self._folder / LOCK
        text = json.dumps(options, sort_keys=True)
        self._record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "kernel": _kernel(),
            "command": command,
            "options": hashlib.sha256(text.encode()).hexdigest(),
            "token": secrets.token_hex(8),
        }
        self._descriptor: int | None = None
        self._made: list[Path] = []
        """Folders that this start has made, the innermost first."""
        self._ended = threading.Event()

    def __enter__(self) -> "RunLock":
        """Take the lock.

        Raises:
            ValueError: another process owns the folder, with who it is; or it cannot be written.
        """
        processes.on_first(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def confirm(self) -> None:
        """Check, a moment after the start, that no other machine took the folder at the same time.

        Where flock holds for each machine by itself, the one that wrote last goes on.

        Raises:
            ValueError: another one did, with who it is.
        """
        processes.on_first(self._confirm)

    def _confirm(self) -> None:
        holder = _read(self.path)
        if self._descriptor is not None and holder and holder["token"] != self._record["token"]:
            raise ValueError(self._refusal(holder))

    # ---- taking it ------------------------------------------------------------------------------

    def _take(self) -> None:
        problems = remote_paths({"run_dir": str(self._run_dir)})
        pattern = pattern_problem(self._run_dir)
        if problems or pattern is not None:
            raise ValueError("\n".join(problems) or pattern)
        self._make_folder()
        try:
            self._wait_and_own()
        except OSError as error:
            raise ValueError(
                f"run_dir={self._run_dir}: cannot lock {self.path} ({error.strerror}). "
                "Choose a folder that this user may write to"
            ) from error

    def _wait_and_own(self) -> None:
        """Own the folder once nobody else does, which may be known at once or after a wait.

        Raises:
            ValueError: somebody does.
            OSError: the file cannot be opened or locked.
        """
        started, first_touch, is_told = time.monotonic(), None, False
        while True:
            try:
                descriptor, is_locked = self._open()
            except FileNotFoundError:  # an owner that failed removed the empty folder that it made
                self._make_folder()
                continue
            if descriptor is None:
                continue
            holder = _read(self.path)
            touched, age = os.fstat(descriptor).st_mtime_ns, None
            if holder is not None and holder["kernel"] != self._record["kernel"]:
                age = self._age(descriptor)
            if is_locked and self._is_gone(holder, age):
                self._own(descriptor)
                return
            os.close(descriptor)
            first_touch = first_touch or touched
            waited = time.monotonic() - started
            if holder is None:
                # Between lock and content there is a moment; a full disk may leave it empty.
                may_end = waited < EXIT_SECONDS / 5
            elif age is None:
                # Seen alive twice: a signal that was just sent is not yet seen.
                is_alive = _is_alive(holder["pid"])
                may_end = waited < (PAUSE_SECONDS if is_alive else EXIT_SECONDS)
            else:
                may_end = touched == first_touch and waited < LEASE_SECONDS
            if not may_end:
                raise ValueError(self._refusal(holder))
            if age is not None and not is_told:
                is_told = True
                print(self._waiting(holder), file=sys.stderr, flush=True)
            time.sleep(PAUSE_SECONDS)

    def _open(self) -> tuple[int | None, bool]:
        """The lock's file, and whether this process has its lock now.

        None: the file was removed between opening and locking it, by an owner that ended.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        is_locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_locked = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
        if not self._is_file(descriptor):
            os.close(descriptor)
            return None, False
        return descriptor, is_locked

    def _is_gone(self, holder: Mapping[str, Any] | None, age: float | None) -> bool:
        """Whether nobody owns a lock that was free.

        Args:
            holder: what the file says; None: nothing.
            age: seconds since an owner on another machine touched it; None: it is on this one.
        """
        if holder is None:
            return True
        if age is not None:
            return age > STALE_SECONDS
        # Where there are no locks, a free one says nothing.
        return self._has_locks() or not _is_alive(holder["pid"])

    def _has_locks(self) -> bool:
        """Whether the folder's file system has flock."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True

    def _age(self, descriptor: int) -> float:
        """Seconds since the lock was touched, by the clock of its file system alone."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            now = os.fstat(file.fileno()).st_mtime
        return now - os.fstat(descriptor).st_mtime

    def _own(self, descriptor: int) -> None:
        """Write who owns the folder now, and go on touching the file."""
        self._descriptor = descriptor
        _held.add(descriptor)
        # A full disk is reported by the checkpoints, with the bytes that are missing.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(self._record) + "\n").encode(), 0)
            os.fsync(descriptor)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            descriptor = self._descriptor
            if descriptor is None:
                return
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    def _make_folder(self) -> None:
        for folder in (self._folder, *self._folder.parents):
            if folder.exists():
                break
            self._made.append(folder)
        make_writable(self._folder, self._run_dir)

    def _is_file(self, descriptor: int) -> bool:
        """Whether the lock's name still belongs to this open file."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    # ---- giving it back -------------------------------------------------------------------------

    def _release(self) -> None:
        """Remove the file and give back its lock, and with it folders that stayed empty."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None or descriptor not in _held:  # a forked child holds none
            return
        self._ended.set()
        if self._is_file(descriptor):
            self.path.unlink()
        _held.discard(descriptor)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty: the run wrote something
            for folder in self._made:
                folder.rmdir()

    def _waiting(self, holder: Mapping[str, Any] | None) -> str:
        """Why nothing happens for a while."""
        assert holder is not None
        return (
            f"run_dir={self._run_dir}: process {holder['pid']} on {holder['host']} has not given "
            f"it back. Waiting for {STALE_SECONDS:.0f} s or a little more, to see whether it is "
            "still there"
        )

    def _refusal(self, holder: Mapping[str, Any] | None) -> str:
        """Who owns the folder, and what to do."""
        name = f"run_dir={self._run_dir}"
        if holder is None:
            return (
                f"{name}: another process uses it ({self.path} is locked and does not say by "
                "which). Wait for it, or use another run_dir"
            )
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        end = f"kill -TERM {holder['pid']} on {holder['host']} saves and ends it"
        if holder["command"] != "train" or self._record["command"] != "train":
            text = f"{name}: jaxdpo.{holder['command']} is using it ({who}). Wait for its end"
        elif holder["options"] == self._record["options"]:
            text = (
                f"{name}: this run is going on already ({who}), so it was not started again. "
                f"metrics.jsonl there shows how far it is; {end}"
            )
        else:
            text = (
                f"{name}: a run with other options is going on there ({who}). "
                f"Use another run_dir; {end}"
            )
        if holder["kernel"] != self._record["kernel"]:
            text += f". If that machine is gone for good, remove {self.path}"
        return text


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock's file says; None: nothing, or not all of it."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = ("host", "pid", "since", "kernel", "command", "options", "token")
    if not isinstance(holder, dict) or any(key not in holder for key in known):
        return None
    return holder


def _kernel() -> str:
    """A name of this running kernel: containers on one machine share it, and their locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine is there and is not ending, by SIGKILL or by itself."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # not Linux, or hidden from this user
        return True
    state, flags = fields[0], int(fields[6])
    pending = 0
    for line in status.splitlines():
        if line.startswith(("SigPnd:", "ShdPnd:")):
            pending |= int(line.split()[1], base=16)
    is_ending = state in ("Z", "X") or flags & _EXITING or pending >> (signal.SIGKILL - 1) & 1
    return not is_ending


def _forget_in_child() -> None:
    """A forked data worker must not keep the lock of a parent that was killed."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)

"""Records to the columns of a table, in this process or in several.

Other processes are started only for sets that are worth it, with nothing imported but what encodes. Records are dealt out in lots and
come back in order, so the number of processes changes the time and nothing else.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from jaxdpo.data.formats.preference import Dropped, Preference
from jaxdpo.data.pair_table import EncodedPair, to_columns
from jaxdpo.data.report import DataReport

logger = logging.getLogger(__name__)

RECORDS_AT_ONCE = 512
ALONE = 8 * RECORDS_AT_ONCE
"""Records that are encoded here before other processes are started: they take seconds to start."""
LOTS_AT_ONCE = 16
"""Lots for each process that may be in memory: what this process gets done while others start."""
MAX_PROCESSES = 32
TELL_EVERY = 10.0
"""Seconds between lines that tell how far it is."""


class Encodes(Protocol):
    """What turns records into pairs (chat.Encoder)."""

    def encode(self, records: list[Preference]) -> list[EncodedPair | Dropped]:
        """Each to a pair or to the reason why it is of no use."""
        ...

    def spells_special(self, record: Preference) -> bool:
        """Whether its text contains a special token's spelling."""
        ...


@dataclasses.dataclass(frozen=True)
class EncodedChunk:
    """Some records, encoded."""

    columns: dict[str, np.ndarray]
    kept: int
    dropped: list[tuple[Dropped, str]]
    """Each with the record's id."""
    special_text: int
    verbatim: int


def encode_lot(encoder: Encodes, records: list[Preference], source: int) -> EncodedChunk:
    """Encode some records of one set."""
    results = encoder.encode(records)
    pairs = [result for result in results if isinstance(result, EncodedPair)]
    dropped = [
        (result, record.id)
        for record, result in zip(records, results, strict=True)
        if isinstance(result, Dropped)
    ]
    special = sum(map(encoder.spells_special, records))
    verbatim = sum(isinstance(record.prompt, str) for record in records)
    columns = to_columns(pairs) | {"sources": np.full(len(pairs), source, np.int32)}
    return EncodedChunk(columns, len(pairs), dropped, special, verbatim)


def encode_records(
    records: Iterable[Preference], report: DataReport, encoder: Encodes, source: int, processes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Columns of the records' pairs, in order; counts what is kept and dropped in the report.

    Args:
        source: which of the sets it is.
        processes: how many encode, this one among them. 0: as many as there are cores.
    """
    records = iter(records)
    lots = iter(lambda: list(itertools.islice(records, RECORDS_AT_ONCE)), [])
    told = time.monotonic()
    with contextlib.closing(
        _encoded(lots, encoder, source, processes or min(usable_cores(), MAX_PROCESSES))
    ) as encoded:
        for lot in encoded:
            report.kept += lot.kept
            report.special_text += lot.special_text
            report.verbatim += lot.verbatim
            for dropped, name in lot.dropped:
                report.drop(dropped, name)
            yield lot.columns
            if time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                logger.info("data: %s: %d pairs encoded", report.name, report.kept)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encoded(
    lots: Iterator[list[Preference]], encoder: Encodes, source: int, processes: int
) -> Generator[EncodedChunk, None, None]:
    """The lots, encoded, in order. This process encodes too, whenever every other has its next lot waiting."""
    for lot in itertools.islice(lots, ALONE // RECORDS_AT_ONCE) if processes > 1 else lots:
        yield encode_lot(encoder, lot, source)
    following = next(lots, None)
    if following is None:
        return
    with Workers(encoder, processes - 1) as workers:
        waiting: collections.deque[concurrent.futures.Future[EncodedChunk]] = collections.deque()
        for lot in itertools.chain([following], lots):
            if sum(not item.done() for item in waiting) < 2 * (processes - 1):
                waiting.append(workers.submit(lot, source))
            else:
                waiting.append(concurrent.futures.Future())
                waiting[-1].set_result(encode_lot(encoder, lot, source))
            while waiting and (waiting[0].done() or len(waiting) > LOTS_AT_ONCE * processes):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Workers:
    """Processes that encode: a thread for each hands it a lot and waits for the answer."""

    def __init__(self, encoder: Encodes, processes: int) -> None:
        self._encoder = pickle.dumps(encoder)
        self._started: list[subprocess.Popen[bytes]] = []
        self._own = threading.local()
        self._pool = concurrent.futures.ThreadPoolExecutor(processes, initializer=self._start)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for process in self._started:
            process.communicate()  # closes its input, which ends it

    def submit(
        self, records: list[Preference], source: int
    ) -> concurrent.futures.Future[EncodedChunk]:
        """Have a lot encoded by whichever process is free."""
        return self._pool.submit(self._ask, (records, source))

    def _start(self) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "jaxdpo.data.tokenize_worker"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._own.process = process
        self._started.append(process)
        assert process.stdin is not None
        process.stdin.write(self._encoder)

    def _ask(self, question: Any) -> EncodedChunk:
        process = self._own.process
        try:
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            raise ValueError(
                f"data: a process that encodes pairs ended with status {process.wait()}, perhaps for want of memory. "
                "Set data.num_proc=1 to encode in one process"
            ) from None

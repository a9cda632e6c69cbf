"""Records to the columns of a table, tokenized in this process or in several.

Worker processes are started only for sets that are worth it. Records are handed out in chunks and
come back in order, so the number of processes changes the time and nothing else.

Not concurrent.futures.ProcessPoolExecutor because its processes import the main module again (JAX
and the command, seconds each, and a script without an `if __name__` guard would start over), and
forking a process with JAX's threads can deadlock. The workers import what tokenizes, nothing else.
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

CHUNK_SIZE = 512
"""Records of a chunk: about a megabyte of text, so sending it costs little next to encoding."""
ALONE = 8 * CHUNK_SIZE
"""Records that are encoded here before workers are started: they take seconds to start."""
MAX_CHUNKS = 16
"""Chunks for each process that may be in memory: what this process encodes while others start."""
MAX_PROCESSES = 32
"""Most processes by default, chosen and not measured: one of them reads and writes for all.
data.num_proc can ask for more."""
LOG_EVERY = 10.0
"""Seconds between log lines about the progress."""


class Encodes(Protocol):
    """What turns records into pairs (tokenize.Encoder)."""

    def encode(self, records: list[Preference]) -> list[EncodedPair | Dropped]:
        """Each to a pair or to the reason why it is dropped."""
        ...

    def spells_special(self, record: Preference) -> bool:
        """Whether its text contains a special token's spelling."""
        ...

    def strings_spell_special(self, record: Preference) -> bool:
        """Whether it is strings that do, an eos at their end apart."""
        ...


@dataclasses.dataclass(frozen=True)
class EncodedChunk:
    """Some records, encoded."""

    columns: dict[str, np.ndarray]
    kept: int
    dropped: list[tuple[Dropped, str]]
    """Each with the record's id."""
    special_text: int
    """Records whose text spells a special token."""
    special_strings: list[str]
    """Ids of records of strings that spell a special token."""
    verbatim: int
    """Records of plain strings."""
    repeats_prompt: int
    """Records whose two answers begin with the prompt."""
    left_out: dict[str, int]
    """What the chat template left out, and of how many pairs."""
    thinking: int
    """Pairs whose answers begin with thoughts."""


def encode_chunk(encoder: Encodes, records: list[Preference], source: int) -> EncodedChunk:
    """Encode some records of one set."""
    pairs, dropped = [], []
    special_text = verbatim = repeats_prompt = 0
    special_strings = []
    missing: collections.Counter[str] = collections.Counter()
    for record, result in zip(records, encoder.encode(records), strict=True):
        if isinstance(result, Dropped):
            dropped.append((result, record.id))
        else:
            pairs.append(result)
            missing.update(result.left_out)
        special_text += encoder.spells_special(record)
        if encoder.strings_spell_special(record):
            special_strings.append(record.id)
        verbatim += isinstance(record.prompt, str)
        repeats_prompt += record.repeats_prompt
    thinking = sum(pair.is_open for pair in pairs)
    columns = to_columns(pairs)
    columns["sources"] = np.full(len(pairs), source, np.int32)
    return EncodedChunk(
        columns=columns,
        kept=len(pairs),
        dropped=dropped,
        special_text=special_text,
        special_strings=special_strings,
        verbatim=verbatim,
        repeats_prompt=repeats_prompt,
        left_out=dict(missing),
        thinking=thinking,
    )


def encode_records(
    records: Iterable[Preference], report: DataReport, encoder: Encodes, source: int, processes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Columns of the records' pairs, in order; counts what is kept and dropped in the report.

    Args:
        source: which of the data sets it is.
        processes: how many encode, this one among them. 0: as many as there are cores.
    """
    if not processes:
        processes = min(usable_cores(), MAX_PROCESSES)
    last_log = time.monotonic()
    with contextlib.closing(_encoded(_chunks(records), encoder, source, processes)) as encoded:
        for chunk in encoded:
            report.kept += chunk.kept
            report.special_text += chunk.special_text
            report.verbatim += chunk.verbatim
            report.repeats_prompt += chunk.repeats_prompt
            report.thinking += chunk.thinking
            report.count_special_strings(chunk.special_strings)
            for name, count in chunk.left_out.items():
                report.left_out[name] = report.left_out.get(name, 0) + count
            for dropped, name in chunk.dropped:
                report.drop(dropped, name)
            yield chunk.columns
            if time.monotonic() - last_log > LOG_EVERY:
                last_log = time.monotonic()
                logger.info("data: %s: %d pairs encoded", report.name, report.kept)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chunks(records: Iterable[Preference]) -> Iterator[list[Preference]]:
    records = iter(records)
    while chunk := list(itertools.islice(records, CHUNK_SIZE)):
        yield chunk


def _encoded(
    chunks: Iterator[list[Preference]], encoder: Encodes, source: int, processes: int
) -> Generator[EncodedChunk, None, None]:
    """The chunks, encoded, in order."""
    alone = itertools.islice(chunks, ALONE // CHUNK_SIZE) if processes > 1 else chunks
    for chunk in alone:
        yield encode_chunk(encoder, chunk, source)
    following = next(chunks, None)
    if following is None:
        return
    with Workers(encoder, processes - 1) as workers:
        pending: collections.deque[concurrent.futures.Future[EncodedChunk]] = collections.deque()
        for chunk in itertools.chain([following], chunks):
            # This process encodes too, whenever every worker has its next chunk already.
            if sum(not item.done() for item in pending) < 2 * (processes - 1):
                future = workers.submit(chunk, source)
            else:
                future = concurrent.futures.Future()
                future.set_result(encode_chunk(encoder, chunk, source))
            pending.append(future)
            while pending and (pending[0].done() or len(pending) > MAX_CHUNKS * processes):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class Workers:
    """Worker processes: a thread for each hands it a chunk and waits for the result."""

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
        """Have a chunk encoded by whichever process is free."""
        return self._pool.submit(self._request, (records, source))

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxdpo.data.tokenize_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Every core has a process already; threads within each would compete.
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            # Ctrl-C goes to this process alone, which then ends the workers.
            start_new_session=True,
        )
        self._own.process = process
        self._started.append(process)
        assert process.stdin is not None
        process.stdin.write(self._encoder)

    def _request(self, request: Any) -> EncodedChunk:
        process = self._own.process
        try:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            raise ValueError(
                f"data: a process that encodes pairs ended with status {process.wait()}, "
                "perhaps for want of memory. Set data.num_proc=1 to encode in one process"
            ) from None

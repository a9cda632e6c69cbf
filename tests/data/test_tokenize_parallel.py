import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data import tokenize_parallel
from jaxdpo.data.formats.preference import Preference
from jaxdpo.data.pair_table import COLUMNS
from jaxdpo.data.prepare import prepare
from jaxdpo.data.report import DataReport
from jaxdpo.data.tokenize import Encoder
from jaxdpo.data.tokenize_parallel import Workers, encode_records, usable_cores

Write = Callable[..., str]


@pytest.fixture
def encoder(byte_tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder.create(byte_tokenizer, DataSection(max_length=40, max_prompt_length=20))


def records(count: int) -> list[Preference]:
    """Some of them useless, some that spell a special token."""
    return [
        Preference(
            f"question {i}",
            " same" if i % 7 == 0 else f" good {i}",
            " same" if i % 7 == 0 else f" <|end|> {i}",
            id=f"r:{i}",
        )
        for i in range(count)
    ]


def encoded(
    count: int, encoder: Encoder, processes: int
) -> tuple[dict[str, np.ndarray], DataReport]:
    report = DataReport("a.jsonl", "preference")
    chunks = list(encode_records(records(count), report, encoder, 3, processes))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in COLUMNS}, report


def test_processes_change_nothing(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_parallel, "CHUNK_SIZE", 16)
    monkeypatch.setattr(tokenize_parallel, "ALONE", 32)
    alone, counted = encoded(250, encoder, processes=1)
    shared, counted_too = encoded(250, encoder, processes=2)
    assert (
        counted == counted_too
        and counted.kept == 214
        and counted.verbatim == 250
        and counted.special_text == 214
    )
    assert counted.dropped == {"identical answers": 36} and set(alone["sources"]) == {3}
    for name, column in alone.items():
        np.testing.assert_array_equal(column, shared[name], err_msg=name)


def test_small_sets_start_no_process(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_parallel, "Workers", pytest.fail)
    assert (
        encoded(tokenize_parallel.ALONE, encoder, processes=8)[1].verbatim
        == tokenize_parallel.ALONE
    )


def test_a_process_that_dies_is_told(encoder: Encoder) -> None:
    with Workers(encoder, 1) as workers:
        assert workers.submit(records(3), 0).result().kept == 2
        (process,) = workers._started
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(
            ValueError,
            match=r"ended with status -9, perhaps for want of memory\. Set data\.num_proc=1",
        ):
            workers.submit(records(3), 0).result()


def test_long_work_tells_how_far_it_is(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokenize_parallel, "LOG_EVERY", 0.0)
    caplog.set_level(logging.INFO)
    encoded(600, encoder, processes=1)
    assert "data: a.jsonl: 438 pairs encoded" in caplog.text


def test_by_default_there_is_a_process_for_every_core(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def note(chunks: Any, encoder: Any, source: int, processes: int) -> Any:
        asked.append(processes)
        yield tokenize_parallel.encode_chunk(encoder, next(chunks), source)

    monkeypatch.setattr(tokenize_parallel, "_encoded", note)
    monkeypatch.setattr(tokenize_parallel, "usable_cores", lambda: 100)
    path = write("a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    for processes in (0, 5):
        prepare(
            DataSection(
                train=[path], max_length=40, max_prompt_length=20, num_proc=processes, cache=None
            ),
            byte_tokenizer,
            1000,
        )
    assert asked == [32, 5] and usable_cores() >= 1

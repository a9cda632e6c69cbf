from pathlib import Path
from typing import Any

import pytest

from jaxdpo.data.formats.hh_rlhf import is_hh, parse_hh
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from tests.data.rows import collect, hh, one


def test_hh_takes_every_word_of_answers_that_begin_alike() -> None:
    found = one(parse_hh, hh(" I think so", " I think not"))
    assert isinstance(found, Preference)
    assert found.prompt == (
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Why?"),
    )
    assert found.chosen == (Message("assistant", "I think so"),)
    assert found.rejected == (Message("assistant", "I think not"),)


def test_hh_keeps_inner_and_outer_white_space_of_turns() -> None:
    found = one(
        parse_hh, hh("  two spaces \n", "none", prompt="\n\nHuman:  a \n\nAssistant:\n\nHuman: ")
    )
    assert isinstance(found, Preference)
    assert found.prompt == (Message("user", " a "), Message("assistant", ""), Message("user", ""))
    assert found.chosen == (Message("assistant", " two spaces \n"),)
    assert found.rejected == (Message("assistant", "none"),)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (hh(" ", " b"), "empty answer"),
        (hh(" a", ""), "empty answer"),
        (hh(" a", " b\n\nHuman: more"), "turn marker inside an answer"),
        (hh(" a\n\nAssistant: c", " b"), "turn marker inside an answer"),
        (hh(" a", " b", prompt="\n\nHuman: Hi\n\nHuman: Why?"), "roles do not alternate"),
        (hh(" a", " b", prompt="\n\nHuman: Hi\n\nAssistant: yes"), "roles do not alternate"),
        (hh(" a", " b", prompt="\n\nAssistant: Hi\n\nHuman: Why?"), "roles do not alternate"),
        (hh(" a", " b", prompt="Preface\n\nHuman: Why?"), "roles do not alternate"),
        (hh(" a", " a"), "identical answers"),
        (
            {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: a"},
            "no shared prompt",
        ),
    ],
)
def test_hh_drops(row: dict[str, str], reason: str) -> None:
    assert one(parse_hh, row) == Dropped(reason)


def test_hh_real_file(real_data: Path) -> None:
    report, pairs = collect(str(real_data / "hh-rlhf" / "harmless-base-test.jsonl.gz"))
    assert (report.format, report.rows_read, report.parsed, len(pairs)) == (
        "hh-rlhf",
        2312,
        2299,
        2299,
    )
    assert report.dropped == {
        "empty answer": 4,
        "roles do not alternate": 4,
        "turn marker inside an answer": 5,
    }
    assert [int(name.split(":")[1]) - 1 for name in report.examples["empty answer"]] == [
        86,
        516,
        925,
        1103,
    ]
    assert sum(len(pair.prompt) > 1 for pair in pairs) / len(pairs) == pytest.approx(
        0.714, abs=0.003
    )
    assert len({pair.prompt_key for pair in pairs}) == 2297


def test_hh_is_known_by_its_rows() -> None:
    assert is_hh(hh(" a", " b")) and not is_hh({"prompt": "x", **hh(" a", " b")})
    assert not is_hh({"chosen": "a", "rejected": "b"}) and not is_hh({"chosen": [], "rejected": []})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"good": "a"}, "column 'chosen' and 'rejected' is missing; columns found: good"),
        ({"chosen": True, "rejected": "b"}, "is bool"),
    ],
)
def test_hh_rows_of_the_wrong_form_are_errors(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(parse_hh, row)

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from jaxdpo.data.formats.preference import Dropped, Message, Preference, shared_length
from jaxdpo.data.report import DataReport, describe_counts
from jaxdpo.utils.text import printable


def test_prompt_key_never_changes_and_depends_on_the_prompt_alone() -> None:
    pair = Preference("Why?", "a", "b", id="x:1")
    assert (
        pair.prompt_key
        == replace(pair, chosen="c", id="y:2", weight=2.0).prompt_key
        == 0x5D8A995A6FA7CF7C
    )
    chat = Preference(
        (Message("user", "Why?"),), (Message("assistant", "a"),), (Message("assistant", "b"),)
    )
    assert (
        len(
            {
                pair.prompt_key,
                chat.prompt_key,
                replace(chat, prompt=(Message("system", "Why?"),)).prompt_key,
            }
        )
        == 3
    )


def test_a_pair_and_its_contradiction_share_a_key() -> None:
    pair = Preference("Why?", "a", "b", id="x:1")
    back = replace(pair, chosen="b", rejected="a")
    assert pair.pair_key[0] == back.pair_key[0] and pair.pair_key[1] != back.pair_key[1]
    assert pair.pair_key == replace(pair, id="y:2", weight=2.0).pair_key
    assert (
        len(
            {
                item.pair_key[0]
                for item in (
                    pair,
                    replace(pair, prompt="Who?"),
                    replace(pair, rejected="c"),
                    replace(pair, tools="[]"),
                )
            }
        )
        == 4
    )


def test_the_group_is_the_prompt_where_there_is_none() -> None:
    pair = Preference("Why?", "a", "b")
    other = Preference("How?", "a", "b")
    assert pair.group_key == pair.prompt_key != other.group_key
    grouped = replace(pair, group="t"), replace(other, group="t")
    assert grouped[0].group_key == grouped[1].group_key
    assert grouped[0].prompt_key == pair.prompt_key, "the prompt is what it was"


def test_report_counts_each_reason_and_keeps_five_examples() -> None:
    report = DataReport(
        "set", "preference", rows_read=20, parsed=12, kept=12, ignored_columns={"score": 19}
    )
    for row in range(7):
        report.drop(Dropped("empty answer"), f"f:{row}")
    report.drop(Dropped("identical answers"), "f:9")
    report.drop(Dropped("tie", filtered=True), "f:10")
    found = report.to_json()
    assert found["dropped"]["empty answer"] == {
        "count": 7,
        "examples": ["f:0", "f:1", "f:2", "f:3", "f:4"],
    }
    assert found["dropped"]["identical answers"]["count"] == 1
    assert report.dropped_fraction == 8 / 20, "what is filtered does not count"
    assert found["filtered"] == {"tie": {"count": 1, "examples": ["f:10"]}}
    line = describe_counts(found)
    assert "20 rows read, 12 parsed, 12 kept; dropped 8 (7 empty answer, 1 identical" in line
    assert "answers); filtered 1 (1 tie); columns not used: score (19 rows)" in line


def test_printable_defuses_terminal_escapes_and_reordering() -> None:
    assert printable("plain\nüber 你好 🙂") == "plain\nüber 你好 🙂"
    assert printable("\x1b[2J\r\x07") == "\\x1b[2J\\r\\x07"
    assert printable("a\u202eb\u2028c\x9bd\ud800") == "a\\u202eb\\u2028c\\x9bd\\ud800"


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_shared_length_is_the_longest_common_prefix(a: list[int], b: list[int]) -> None:
    length = shared_length(a, b)
    assert a[:length] == b[:length]
    assert length in (len(a), len(b)) or a[length] != b[length]

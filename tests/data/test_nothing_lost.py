"""Nothing of a row is lost in silence: every column is used, refused, or named and counted.

Rows of every form get random columns beside their own. Of each such column with content it is
found that the row was refused or dropped, that the pair changes when the column is taken away, or
that the report names it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.ab import LABELS
from jaxdpo.data.formats.common import OPTIONAL, PROMPTS
from jaxdpo.data.formats.preference import Preference
from jaxdpo.data.formats.ranked import LISTS, RANKS, SCORES
from jaxdpo.data.formats.trl import ANSWERS
from jaxdpo.data.report import DataReport
from jaxdpo.data.sources import read_set
from jaxdpo.utils.text import has_content
from tests.data.formats.test_oasst import thread, tree
from tests.data.formats.test_shp import shp
from tests.data.rows import assistant, hh, user

DIALOGUES = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
FORMS: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "messages": {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    "dialogues": DIALOGUES,
    "prompt beside dialogues": {"prompt": "q", **DIALOGUES},
    "implicit prompt": {"chosen": "It is so.", "rejected": "It is not."},
    "question": {"question": "q", "chosen": "a", "rejected": "b"},
    "alpaca": {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"},
    "openai": {
        "input": {"messages": [user("q")]},
        "preferred_output": [assistant("a")],
        "non_preferred_output": [assistant("b")],
    },
    "ms-swift": {"messages": [user("q"), assistant("a")], "rejected_response": "b"},
    "argilla": {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
    "order": {"question": "q", "completions": ["a", "b"]},
    "scores": {"question": "q", "completions": ["a", "b"], "scores": [2, 1]},
    "objects": {
        "question": "q",
        "answers": [{"text": "a", "score": 2}, {"text": "b", "score": 1}],
    },
    "label": {"question": "q", "response_a": "a", "response_b": "b", "label": "a"},
    "hh-rlhf": hh(" a", " b"),
    "shp": shp(1, 9, 1),
    "oasst": tree(thread()),
}
NAMES = sorted(
    {
        *PROMPTS, *OPTIONAL, *LISTS, *RANKS, *SCORES, *LABELS,
        *(name for names in ANSWERS for name in names), "history", "images", "audio", "context",
        "pm_score", "votes", "best_answer", "response_c", "response_1", "source", "text", "post_id",
        "message_tree_id", "completion", "model",
    }
)  # fmt: skip
TEXTS = st.sampled_from(["", "zig", "q", "a", "zig zag"])
VALUES = st.one_of(
    st.none(),
    TEXTS,
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from([0.5, 1.0]),
    st.lists(TEXTS, max_size=2),
    st.lists(st.integers(0, 3), min_size=2, max_size=2),
    st.sampled_from(
        [
            [user("zig")],
            [user("q"), assistant("a")],
            [["zig", "zag"]],
            {"zig": "zag"},
            {"messages": [user("zig")], "zig": 1},
            [{"name": "zig"}],
            "[{'role': 'user', 'content': 'zig'}]",
            "['zig', 'zag']",
        ]
    ),
)
COLUMNS = st.dictionaries(
    st.one_of(st.sampled_from(NAMES), st.text("xyz_", min_size=1, max_size=3)), VALUES, max_size=3
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "a.jsonl"


def read(path: Path, row: dict[str, Any]) -> tuple[DataReport, list[Preference]] | str:
    """The report and the pairs of a row, or why it is refused."""
    path.write_text(json.dumps(row) + "\n")
    try:
        report, records = read_set(str(path), DataSection(), "data.train")
        return report, list(records)
    except ValueError as error:
        return str(error)


def texts(value: Any) -> list[str]:
    """Every text of a value; what is no text is shown as none that a pair holds."""
    if isinstance(value, dict):
        value = [item for name, item in value.items() if name != "role"]
    if not isinstance(value, list):
        return [value if isinstance(value, str) else f"<{value!r}>"]
    return [text for item in value for text in texts(item)]


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_are_read_as_they_are(path: Path, form: str) -> None:
    found = read(path, FORMS[form])
    assert not isinstance(found, str) and found[1]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(more=COLUMNS)
def test_every_column_is_used_refused_or_named(path: Path, form: str, more: dict[str, Any]) -> None:
    row = {**more, **FORMS[form]}
    found = read(path, row)
    if isinstance(found, str):
        assert "a.jsonl:1" in found, "an error names the row"
        return
    report, records = found
    if not records:
        assert report.dropped or report.filtered, "what makes no pair is counted"
        return
    named = {name.split(".")[0] for name in report.ignored_columns}
    for column, value in more.items():
        if column in FORMS[form] or column in named or not has_content(value):
            continue
        if column in OPTIONAL and form != "oasst":
            continue  # read, whether its value is the default or not
        if column in (*RANKS, *SCORES) and form in ("order", "scores", "objects"):
            continue  # read: two that disagree are refused
        known = [text for record in records for text in record.texts]
        if all(any(text in other for other in known) for text in texts(value)):
            continue  # repeats what the pair holds
        without = read(path, {name: row[name] for name in row if name != column})
        is_used = isinstance(without, str) or without[1] != records
        assert is_used, f"{column}={value!r} is neither used nor named"


@pytest.mark.parametrize("form", ["messages", "dialogues", "openai", "ms-swift"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    field=st.sampled_from(["name", "thinking", "reasoning_content", "images", "x", "weight"]),
    value=st.sampled_from(["zig", 7.5, ["zig"], {"zig": 1}]),
)
def test_every_field_of_a_message_is_used_refused_or_named(
    path: Path, form: str, field: str, value: Any
) -> None:
    row = json.loads(json.dumps(FORMS[form]))
    column = "preferred_output" if form == "openai" else "chosen"
    if form == "ms-swift":
        column = "messages"
    row[column][-1][field] = value
    found = read(path, row)
    if isinstance(found, str):
        assert field in found
        return
    report, records = found
    assert repr(value) in repr(records) or json.dumps(value) in repr(records) or report.dropped

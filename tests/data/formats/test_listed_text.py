"""Lists that are stored as text: read where they are lists for certain, else refused."""

import json
from typing import Any

import pytest

from jaxdpo.data.formats.listed_text import messages_in, read_list
from jaxdpo.data.formats.preference import Preference
from jaxdpo.data.formats.trl import parse_preference
from tests.data.rows import A, B, Q, Write, assistant, collect, one, user

TURNS = [{"role": "user", "content": 'it\'s "q"\n<b>\\'}]
NUMPY = "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"


@pytest.mark.parametrize(
    "text",
    [
        str(TURNS),
        json.dumps(TURNS),
        json.dumps(TURNS, indent=1),
        json.dumps(json.dumps(TURNS)),
        " " + str(TURNS) + "\n",
        str(TURNS).replace(": ", ":"),
    ],
)
def test_text_that_is_a_list_of_messages_is_read(text: str) -> None:
    assert messages_in(text, "prompt") == TURNS


def test_messages_of_any_role_are_messages() -> None:
    """Which roles are read is decided where messages are, and not by training on them as text."""
    for role in ("function_call", "elf"):
        turns = [{"from": "human", "value": "q"}, {"from": role, "value": "x"}]
        assert messages_in(str(turns), "prompt") == turns
        assert messages_in(json.dumps(turns[1]), "prompt") == turns[1]


@pytest.mark.parametrize(
    "first", [{"id": 1}, {"name": "Bob Smith"}, {"weight": None}, {"train": True, "lang": "en"}]
)
def test_messages_may_begin_with_other_fields(first: dict[str, Any]) -> None:
    turns = [{**first, "role": "User", "content": "q"}, {**first, "from": "gpt", "value": "a"}]
    assert messages_in(str(turns), "prompt") == turns
    assert messages_in(json.dumps(turns), "prompt") == turns
    with pytest.raises(ValueError, match="begins like a list of messages"):
        messages_in(str(turns)[:-4], "prompt")


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '{"from": "Paris", "to": "Rome"}',
        '[{"value": 3}]',
        '{"content": "a list of books"}',
        "{'role': 'wizard', 'hp': 3}",
        '{"role": "user", "rights": "all"}',
        '{"from": "user", "to": "admin"}',
        "[{role: user}]",
        "Use [{'role': 'user', 'content': 'q'}] for a chat.",
        '[{"name": "add", "arguments": {}}]',
        '{"value": 3',
        '{"from": "USD", "to": "EUR", "value": 3}',
        '{"name": "Bob", "role": "engineer", "content": "x"}',
        '{"model": "m", "messages": [{"role": "user", "content": "q"}]}',
        "[[1, 2], ['user']]",
        "Message(to='Bob', text='Hi')",
        "(a role='user' in prose)",
        "[]",
        "",
    ],
)
def test_other_text_stays_text(text: str) -> None:
    assert messages_in(text, "prompt") == text


@pytest.mark.parametrize(
    "text",
    [
        NUMPY,
        f"array({NUMPY}, dtype=object)",
        "[{'role': 'user', 'content': 'q'}, {'role': 'assist",
        "[{'role': 'user', 'content': 'a' 'b'}]",
        "[{'content': 'q', 'role': 'user'}, ...]",
        '[{""role"": ""user"", ""content"": ""q""}]',
        "[{'from': 'human', 'value': nan}]",
        "[{'role': 'user', 'content': 'q'}] and more",
        "[{'role': 'user', 'content': 'q'}, 'and more']",
        "[[{'role': 'user', 'content': 'q'}]]",
        '[[{"from": "human", "value": "q"}], [{"from": "human", "value": "q"}]]',
        "[('user', 'q'), ('assistant', 'a')]",
        '[["Human", "q"], ["gpt", "a"]]',
        "[Message(role='user', content='q')]",
        "ChatCompletionMessage(content='q', refusal=None, role='assistant')",
        "[ChatMessage(id=3, role=<Role.USER: 'user'>, content='q')]",
        "[OrderedDict([('role', 'user'), ('content', 'q')])]",
    ],
)
def test_text_that_only_begins_like_messages_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"column 'chosen' is text that begins like a list of messages .*to_json"
    ):
        messages_in(text, "chosen")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("['a', 'b']", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("[1, None]", [1, None]),
        ("['a' 'b']", None),
        ("[a, b]", None),
        ("a", None),
        (3, None),
        (["a"], ["a"]),
    ],
)
def test_lists_of_other_things(value: Any, expected: list[Any] | None) -> None:
    assert read_list(value) == expected


@pytest.mark.parametrize("write_list", [str, json.dumps])
def test_columns_of_csv_and_of_json_lines(write: Write, write_list: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("q")], "chosen": assistant("a"), "rejected": assistant("b")},
        {"messages": [user("q")], "chosen": "a", "rejected": "b"},
        {"input": {"messages": [user("q")]}, "chosen": "a", "rejected": "b"},
    ]
    for row in rows:
        cells = {
            name: value if isinstance(value, str) else write_list(value)
            for name, value in row.items()
        }
        assert one(parse_preference, cells) == Preference(Q, A, B)
        quoted = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells.values())
        path = write("a.csv", f"{','.join(cells)}\n{quoted}\n".encode())
        (record,) = collect(path)[1]
        assert (record.prompt, record.chosen, record.rejected) == (Q, A, B)


def test_messages_in_columns_are_read() -> None:
    """As datasets gives a Sequence of messages."""
    row = {
        "chosen": {"role": ["user", "assistant"], "content": ["q", "a"]},
        "rejected": {"from": ["human", "gpt"], "value": ["q", "b"]},
    }
    assert one(parse_preference, row) == Preference(Q, A, B)
    short = {"role": ["user"], "content": ["q", "a"]}
    with pytest.raises(ValueError, match="column 'chosen': block 1 of its content"):
        one(parse_preference, {**row, "chosen": short})


def test_a_cell_that_cannot_be_read_names_the_row(write: Write) -> None:
    path = write("a.csv", f'chosen,rejected\n"{NUMPY}","{NUMPY}"\n'.encode())
    with pytest.raises(ValueError, match=r"a\.csv:2: column 'chosen' is text that begins like"):
        collect(path)

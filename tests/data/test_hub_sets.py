"""Each hub set: a few rows of our own with its columns and types, from its parser to records."""

from typing import Any

import datasets
import datasets.exceptions
import pytest

from jaxdpo.data.formats.preference import Message, Preference
from jaxdpo.data.report import DataReport
from jaxdpo.data.sources import HUB_SETS
from tests.data.formats.test_oasst import thread
from tests.data.formats.test_shp import shp
from tests.data.rows import assistant, collect, hh, user

STRING, NUMBER = datasets.Value("string"), datasets.Value("float64")
TURNS = [{"content": STRING, "role": STRING}]


def ultrafeedback(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    dialogues = {
        "chosen": [user(prompt), assistant(chosen)],
        "rejected": [user(prompt), assistant(rejected)],
    }
    return {**dialogues, "score_chosen": 8.5, "score_rejected": 7.0, **more}


def h4(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    row = ultrafeedback(prompt, chosen, rejected)
    return {"prompt": prompt, "prompt_id": "f0e37e9f", "messages": row["chosen"], **row}


H4_TYPES = {
    "prompt": STRING,
    "prompt_id": STRING,
    "messages": TURNS,
    "chosen": TURNS,
    "rejected": TURNS,
}
SCORES = {"score_chosen": NUMBER, "score_rejected": NUMBER}
MIX_TYPES = {
    "dataset": STRING,
    "chosen": TURNS,
    "rejected": TURNS,
    "chosen_rating": NUMBER,
    "rejected_rating": NUMBER,
}


def mix(head: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    dialogues = {"chosen": [*head, assistant(chosen)], "rejected": [*head, assistant(rejected)]}
    return {
        "dataset": "argilla/distilabel-capybara-dpo",
        **dialogues,
        "chosen_rating": 5.0,
        "rejected_rating": None,
    }


def orca(system: str, question: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"system": system, "question": question, "chosen": chosen, "rejected": rejected}


DIALOGUE = [user("1"), assistant("2"), user("3")]
FIXTURES: dict[str, tuple[list[dict[str, Any]], datasets.Features | None]] = {
    "hh-rlhf": (
        [hh(" a", " b"), hh("", " b")],
        datasets.Features({"chosen": STRING, "rejected": STRING}),
    ),
    "shp": ([shp(1, 9, 1), shp(0, 1, 9), shp(1, 3, 2)], None),
    "oasst1": (thread(), None),
    "oasst2": (thread(), None),
    "ultrafeedback": (
        [h4("q", "a", "b"), h4("q", "a", ""), h4("q", "a", "a")],
        datasets.Features({**H4_TYPES, **SCORES}),
    ),
    "ultrafeedback-trl": (
        [ultrafeedback("q", "a", "b"), ultrafeedback("q", "a", "")],
        datasets.Features({"chosen": TURNS, "rejected": TURNS, **SCORES}),
    ),
    "orca-dpo-pairs": ([orca("", "q", "a", "b"), orca("s", "q", "a", "b")], None),
    "dpo-mix-7k": (
        [mix([user("q")], "a", "b"), mix(DIALOGUE, "a", "b")],
        datasets.Features(MIX_TYPES),
    ),
}
EXPECTED: dict[str, tuple[list[tuple[str, str, str]], dict[str, int], dict[str, int]]] = {
    "hh-rlhf": ([("Why?", "a", "b")], {"empty answer": 1}, {}),
    "shp": (
        [
            ("How long do I boil an egg? (p1)", "A: seven minutes", "B: until it is done"),
            ("How long do I boil an egg? (p1)", "B: until it is done", "A: seven minutes"),
        ],
        {},
        {"score ratio below 2": 1},
    ),
    "oasst1": (
        [("text of r", "text of a0", "text of a2"), ("text of q", "text of b0", "text of b1")],
        {},
        {},
    ),
    "oasst2": (
        [("text of r", "text of a0", "text of a2"), ("text of q", "text of b0", "text of b1")],
        {},
        {},
    ),
    "ultrafeedback": ([("q", "a", "b")], {"empty answer": 1, "identical answers": 1}, {}),
    "ultrafeedback-trl": ([("q", "a", "b")], {"empty answer": 1}, {}),
    "orca-dpo-pairs": ([("q", "a", "b"), ("q", "a", "b")], {}, {}),
    "dpo-mix-7k": ([("q", "a", "b"), ("3", "a", "b")], {}, {}),
}
IGNORED = {
    "ultrafeedback": {"prompt_id", "messages", "score_chosen", "score_rejected"},
    "orca-dpo-pairs": set(),
    "dpo-mix-7k": {"dataset", "chosen_rating"},  # the other is null in every row
}


def load(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[DataReport, list[Preference], list[Any]]:
    rows, features = FIXTURES[name]
    calls = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list(
            rows, features=features
        )  # through Arrow, as the hub's rows come

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return *collect(name), calls


@pytest.mark.parametrize("name", HUB_SETS)
def test_rows_of_the_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    report, records, _ = load(name, monkeypatch)
    texts = [
        tuple(
            turns[-1].content
            for turns in (r.prompt, r.chosen, r.rejected)
            if not isinstance(turns, str)
        )
        for r in records
    ]
    expected, dropped, filtered = EXPECTED[name]
    assert (texts, report.dropped, report.filtered) == (expected, dropped, filtered)
    assert (report.format, report.rows_read) == (HUB_SETS[name].format, len(FIXTURES[name][0]))
    assert set(report.ignored_columns) == IGNORED.get(name, set(report.ignored_columns))


def test_a_system_prompt_that_is_empty_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (without, with_it), _ = load("orca-dpo-pairs", monkeypatch)
    assert without.prompt == (Message("user", "q"),) and with_it.prompt == (
        Message("system", "s"),
        Message("user", "q"),
    )


def test_what_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list([hh(" a", " b"), hh(" c", " d")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    report, pairs = collect("hh-rlhf/helpful-base@abc123:test:1")
    assert calls == [
        (
            ("Anthropic/hh-rlhf",),
            {"data_dir": "helpful-base", "split": "test", "revision": "abc123"},
        )
    ]
    assert report.rows_read == 1 and [pair.id for pair in pairs] == [
        "Anthropic/hh-rlhf/helpful-base:test:1"
    ]
    assert collect("somebody/pairs")[0].format == "hh-rlhf"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route\x1b[2J"),
        ValueError("Unknown split"),
        datasets.exceptions.DatasetNotFoundError("gone"),
    ],
)
def test_a_hub_that_fails_is_told_with_the_name(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load_dataset(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"data\.train=hh-rlhf: the hub set Anthropic/hh-rlhf could not be loaded"
    ) as caught:
        collect("hh-rlhf")
    assert "\x1b" not in str(caught.value)

import logging
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions
import pytest

from jaxdpo.config import DataSection
from jaxdpo.data.records import DataReport, Dropped, Message, Preference
from jaxdpo.data.sources import SOURCES, is_hh, parse_hh, parse_preference, parse_spec, read_set

Write = Callable[..., str]
OPTION = "data.train"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def hh(*answers: str, prompt: str = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?") -> dict[str, str]:
    return {name: f"{prompt}\n\nAssistant:{answer}" for name, answer in zip(("chosen", "rejected"), answers, strict=True)}


Q, A, B = (Message("user", "q"),), (Message("assistant", "a"),), (Message("assistant", "b"),)


# --- hh-rlhf ---


def test_hh_takes_every_word_of_answers_that_begin_alike() -> None:
    found = parse_hh(hh(" I think so", " I think not"))
    assert isinstance(found, Preference)
    assert found.prompt == (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Why?"))
    assert found.chosen == (Message("assistant", "I think so"),)
    assert found.rejected == (Message("assistant", "I think not"),)


def test_hh_keeps_inner_and_outer_white_space_of_turns() -> None:
    found = parse_hh(hh("  two spaces \n", "none", prompt="\n\nHuman:  a \n\nAssistant:\n\nHuman: "))
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
        ({"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: a"}, "no shared prompt"),
    ],
)
def test_hh_drops(row: dict[str, str], reason: str) -> None:
    assert parse_hh(row) == Dropped(reason)


def test_hh_real_file(real_data: Path) -> None:
    report, records = read_set(str(real_data / "hh-rlhf" / "harmless-base-test.jsonl.gz"), "auto", OPTION)
    pairs = list(records)
    assert (report.format, report.rows_read, report.parsed, len(pairs)) == ("hh-rlhf", 2312, 2299, 2299)
    assert report.dropped == {"empty answer": 4, "roles do not alternate": 4, "turn marker inside an answer": 5}
    assert [int(name.split(":")[1]) - 1 for name in report.examples["empty answer"]] == [86, 516, 925, 1103]
    assert sum(len(pair.prompt) > 1 for pair in pairs) / len(pairs) == pytest.approx(0.714, abs=0.003)
    assert len({pair.prompt_key for pair in pairs}) == 2297


# --- prompt, chosen, rejected ---


def test_strings_are_used_verbatim() -> None:
    found = parse_preference({"prompt": " q ", "chosen": " a\n", "rejected": "b", "weight": 2, "id": "row-7"})
    assert found == Preference(" q ", " a\n", "b", id="row-7", weight=2.0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": None, "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": [user("q")], "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
    ],
)
def test_every_form_of_messages_gives_the_same_record(row: dict[str, Any]) -> None:
    assert parse_preference(row) == Preference(Q, A, B)


def test_implicit_prompt_of_messages_keeps_system_and_earlier_turns() -> None:
    head = [{"role": "system", "content": "s"}, user("1"), assistant("2"), user("3")]
    found = parse_preference({"chosen": [*head, assistant("a")], "rejected": [*head, assistant("b")]})
    assert isinstance(found, Preference)
    assert [turn.role for turn in found.prompt if isinstance(turn, Message)] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is black.", Preference("The sky is", " blue.", " black.")),
        ("Q: why?\nA: so", "Q: why?\nA: no", Preference("Q: why?\nA:", " so", " no")),
        ("Q: why?\nA: so", "Q: why?\nA: so what", Preference("Q: why?\nA:", " so", " so what")),
        ("yes", "yesterday", Dropped("no shared prompt")),
        ("alpha", "beta", Dropped("no shared prompt")),
    ],
)
def test_implicit_prompt_of_strings_ends_at_a_word(chosen: str, rejected: str, expected: Preference | Dropped) -> None:
    assert parse_preference({"chosen": chosen, "rejected": rejected}) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "an answer is null"),
        ({"prompt": "q", "chosen": "a", "rejected": " \n"}, "empty answer"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical answers"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0}, "weight 0"),
        ({"prompt": "q", "chosen": "a\ud83d", "rejected": "b"}, "text is not valid Unicode"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]}, "identical answers"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}, "no shared prompt"),
        ({"prompt": [user("q")], "chosen": [], "rejected": [assistant("b")]}, "answer is not one assistant turn"),
        ({"prompt": [user("q")], "chosen": [user("a")], "rejected": [assistant("b")]}, "answer is not one assistant turn"),
        (
            {"prompt": [user("q")], "chosen": [assistant("a"), user("c"), assistant("d")], "rejected": [assistant("b")]},
            "answer is not one assistant turn",
        ),
        ({"prompt": [assistant("q")], "chosen": "a", "rejected": "b"}, "prompt ends with an assistant turn"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "no shared prompt"),
        ({"chosen": [], "rejected": []}, "no shared prompt"),
    ],
)
def test_preference_drops(row: dict[str, Any], reason: str) -> None:
    assert parse_preference(row) == Dropped(reason)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "good": "a", "bad": "b"}, "column 'chosen' and 'rejected' is missing; columns found: prompt, good, bad"),
        ({}, "columns found: none"),
        ({"prompt": "q", "chosen": True, "rejected": "b"}, "column 'chosen' is bool, must be a string or a list of messages"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "column 'prompt' is int"),
        ({"chosen": "a", "rejected": [assistant("b")]}, "'chosen' and 'rejected' differ in type"),
        ({"chosen": ["a"], "rejected": ["b"]}, "message 1 of column 'chosen' must be .* is str"),
        (
            {"chosen": [user("q"), {"from": "gpt", "value": "a"}], "rejected": [user("q"), assistant("b")]},
            "message 2 of column 'chosen' must be {'role': string, 'content': string}, is {'from': 'str', 'value': 'str'}",
        ),
        ({"chosen": [{"role": "user", "content": None}], "rejected": [user("q")]}, "'content': 'NoneType'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": -1}, "column 'weight' is -1, must be a number that is not negative"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": float("nan")}, "column 'weight' is nan"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": "2"}, "column 'weight' is '2'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": True}, "column 'weight' is True"),
    ],
)
def test_rows_of_the_wrong_form_are_errors(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_preference(row)
    if "chosen" not in row:
        with pytest.raises(ValueError, match="columns found"):
            parse_hh(row)


# --- names and whole sets ---


def test_the_formats_of_the_options_are_the_table() -> None:
    assert set(typing.get_args(typing.get_type_hints(DataSection)["format"])) == {"auto", *SOURCES}


@pytest.mark.parametrize(
    ("text", "option", "hub", "subset", "split", "count"),
    [
        ("hh-rlhf/harmless-base:train:50000", OPTION, "Anthropic/hh-rlhf", "harmless-base", "train", 50000),
        ("hh-rlhf", OPTION, "Anthropic/hh-rlhf", None, "train", None),
        ("hh-rlhf", "data.eval", "Anthropic/hh-rlhf", None, "test", None),
        ("Anthropic/hh-rlhf:test", OPTION, "Anthropic/hh-rlhf", None, "test", None),
        ("trl-lib/some_set:100", OPTION, "trl-lib/some_set", None, "train", 100),
        ("org/set:train[:10%]", OPTION, "org/set", None, "train[:10%]", None),
    ],
)
def test_hub_names(text: str, option: str, hub: str, subset: str | None, split: str, count: int | None) -> None:
    spec = parse_spec(text, option)
    assert (spec.path, spec.hub, spec.subset, spec.split, spec.count) == (None, hub, subset, split, count)
    assert spec.source == ("hh-rlhf" if "hh-rlhf" in text else None)


def test_paths_may_carry_a_count(write: Write, tmp_path: Path) -> None:
    path = write("odd:7", b"")
    for text, expected, count in [("a.jsonl:5", "a.jsonl", 5), ("./no-ending", "no-ending", None), (path, path, None)]:
        spec = parse_spec(text, OPTION)
        assert (spec.path, spec.count) == (Path(expected), count)
    assert parse_spec(str(tmp_path / "typo.jsnl"), OPTION).path == tmp_path / "typo.jsnl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hh-rlhf/harmles-base", r"data\.train=hh-rlhf/harmles-base: .*Did you mean hh-rlhf/harmless-base\?"),
        ("hh_rlhf", r"Did you mean hh-rlhf\? Sets: hh-rlhf, .*hh-rlhf/helpful-online"),
        ("pairs.jsnl", r"Did you mean pairs\.jsonl\?"),
        ("a.jsonl:0", r"data\.train=a\.jsonl:0: the count must be at least 1"),
    ],
)
def test_unknown_names_offer_the_nearest(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    write("pairs.jsonl", b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        parse_spec(text, OPTION)


def collect(text: str, data_format: str = "auto") -> tuple[DataReport, list[Preference]]:
    report, records = read_set(text, data_format, OPTION)
    return report, list(records)


def test_the_format_is_found_from_the_rows_and_logged(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report, pairs = collect(write("hh.jsonl", [hh(" a", " b"), hh("", " b"), hh(" c", " d")]))
    assert (report.format, report.rows_read, report.parsed, report.dropped) == ("hh-rlhf", 3, 2, {"empty answer": 1})
    assert [pair.id for pair in pairs] == ["hh.jsonl:1", "hh.jsonl:3"]
    assert report.examples["empty answer"] == ["hh.jsonl:2"]
    report, pairs = collect(write("p.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "score": 3}]))
    assert (report.format, report.ignored_columns, pairs) == ("preference", ("score",), [Preference("q", "a", "b", id="p.jsonl:1")])
    assert "hh.jsonl: format hh-rlhf (found from its rows)" in caplog.text


def test_a_format_can_be_forced(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report, pairs = collect(write("hh.jsonl", [hh(" I am", " I was")]), "preference")
    assert report.format == "preference" and isinstance(pairs[0].prompt, str) and pairs[0].chosen == " am"
    assert "format preference (forced by data.format)" in caplog.text
    assert not is_hh({"prompt": "x", **hh(" a", " b")})


def test_the_count_limits_the_rows_that_are_read(write: Write) -> None:
    path = write("a.jsonl", b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 20 + b"broken\n")
    report, pairs = collect(f"{path}:20")
    assert report.rows_read == len(pairs) == 20
    with pytest.raises(ValueError, match=r"data\.train=.*a\.jsonl: .*a\.jsonl:21: broken JSON"):
        collect(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (
            b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": "q"}\n',
            r"a\.jsonl, row 2: column 'chosen' and 'rejected' is missing",
        ),
    ],
)
def test_errors_name_the_option_the_file_and_the_row(write: Write, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.train=.*a\.jsonl: .*" + message):
        collect(write("a.jsonl", content))


def test_hub_sets_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((args, options))
        return [hh(" a", " b"), hh(" c", " d")]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    report, pairs = collect("hh-rlhf/helpful-base:test:1")
    assert calls == [(("Anthropic/hh-rlhf",), {"data_dir": "helpful-base", "split": "test"})]
    assert report.rows_read == 1 and [pair.id for pair in pairs] == ["Anthropic/hh-rlhf/helpful-base:test:1"]
    assert collect("somebody/pairs")[0].format == "hh-rlhf"


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\x1b[2J"), ValueError("Unknown split"), datasets.exceptions.DatasetNotFoundError("gone")]
)
def test_a_hub_that_fails_is_told_with_the_name(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"data\.train=hh-rlhf: the hub set Anthropic/hh-rlhf could not be loaded") as caught:
        collect("hh-rlhf")
    assert "\x1b" not in str(caught.value)

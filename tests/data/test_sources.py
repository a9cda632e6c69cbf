import logging
import typing
from pathlib import Path

import pytest

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.preference import Preference
from jaxdpo.data.report import describe_counts
from jaxdpo.data.sources import FORMATS, HUB_SETS, parse_spec
from tests.data.rows import Write, collect, hh

OPTION = "data.train"


def test_the_formats_of_the_options_are_the_table() -> None:
    assert set(typing.get_args(typing.get_type_hints(DataSection)["format"])) == {"auto", *FORMATS}


@pytest.mark.parametrize(
    ("text", "option", "hub", "subset", "split", "count"),
    [
        (
            "hh-rlhf/harmless-base:train:50000",
            OPTION,
            "Anthropic/hh-rlhf",
            "harmless-base",
            "train",
            50000,
        ),
        ("hh-rlhf", OPTION, "Anthropic/hh-rlhf", None, "train", None),
        ("hh-rlhf", "data.eval", "Anthropic/hh-rlhf", None, "test", None),
        ("Anthropic/hh-rlhf:test", OPTION, "Anthropic/hh-rlhf", None, "test", None),
        ("trl-lib/some_set:100", OPTION, "trl-lib/some_set", None, "train", 100),
        ("org/set:train[:10%]", OPTION, "org/set", None, "train[:10%]", None),
        ("shp/askculinary", "data.eval", "stanfordnlp/SHP", "askculinary", "validation", None),
        (
            "ultrafeedback:9",
            OPTION,
            "HuggingFaceH4/ultrafeedback_binarized",
            None,
            "train_prefs",
            9,
        ),
        (
            "ultrafeedback",
            "data.eval",
            "HuggingFaceH4/ultrafeedback_binarized",
            None,
            "test_prefs",
            None,
        ),
    ],
)
def test_hub_names(
    text: str, option: str, hub: str, subset: str | None, split: str, count: int | None
) -> None:
    spec = parse_spec(text, option)
    assert (spec.path, spec.hub, spec.subset, spec.split, spec.count) == (
        None,
        hub,
        subset,
        split,
        count,
    )
    known = [short for short in HUB_SETS if short in text]
    assert spec.format == (HUB_SETS[known[0]].format if known else None) and spec.revision is None


def test_paths_may_carry_a_count(write: Write, tmp_path: Path) -> None:
    path = write("odd:7", b"")
    for text, expected, count in [
        ("a.jsonl:5", "a.jsonl", 5),
        ("./no-ending", "no-ending", None),
        (path, path, None),
    ]:
        spec = parse_spec(text, OPTION)
        assert (spec.path, spec.count) == (Path(expected), count)
    assert parse_spec(str(tmp_path / "typo.jsnl"), OPTION).path == tmp_path / "typo.jsnl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "hh-rlhf/harmles-base",
            r"data\.train=hh-rlhf/harmles-base: .*Did you mean hh-rlhf/harmless-base\?",
        ),
        ("hh_rlhf", r"Did you mean hh-rlhf\? Sets: hh-rlhf, shp, oasst1, .*dpo-mix-7k"),
        ("pairs.jsnl", r"Did you mean pairs\.jsonl\?"),
        ("orca-dpo-pair", r"Did you mean orca-dpo-pairs\?"),
        ("a.jsonl:0", r"data\.train=a\.jsonl:0: the count must be at least 1"),
    ],
)
def test_unknown_names_offer_the_nearest(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    write("pairs.jsonl", b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        parse_spec(text, OPTION)


def test_the_format_is_found_from_the_rows_and_logged(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    report, pairs = collect(write("hh.jsonl", [hh(" a", " b"), hh("", " b"), hh(" c", " d")]))
    assert (report.format, report.rows_read, report.parsed, report.dropped) == (
        "hh-rlhf",
        3,
        2,
        {"empty answer": 1},
    )
    assert [pair.id for pair in pairs] == ["hh.jsonl:1", "hh.jsonl:3"]
    assert report.examples["empty answer"] == ["hh.jsonl:2"]
    report, pairs = collect(
        write("p.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "score": 3}])
    )
    assert (report.format, report.ignored_columns, pairs) == (
        "preference",
        {"score": 1},
        [Preference("q", "a", "b", id="p.jsonl:1")],
    )
    assert "hh.jsonl: format hh-rlhf (found from its rows)" in caplog.text


def test_a_format_can_be_forced(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report, pairs = collect(write("hh.jsonl", [hh(" I am", " I was")]), format="preference")
    assert (
        report.format == "preference"
        and isinstance(pairs[0].prompt, str)
        and pairs[0].chosen == " am"
    )
    assert "format preference (forced by data.format)" in caplog.text


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
            r"a\.jsonl:2: column 'chosen' and 'rejected' is missing",
        ),
    ],
)
def test_errors_name_the_option_the_file_and_the_row(
    write: Write, content: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=r"^data\.train=.*a\.jsonl: .*" + message):
        collect(write("a.jsonl", content))


def test_the_commit_of_a_hub_set_can_be_named() -> None:
    spec = parse_spec("hh-rlhf/harmless-base@09be8c5:test:7", OPTION)
    assert (spec.hub, spec.subset, spec.revision, spec.split, spec.count) == (
        "Anthropic/hh-rlhf",
        "harmless-base",
        "09be8c5",
        "test",
        7,
    )
    assert parse_spec("org/set@v1", OPTION).revision == "v1"


def test_a_set_without_validation_split_says_so() -> None:
    with pytest.raises(
        ValueError,
        match=r"data\.eval=orca-dpo-pairs: the set has no split for validation\. Name one",
    ):
        parse_spec("orca-dpo-pairs", "data.eval")
    assert parse_spec("orca-dpo-pairs:train", "data.eval").split == "train"


def test_every_hub_set_has_a_form() -> None:
    assert all(known.format in FORMATS for known in HUB_SETS.values())


@pytest.mark.parametrize("option", ["empty", "identical"])
def test_an_invalid_pair_can_be_an_error(write: Write, option: str) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "" if option == "empty" else "a"},
    ]
    assert len(collect(write("a.jsonl", rows))[1]) == 1
    with pytest.raises(
        ValueError, match=rf"a\.jsonl:2: {option} answers?\. Repair it, or set data\.{option}=drop"
    ):
        collect(write("a.jsonl", rows), **{option: "error"})


def test_pairs_of_one_row_have_names_of_their_own(write: Write) -> None:
    _, records = collect(
        write("a.jsonl", [{"prompt": "q", "completions": ["a", "b", "c"]}]), pairing="adjacent"
    )
    assert [record.id for record in records] == ["a.jsonl:1", "a.jsonl:1/2"]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("images", ["photos/0.jpg"]),
        ("image", {"bytes": "aGk=", "path": None}),
        ("image_url", "https://example.org/0.jpg"),
        ("video", "clip.mp4"),
        ("videos", [["a.mp4"]]),
        ("audio", {"array": [0.0, 0.5], "sampling_rate": 16000}),
        ("Audio_Path", "a.wav"),
        ("pixel_values", [[0.1]]),
    ],
)
def test_rows_with_media_are_invalid_with_the_column(
    write: Write, column: str, value: object
) -> None:
    report, records = collect(write("a.jsonl", [{**PAIR, column: value}, PAIR]))
    assert report.dropped == {f"column {column} holds media, and only text is read": 1}
    assert len(records) == 1
    labelled = {"question": "q", "answers": ["a", "b"], column: value}
    report, _ = collect(write("b.jsonl", [labelled]))
    assert sum(report.dropped.values()) == 1


@pytest.mark.parametrize("value", [None, [], "", [None], {"bytes": None, "path": None}, False])
def test_an_empty_media_column_is_none(write: Write, value: object) -> None:
    report, records = collect(write("a.jsonl", [{**PAIR, "images": value}]))
    assert len(records) == 1 and report.dropped == {}


def test_columns_that_are_not_read_are_counted_in_all_rows(write: Write) -> None:
    rows = [dict(PAIR) for _ in range(30)]
    rows[3]["note"] = "only here"
    rows[29]["late"] = "after the rows that detect the format"
    for row in rows:
        row["source"] = "forum"
        row["empty"] = ""
    report, _ = collect(write("a.jsonl", rows))
    assert report.ignored_columns == {"note": 1, "late": 1, "source": 30}
    assert describe_counts(report.to_json()).endswith(
        "columns not used: late (1 row), note (1 row), source (30 rows)"
    )


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        (
            {
                "question": "q",
                "output": "the label decides",
                "response_a": "a",
                "response_b": "b",
                "label": "a",
                "preferred": "by far",
            },
            {"output", "preferred"},
        ),
        (
            {
                "instruction": "q",
                "completions": [
                    {"response": "a", "score": 2, "critique": "good"},
                    {"response": "b", "score": 1, "critique": ""},
                ],
                "responses": ["x", "y"],
            },
            {"completions.critique", "responses"},
        ),
        (hh(" a", " b") | {"source": "x", "weight": 2}, {"source"}),
        ({**PAIR, "id": 3.5}, {"id"}),
        ({"prompt": "q", "instruction": "q", "chosen": "a", "rejected": "b"}, {"instruction"}),
        ({**PAIR, "chosen_response": "c", "rejected_response": "d"},
         {"chosen_response", "rejected_response"}),
    ],
)  # fmt: skip
def test_what_a_format_does_not_read_is_named(
    write: Write, row: dict[str, object], unread: set[str]
) -> None:
    report, records = collect(write("a.jsonl", [row]))
    assert len(records) == 1 and report.ignored_columns == dict.fromkeys(unread, 1)

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.prepare import code_hash, prepare, summary
from jaxdpo.data.tokenizer_json import load_tokenizer

Write = Callable[..., str]


def options(**values: object) -> DataSection:
    return DataSection(**{"max_length": 1024, "max_prompt_length": 512, **values})  # type: ignore[arg-type]


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"Question {i // 2}?", "chosen": f" good {i}", "rejected": f" bad {i}"}
        for i in range(start, start + count)
    ]


def test_read_split_encode_report(write: Write, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", [*rows(100), {"prompt": "q", "chosen": "a", "rejected": ""}])
    done = prepare(options(train=[path], eval_fraction=0.3), byte_tokenizer, 1000)
    assert len(done.train) + len(done.eval) == 100 and 15 < len(done.eval) < 45
    assert not set(done.train.prompt_keys) & set(done.eval.prompt_keys)
    assert sorted([*done.train.ids, *done.eval.ids], key=lambda name: int(name.split(":")[1])) == [
        f"a.jsonl:{i}" for i in range(1, 101)
    ]
    report = json.loads(json.dumps(done.report))
    assert report["sets"]["train"][0]["dropped"] == {
        "empty answer": {"count": 1, "examples": ["a.jsonl:101"]}
    }
    assert report["sets"]["train"][0]["kept"] == 100 and report["sets"]["eval"] == []
    assert report["train"]["pairs"] == len(done.train) and report["eval"]["pairs"] == len(done.eval)
    assert (
        report["train"]["ended"] == 1 and report["shared_prompts"] == 0 and report["warnings"] == []
    )
    lines = summary(done.report)
    assert (
        len(lines) == 4
        and "no chat template was found" in lines[0]
        and "101 rows read, 100 parsed, 100 kept; dropped 1 (1 empty answer)" in lines[1]
    )
    assert lines[2].startswith(f"train: {len(done.train)} pairs of ") and lines[3].startswith(
        "eval: "
    )


def test_the_console_names_the_columns_that_are_not_used(
    write: Write, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Also where the pairs come from the cache."""
    marked = [{**row, "source": "forum", "score_chosen": 3} for row in rows(10)]
    path = write("a.jsonl", [*marked, *rows(10, 10)])
    section = options(train=[path], cache=str(tmp_path / "cache"))
    for _ in range(2):
        line = summary(prepare(section, byte_tokenizer, 1000).report)[1]
        assert line.endswith("columns not used: score_chosen (10 rows), source (10 rows)")


def test_a_group_that_holds_every_prompt_is_told(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A column group may be something else: without a word, nothing would be held out."""
    path = write("a.jsonl", [{**row, "group": "all"} for row in rows(10)])
    done = prepare(options(train=[path], cache=None), byte_tokenizer, 1000)
    assert len(done.eval) == 0
    (warning,) = done.report["warnings"]
    assert "all 5 prompts of data.train belong to one group (column group)" in warning


def test_the_same_rows_give_the_same_tables(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    section = options(train=[write("a.jsonl", rows(1100))])
    first, second = (prepare(section, byte_tokenizer, 1000) for _ in range(2))
    assert first.report == second.report and first.train.fingerprint() == second.train.fingerprint()


def test_given_validation_sets_and_a_shared_prompt(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    train = [write("a.jsonl", rows(10)), write("b.jsonl", rows(10, 10)) + ":4"]
    section = options(train=train, eval=[write("c.jsonl", rows(6, 12))], overlap="keep")
    done = prepare(section, byte_tokenizer, 1000)
    assert (len(done.train), len(done.eval)) == (14, 6)
    assert [item["rows_read"] for item in done.report["sets"]["train"]] == [10, 4] and done.report[
        "shared_prompts"
    ] == 1
    assert (
        "1 validation prompts are in the training sets too" in caplog.text
        and caplog.records[-1].levelno == logging.WARNING
    )


def test_too_many_invalid_rows_stop_the_run(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write("a.jsonl", [*rows(7), *({"prompt": "q", "chosen": "a", "rejected": "a"},) * 3])
    assert (
        len(prepare(options(train=[path], max_dropped_fraction=0.3), byte_tokenizer, 1000).train)
        > 0
    )
    with pytest.raises(
        ValueError,
        match=r"30\.0% of the pairs are invalid, more than data\.max_dropped_fraction=0\.2\. "
        r".*3 identical answers",
    ):
        prepare(options(train=[path], max_dropped_fraction=0.2), byte_tokenizer, 1000)
    section = options(
        train=[write("b.jsonl", rows(5))],
        eval=[path + ":7", write("c.jsonl", [{"prompt": "q", "chosen": "a", "rejected": ""}])],
    )
    with pytest.raises(
        ValueError,
        match=r"^data\.eval=.*c\.jsonl: no valid pair is left\. .*1 rows read.*1 empty answer",
    ):
        prepare(section, byte_tokenizer, 1000)


def test_a_model_without_rows_for_the_tokenizer_is_refused(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"model\.path: the tokenizer .* vocab_size is 100"):
        prepare(options(train=[write("a.jsonl", rows(5))]), byte_tokenizer, 100)


def test_warnings_about_templates_and_special_tokens(
    write: Write,
    chat_tokenizer: PreTrainedTokenizerFast,
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    path = write(
        "a.jsonl", [*rows(20), {"prompt": "<|im_start|>user", "chosen": "a", "rejected": "b"}]
    )
    chosen = options(train=[path], eval_fraction=0, strings="verbatim")
    (warning,) = prepare(chosen, chat_tokenizer, 1000).report["warnings"]
    assert "1 rows spell a special token" in warning
    plain = options(train=[write("plain.jsonl", rows(20))], eval_fraction=0)
    (warning,) = prepare(plain, chat_tokenizer, 1000).report["warnings"]
    assert "20 rows are plain strings" in warning
    chats = [
        {"prompt": [{"role": "user", "content": str(i)}], "chosen": "a", "rejected": "b"}
        for i in range(5)
    ]
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    section = options(
        train=[write("b.jsonl", chats)], eval_fraction=0, chat_template=str(tmp_path / "t.jinja")
    )
    with pytest.raises(
        ValueError,
        match=r"none of 10 answers ends in an end marker \(0 were "
        r"cut\).*data\.missing_eos=keep trains nevertheless",
    ):
        prepare(section, byte_tokenizer, 1000)
    assert prepare(dataclasses.replace(section, missing_eos="keep"), byte_tokenizer, 1000).report[
        "warnings"
    ] == ["train: no answer ends in an end-of-text token, so the model will not learn to stop"]


def test_the_cache_follows_the_code_of_the_formats_too(tmp_path: Path) -> None:
    (tmp_path / "formats").mkdir()
    (tmp_path / "prepare.py").write_text("a = 1")
    (tmp_path / "formats" / "trl.py").write_text("b = 1")
    (tmp_path / "formats" / "notes.txt").write_text("c")
    first = code_hash(tmp_path)
    (tmp_path / "formats" / "notes.txt").write_text("d")
    assert code_hash(tmp_path) == first
    (tmp_path / "formats" / "trl.py").write_text("b = 2")
    assert code_hash(tmp_path) != first


def test_real_pairs(real_data: Path) -> None:
    path = str(real_data / "hh-rlhf" / "harmless-base-test.jsonl.gz")
    tokenizer = load_tokenizer(str(real_data / "models" / "stories260K"))
    done = prepare(options(train=[path]), tokenizer, 512)
    (item,) = done.report["sets"]["train"]
    assert (item["rows_read"], item["parsed"], item["kept"]) == (2312, 2299, 2299)
    assert {reason: drop["count"] for reason, drop in item["dropped"].items()} == {
        "empty answer": 4,
        "roles do not alternate": 4,
        "turn marker inside an answer": 5,
    }
    assert len(done.train) + len(done.eval) == 2299 and 80 < len(done.eval) < 150
    assert done.report["train"]["chosen_longer"] == pytest.approx(0.44, abs=0.02)
    assert (
        int(done.train.lengths[:, 0].max()) == 512
        and int(done.train.lengths[:, :2].sum(1).max()) <= 1024
    )


def warnings_of(tokenizer: PreTrainedTokenizerFast, **values: object) -> list[str]:
    return prepare(options(eval_fraction=0.0, **values), tokenizer, 1000).report["warnings"]


@pytest.mark.parametrize("messages", [False, True])
def test_answers_that_begin_with_their_prompt_are_warned_of(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast, messages: bool
) -> None:
    repeating = []
    for row in rows(3):
        repeating.append({name: row["prompt"] * (name != "prompt") + row[name] for name in row})
    good = rows(30, 10)
    if messages:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        for row in (*repeating, *good):
            for name, role in roles.items():
                row[name] = [{"role": role, "content": row[name]}]  # type: ignore[assignment]
    path = write("a.jsonl", [*repeating, *good])
    found = [text for text in warnings_of(byte_tokenizer, train=[path]) if "begin with" in text]
    assert len(found) == 1 and "both answers of 3 of 33 pairs begin with their prompt" in found[0]
    path = write("a.jsonl", [*repeating[:1], *good])  # 1 of 31: some answers do repeat
    assert not any("begin with" in text for text in warnings_of(byte_tokenizer, train=[path]))


def test_many_truncated_answers_are_warned_of(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    long = [{"prompt": "q", "chosen": " a" * 100, "rejected": f" {n}"} for n in range(2)]
    lengths: dict[str, object] = {"max_length": 64, "max_prompt_length": 0}
    path = write("a.jsonl", [*rows(10), *long])
    found = [
        text for text in warnings_of(byte_tokenizer, train=[path], **lengths) if "lost" in text
    ]
    assert len(found) == 1 and found[0].startswith("train: 2 of 24 answers (8%) lost their end")
    path = write("a.jsonl", [*rows(30), *long])
    assert not any("lost" in text for text in warnings_of(byte_tokenizer, train=[path], **lengths))


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (["q"] * 12, "no pair is held out for validation (0 of 12), as data.train has one prompt"),
        (["q"], "no pair is held out for validation (0 of 1), as data.train has one prompt"),
        (["q"] * 3 + ["r"] * 2, "2 of 5 pairs (40.0%) are held out, all those of 1 prompts"),
    ],
)
def test_a_held_out_share_far_from_the_fraction_is_told_with_both_numbers(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast, prompts: list[str], told: str
) -> None:
    some = [
        {"prompt": prompt, "chosen": f" good {i}", "rejected": f" bad {i}"}
        for i, prompt in enumerate(prompts)
    ]
    done = prepare(options(train=[write("a.jsonl", some)]), byte_tokenizer, 1000)
    (warning,) = done.report["warnings"]
    assert warning.startswith(f"data.eval_fraction=0.05: {told}")
    section = options(train=[write("a.jsonl", some)], eval_fraction=0.0)
    assert prepare(section, byte_tokenizer, 1000).report["warnings"] == []

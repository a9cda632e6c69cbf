"""A converted set is split as its source is: trees and posts stay on one side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.__main__ import main
from jaxdpo.data.formats.preference import Preference
from jaxdpo.data.prepare import prepare
from jaxdpo.data.splits import joined_keys, split_by_prompt
from tests.data.formats.test_oasst import thread, tree
from tests.data.formats.test_shp import shp
from tests.data.rows import Write, collect


def trees(count: int) -> list[dict[str, Any]]:
    """Messages of some trees of their own texts, each with pairs of two prompts."""
    rows = []
    for number in range(count):
        for row in thread():
            text = f"{row['text']} in tree {number}"
            rows.append({**row, "message_tree_id": f"tree {number}", "text": text})
    return rows


def posts(count: int) -> list[dict[str, Any]]:
    """Two pairs of each post, whose texts differ: a post may be edited."""
    rows = []
    for number in range(count):
        for version in ("", " (edited)"):
            row = shp(1, 9, 1, post=f"p{number}")
            rows.append({**row, "history": row["history"] + version})
    return rows


def sides(records: list[Preference], fraction: float = 0.3) -> dict[str, set[bool]]:
    """Of each group, the sides of a split on which it has pairs."""
    prompt_keys = np.array([record.prompt_key for record in records], np.uint64)
    group_keys = np.array([record.group_key for record in records], np.uint64)
    held_out = split_by_prompt(joined_keys(prompt_keys, group_keys), fraction)
    found: dict[str, set[bool]] = {}
    for record, is_held_out in zip(records, held_out.tolist(), strict=True):
        found.setdefault(record.group, set()).add(is_held_out)
    return found


@pytest.mark.parametrize(("rows", "first"), [(trees(30), "tree 0"), (posts(30), "p0")])
def test_trees_and_posts_of_a_converted_set_stay_on_one_side(
    write: Write, tmp_path: Path, rows: list[dict[str, Any]], first: str
) -> None:
    out = tmp_path / "ours.jsonl"
    assert main([f"data.train=[{write('a.jsonl', rows)}]", f"out={out}", "near=0"]) == 0
    assert json.loads(out.read_text().splitlines()[0])["group"] == first
    before, after = collect(str(tmp_path / "a.jsonl"))[1], collect(str(out))[1]
    assert len(before) == len(after) == 60
    assert len({record.prompt_key for record in after}) == 60
    found = sides(after)
    assert len(found) == 30 and all(len(both) == 1 for both in found.values())
    assert found == sides(before) and {True, False} == set.union(*found.values())


def test_what_is_held_out_of_a_converted_set_shares_no_tree(
    write: Write, tmp_path: Path, byte_tokenizer: Any
) -> None:
    out = tmp_path / "ours.jsonl"
    assert main([f"data.train=[{write('a.jsonl', trees(20))}]", f"out={out}", "near=0"]) == 0
    # Ids of messages are the same in all these trees, so the rows get ids of their own.
    rows = [
        {**json.loads(line), "id": str(n)} for n, line in enumerate(out.read_text().splitlines())
    ]
    group = {row["id"]: row["group"] for row in rows}
    section = DataSection(
        train=[write("b.jsonl", rows)],
        eval_fraction=0.3,
        max_length=128,
        max_prompt_length=100,
        cache=None,
    )
    done = prepare(section, byte_tokenizer, 1000)
    train, held_out = ({group[name] for name in part.ids} for part in (done.train, done.eval))
    assert train and held_out and not train & held_out


def test_equal_prompts_of_two_trees_are_not_split_either(write: Write) -> None:
    rows = trees(40)
    for row in rows:
        if row["message_id"] == "r":
            row["text"] = "the same question"
    found = sides(collect(write("a.jsonl", rows))[1])
    assert len({frozenset(both) for both in found.values()}) == 1


def test_groups_of_rows_are_kept_and_must_be_names(write: Write) -> None:
    row = {"chosen": "a", "rejected": "b"}
    rows = [{"prompt": f"q{n}", "group": group, **row} for n, group in enumerate(("x", 7, None))]
    report, records = collect(write("a.jsonl", rows))
    assert [record.group for record in records] == ["x", "7", ""]
    assert report.ignored_columns == {}
    for group in (True, 0.5, ["x"]):
        with pytest.raises(ValueError, match=r"a\.jsonl:1: column 'group' is .*Rename the column"):
            collect(write("a.jsonl", [{"prompt": "q", "group": group, **row}]))


def test_real_trees(real_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours.jsonl"
    path = real_data / "oasst" / "en_100_tree.jsonl"
    assert main([f"data.train=[{path}]", "data.pairing=all", f"out={out}", "near=0"]) == 0
    found = sides(collect(str(out))[1], fraction=0.2)
    assert len(found) > 90 and all(len(both) == 1 for both in found.values())


def test_a_tree_of_an_export_has_the_group_of_its_messages(write: Write) -> None:
    rows = thread()
    flat = collect(write("flat.jsonl", rows))[1]
    nested = collect(write("nested.jsonl", [tree(rows)]))[1]
    assert [record.group for record in flat] == [record.group for record in nested] == ["r", "r"]

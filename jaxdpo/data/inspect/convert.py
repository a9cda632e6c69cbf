"""Preference records as rows of our JSON lines, which training reads like any other set."""

import json
from typing import Any

from jaxdpo.data.formats.preference import Preference, Text


def to_row(record: Preference) -> dict[str, Any]:
    """A record as JSON values, which row format `preference` reads back."""
    row: dict[str, Any] = {
        "prompt": _plain(record.prompt),
        "chosen": _plain(record.chosen),
        "rejected": _plain(record.rejected),
    }
    if record.tools:
        row["tools"] = json.loads(record.tools)
    row["weight"] = record.weight
    if record.margin:
        row["margin"] = record.margin
    row["id"] = record.id
    if record.group:
        row["group"] = record.group
    return row


def _plain(text: Text) -> Any:
    if isinstance(text, str):
        return text
    return [turn.fields for turn in text]

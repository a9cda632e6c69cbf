"""Addresses of object stores and web pages where the name of a file or folder is wanted.

As paths they would work, and be wrong: "gs://bucket/run" is the folder "gs:" of this machine.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/\S*")
"""A scheme of at least two letters (one is a drive of Windows) and a slash; no blanks, which texts
such as prompts have."""
TEXTS = ("prompts",)
"""Options whose lists hold texts, in which an address or a ~ is as good as any word; one bare value
names a file."""


def remote_paths(values: Mapping[str, Any]) -> list[str]:
    """Problems of options that name something which is not on this machine, as messages.

    Args:
        values: all options, as nested dict.
    """
    problems = []
    for name, text in _texts(values):
        if not ADDRESS.fullmatch(text):
            continue
        if text.lower().startswith("file:"):
            path = "/" + text.partition(":")[2].lstrip("/")
            problems.append(f"{name}={text}: is an address. Write the path: {path}")
            continue
        problems.append(
            f"{name}={text}: is an address, and only files and folders of this machine can be "
            "read and written. Mount it (for a bucket: gcsfuse, mount-s3) or copy it, and name "
            "that folder"
        )
    return problems


def _texts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each text among the options with its option's name; of lists each item."""
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, Mapping):
            yield from _texts(value, f"{name}.")
        elif isinstance(value, str):
            yield name, value
        elif isinstance(value, list) and name not in TEXTS:
            for item in value:
                if isinstance(item, str):
                    yield name, item

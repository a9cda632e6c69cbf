"""Values that no option can have, whatever its name is.

pydantic takes true for the number 1, and has no word about numbers that a float32 cannot hold,
text that is no UTF-8 or the home of a user that does not exist. Each of them ended as a traceback
in the middle of a run, or trained with a value that nobody meant.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from jaxdpo.config.addresses import TEXTS
from jaxdpo.utils.text import is_unicode, printable

MAX_FLOAT = 3.4028235677973366e38
"""Numbers of a step are float32; from here on they are rounded to infinity there."""
MAX_INT = 2**63 - 1
"""The largest int64, which is what counters, seeds and positions of arrays are."""


def impossible_values(schema: type, values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The options among nested values that cannot be what they say, as (dotted name, problem).

    Args:
        schema: dataclass tree of the options.
        values: nested dicts, as read from a file and arguments; other things are left alone.
    """
    if not isinstance(values, dict):
        return
    hints = get_type_hints(schema)
    for name, value in values.items():
        hint = hints.get(name)
        option = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from impossible_values(hint, value, f"{option}.")  # type: ignore[arg-type]
        elif hint is not None:
            problem = _problem(name, hint, value)
            if problem is not None:
                yield option, f"{option}={printable(shown(value))}: {problem}"


def _problem(name: str, hint: Any, value: Any) -> str | None:
    items = value if isinstance(value, list) else [value]
    kinds = _kinds(hint)
    for item in items:
        if isinstance(item, str) and float in kinds and str not in kinds:
            item = _as_float(item)
        if isinstance(item, bool):
            if bool not in kinds and kinds & {int, float}:
                return "must be a number, not true or false"
        elif isinstance(item, int):
            if abs(item) > MAX_INT:
                return "is beyond 64 bits"
        elif isinstance(item, float):
            if MAX_FLOAT <= abs(item) < float("inf"):  # pydantic refuses the infinite
                return "is beyond the numbers of float32 (3.4e38)"
        elif isinstance(item, str):
            if not is_unicode(item):
                return "is not valid UTF-8. Rename the file or folder, or type the text again"
            is_path = name not in TEXTS or item is value  # a bare value of it names a file
            if is_path and _has_unknown_home(item):
                return "there is no user of that name, whose home it could be in"
    return None


def _kinds(hint: Any) -> set[Any]:
    """The types in a union, and of the items of a list."""
    if not get_args(hint):
        return {hint}
    kinds = set()
    for part in get_args(hint):
        kinds |= _kinds(part)
    return kinds


def _as_float(text: str) -> float | str:
    """The number in a text, which 1e300 is to YAML: it wants a dot and a sign, 1.0e+300."""
    try:
        return float(text)
    except ValueError:
        return text


def _has_unknown_home(text: str) -> bool:
    """Whether a path is in the home of a user that does not exist: ~nobody/model."""
    return text.startswith("~") and os.path.expanduser(text) == text


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."

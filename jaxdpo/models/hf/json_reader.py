"""Typed values out of a config.json, with every problem collected, so that one error lists them
all.

Not pydantic, because keys and defaults depend on the family (it would take a model class for each),
and because its checks between fields do not run when one field is malformed, so that one error
could not list every problem.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

REQUIRED: Any = object()
"""In place of a default: the key must be present."""
_MAX_COUNT = 2**40
"""Far above every size of a real model; a larger one is a mistake or an attack."""
_MAX_SHOWN = 200
"""Characters of a value that a message shows."""


class Reader:
    """Reads values of config.json; a malformed one is added to `problems` and replaced by a
    harmless one.

    Attributes:
        given: the object as it was given.
        raw: the same, with defaults for absent keys.
        problems: one message for each value that cannot be used.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]):
        """Read `given`, or `defaults` where it lacks a key."""
        self.given = given
        self.raw = {**defaults, **given}
        self.problems: list[str] = []

    def refuse(self, key: str, why: str) -> None:
        """Add the problem that the value of a key cannot be used."""
        self.problems.append(f"{key}={shown(self.raw.get(key))}: {why}")

    def size(self, key: str, default: int = REQUIRED) -> int:
        """A count."""
        return self._value(key, default, _is_size, "a whole number of at least 1", 1)

    def number(self, key: str, default: float = REQUIRED) -> float:
        """A number above 0."""
        return float(self._value(key, default, _is_positive, "a number above 0", 1.0))

    def coefficient(self, key: str, default: float = REQUIRED) -> float:
        """A number that may be 0."""
        return float(self._value(key, default, _is_at_least_0, "a number of at least 0", 1.0))

    def optional(self, key: str, default: None = None) -> float | None:
        """A number above 0, or None."""
        if self.raw.get(key) is None:
            return default
        return self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value."""
        return self._value(key, default, _is_bool, "true or false", False)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""

        def accept(value: Any) -> bool:
            if not isinstance(value, list) or len(value) != count:
                return False
            return all(_is_positive(item) for item in value)

        values = self._value(key, REQUIRED, accept, f"a list of {count} numbers above 0", ())
        return tuple(float(value) for value in values)

    def _value(
        self, key: str, default: Any, accept: Callable[[Any], bool], wanted: str, harmless: Any
    ) -> Any:
        value = self.raw.get(key)
        if value is None:  # null counts as absent, as it does in transformers
            if default is not REQUIRED:
                return default
            self.problems.append(f"{key}: is missing. It must be {wanted}")
            return harmless
        if not accept(value):
            self.refuse(key, f"must be {wanted}")
            return harmless
        return value


def shown(value: Any) -> str:
    """A value as JSON, cut when it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _MAX_COUNT


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # neither NaN, nor infinite, nor an int beyond float


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_at_least_0(value: Any) -> bool:
    return _is_number(value) and value >= 0

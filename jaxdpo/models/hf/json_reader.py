"""Typed values out of a config.json, with every problem collected, so that all are told at once."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

REQUIRED: Any = object()
"""In place of a default: the key must be there."""


class Reader:
    """Reads values of config.json; a malformed one is noted in `problems` and replaced by a harmless one."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]):
        """Read `given`, or `defaults` where it lacks a key."""
        self.given, self.raw = given, {**defaults, **given}
        self.problems: list[str] = []

    def refuse(self, key: str, why: str) -> None:
        """Note that the value of a key cannot be used."""
        self.problems.append(f"{key}={shown(self.raw.get(key))}: {why}")

    def _value(
        self, key: str, default: Any, accept: Callable[[Any], bool], wanted: str, fallback: Any
    ) -> Any:
        value = self.raw.get(key)
        if value is None and default is not REQUIRED:
            return default
        if value is None:
            self.problems.append(f"{key}: is missing. It must be {wanted}")
        elif accept(value):
            return value
        else:
            self.refuse(key, f"must be {wanted}")
        return fallback

    def size(self, key: str, default: int = REQUIRED) -> int:
        """A count."""
        return self._value(key, default, _is_size, "a whole number of at least 1", 1)

    def number(self, key: str, default: float = REQUIRED) -> float:
        """A number above 0."""
        return float(
            self._value(
                key, default, lambda value: _is_number(value) and value > 0, "a number above 0", 1.0
            )
        )

    def weight(self, key: str, default: float = REQUIRED) -> float:
        """A number that may be 0."""
        return float(
            self._value(
                key,
                default,
                lambda value: _is_number(value) and value >= 0,
                "a number of at least 0",
                1.0,
            )
        )

    def optional(self, key: str, default: None = None) -> float | None:
        """A number above 0, or none."""
        return None if self.raw.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value."""
        return self._value(
            key, default, lambda value: isinstance(value, bool), "true or false", False
        )

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""

        def accept(value: Any) -> bool:
            return (
                isinstance(value, list)
                and len(value) == count
                and all(_is_number(item) and item > 0 for item in value)
            )

        return tuple(
            map(float, self._value(key, REQUIRED, accept, f"a list of {count} numbers above 0", ()))
        )


def shown(value: Any) -> str:
    """A value as JSON, cut when it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 200 else text[:200] + "..."


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**40


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

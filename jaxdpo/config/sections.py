"""What every section of options is made of: a frozen dataclass with strict keys, whose problems are
reported all at once."""

import dataclasses
from collections.abc import Iterable
from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict

STRICT_KEYS = ConfigDict(extra="forbid", allow_inf_nan=False)
"""For pydantic: an unknown key is an error, and numbers must be finite."""

MAX_SEED = (1 << 32) - 1
"""JAX's random keys take 32 bits."""

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Make a class a section: a frozen dataclass with keyword arguments, strict when it is read
    from a file."""
    cls.__pydantic_config__ = STRICT_KEYS  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def refuse(problems: Iterable[str]) -> None:
    """Raise one ValueError that lists all problems, if there are any.

    Raises:
        ValueError: one problem a line.
    """
    found = list(problems)
    if found:
        raise ValueError("\n".join(found))


def require(*checks: tuple[bool, str]) -> None:
    """`refuse` the messages of the checks that are False.

    Raises:
        ValueError: when any check fails; one message a line.
    """
    refuse(message for ok, message in checks if not ok)

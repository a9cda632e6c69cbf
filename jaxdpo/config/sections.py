"""What every section of options is made of: a frozen dataclass with strict keys, whose checks are told all at once."""

import dataclasses
from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict

STRICT_KEYS = ConfigDict(extra="forbid", allow_inf_nan=False)

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Make a class a section: frozen, its fields given by name, unknown ones refused when it is read from a file."""
    cls.__pydantic_config__ = STRICT_KEYS  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def require(*checks: tuple[bool, str]) -> None:
    """Raise one ValueError that lists the message of every check that is False.

    Raises:
        ValueError: when any check fails; one message a line.
    """
    if problems := [message for ok, message in checks if not ok]:
        raise ValueError("\n".join(problems))

"""Bounds for chat templates, which are programs that come with a model.

transformers renders them in Jinja's sandbox, which keeps them from files and from Python's own
attributes. What it leaves open is bounded here: a template may write without end, and it may
compute for ever.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import jinja2.nodes
from jinja2.exceptions import SecurityError, TemplateError

from jaxdpo.data.tokenizer_json import compiled_template

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 2**26
"""Most characters of a conversation: twice the longest line of a data file."""
SLOW_SECONDS = 10.0
"""A conversation is written in a millisecond or less."""
REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template raises for a conversation that it does not take: Jinja's errors, and Python's for
what it computes with, such as a division by zero."""


@functools.lru_cache(maxsize=8)
def limited(template: str) -> str:
    """The template, whose compiled form in transformers' cache has been given its bounds.

    Raises:
        jinja2.TemplateSyntaxError: it does not compile.
        jinja2.exceptions.SecurityError: it names a private attribute.
    """
    environment = compiled_template(template).environment
    environment.concat = _concat
    environment.unsafe_undefined = _refuse
    # Filters of constants are computed while a template compiles, before it has its bounds.
    for filter_ in environment.parse(template).find_all(jinja2.nodes.Filter):
        for argument in filter_.args:
            value = getattr(argument, "value", None)
            if filter_.name == "attr" and isinstance(value, str) and value.startswith("_"):
                raise SecurityError(f"access to attribute {value!r} is unsafe.")
    return template


def _concat(pieces: Iterable[str]) -> str:
    """Join what a template writes, up to MAX_CHARACTERS."""
    parts, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise TemplateError(f"it writes more than {MAX_CHARACTERS:,} characters")
        parts.append(piece)
    return "".join(parts)


def _refuse(obj: Any, attribute: str) -> NoReturn:
    """In place of an undefined value, which a template would write as nothing."""
    kind = type(obj).__name__
    raise SecurityError(f"access to attribute {attribute!r} of {kind!r} object is unsafe.")


@contextlib.contextmanager
def named_when_slow(what: str) -> Iterator[None]:
    """Log what is being waited for, where it takes SLOW_SECONDS and more."""
    timer = threading.Timer(
        SLOW_SECONDS,
        logger.warning,
        [f"{what} for more than {SLOW_SECONDS:g} s. If it never ends, stop with Ctrl-C"],
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

"""Which chat template is in use, and the variables that it reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateSyntaxError

from jaxdpo.data.template_limits import REFUSALS, limited, named_when_slow
from jaxdpo.utils.text import printable

FIXED_DATE = """{%- macro strftime_now(format) -%}
{{- {"%Y-%m-%d": "2024-07-26"}.get(format, "26 Jul 2024") -}}
{%- endmacro -%}"""
"""Put before a chat template that writes today's date (Llama 3.1 and later), so that a run resumed
tomorrow sees the same tokens. 26 Jul 2024 is what Llama 3.1's own template falls back to."""


DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of a tokenizer's templates: for all rows, and for rows with tools (transformers' names)."""


class ChatTemplate(NamedTuple):
    """The chat template in use."""

    text: str | None
    """None: there is none, messages are laid out as plain turns."""
    for_tools: str | None
    """The one for rows with tools, if it is another one."""
    note: str
    """A line for the log: which it is."""


def find_template(
    tokenizer: Any, chosen: str | None, option: str = "data.chat_template"
) -> ChatTemplate:
    """The chat template to use: the chosen one, else the tokenizer's own, else none.

    Args:
        tokenizer: a tokenizer of transformers.
        chosen: a file, or the name of one of the tokenizer's templates.
        option: which option chooses it.

    Raises:
        ValueError: the file cannot be read, the template does not compile, or the tokenizer has
            several of which none is the default.
    """
    named = named_templates(tokenizer)
    for_tools = None
    if chosen is not None:
        text = template_text(tokenizer, chosen, option)
        kind = f"{chosen!r} of the tokenizer's" if chosen in named else f"the file {chosen}"
        note = f"chat template: {kind} ({option})"
    elif named:
        if DEFAULT not in named:
            raise ValueError(
                f"{option}=null: the tokenizer has chat templates by name and none is called "
                f"{DEFAULT}: {', '.join(named)}. Choose one, e.g. {option}={next(iter(named))}, "
                "or name a Jinja file"
            )
        text, for_tools = named[DEFAULT], named.get(TOOL_USE)
        note = f"chat template: {DEFAULT!r} of the tokenizer's ({', '.join(named)})"
        if for_tools is not None:
            note += f", {TOOL_USE!r} for rows with tools"
    elif tokenizer.chat_template:
        text, note = str(tokenizer.chat_template), "chat template: the tokenizer's own"
    else:
        return ChatTemplate(
            None,
            None,
            "no chat template was found in the tokenizer's files: messages are laid out as plain "
            f"Human: / Assistant: turns. {option} names one",
        )
    text = _compiled(tokenizer, text, option, chosen)
    if for_tools is not None:
        for_tools = _compiled(tokenizer, for_tools, option, TOOL_USE)
    return ChatTemplate(text, for_tools, printable(note))


def named_templates(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's templates by name; empty if it has one without a name, or none."""
    return tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}


def template_text(tokenizer: Any, chosen: str, option: str = "data.chat_template") -> str:
    """The Jinja text of one of the tokenizer's named templates, or of a file.

    Raises:
        ValueError: it is neither.
    """
    named = named_templates(tokenizer)
    if chosen in named:
        return named[chosen]
    try:
        return Path(chosen).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = f", or one of {', '.join(named)}" if named else ""
        raise ValueError(
            f"{option}={chosen}: {printable(str(error))}. Name a Jinja chat template file{names}"
        ) from None


def _compiled(tokenizer: Any, template: str, option: str, chosen: str | None) -> str:
    """The template with a fixed date, after a try whether it is one."""
    if "strftime_now" in template:
        template = FIXED_DATE + template
    try:
        with named_when_slow(f"the chat template ({option}={chosen}) writes its first message"):
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "a"}],
                chat_template=limited(template),
                tokenize=False,
            )
    except TemplateSyntaxError as error:
        raise ValueError(
            f"{option}={chosen}: {printable(str(error))}. Name a Jinja chat template file"
        ) from None
    except REFUSALS:
        pass  # it compiles; what it asks of a conversation is found out row by row
    return template


def check_kwargs(option: str, kwargs: Mapping[str, Any], template: ChatTemplate) -> None:
    """Raise where the chat template reads none of the variables that an option sets.

    Raises:
        ValueError: names them.
    """
    unread = []
    text = f"{template.text or ''}\n{template.for_tools or ''}"
    for name in kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", text):
            unread.append(name)
    if unread:
        raise ValueError(
            f"{option}={dict(kwargs)}: the chat template does not read {', '.join(unread)}. "
            "Leave it out, or name a template that does"
        )

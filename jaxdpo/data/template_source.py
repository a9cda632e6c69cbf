"""Which chat template is in use, and the variables that it reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from jaxdpo.utils.text import printable

FIXED_DATE = """{%- macro strftime_now(format) -%}
{{- {"%Y-%m-%d": "2024-07-26"}.get(format, "26 Jul 2024") -}}
{%- endmacro -%}"""
"""Put before a chat template that writes today's date (Llama 3.1 and later), so that a run resumed
tomorrow sees the same tokens. 26 Jul 2024 is what Llama 3.1's own template falls back to."""


def read_template(tokenizer: Any, path: str | None) -> str | None:
    """The chat template to use: the file at `path`, else the tokenizer's own, else None.

    Raises:
        ValueError: the file cannot be read, or the template does not compile.
    """
    try:
        if path is not None:
            template = Path(path).expanduser().read_text(encoding="utf-8")
        elif tokenizer.chat_template:
            template = str(tokenizer.get_chat_template())
        else:
            return None
        if "strftime_now" in template:
            template = FIXED_DATE + template
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], chat_template=template, tokenize=False
        )
    except (OSError, UnicodeDecodeError, TemplateSyntaxError) as error:
        raise ValueError(
            f"data.chat_template={path}: {printable(str(error))}. Name a Jinja chat template file"
        ) from None
    except (TemplateError, TypeError):
        pass  # it compiles; what it asks of a conversation is found out row by row
    return template


def check_kwargs(option: str, kwargs: Mapping[str, Any], template: str | None) -> None:
    """Raise where the chat template reads none of the variables that an option sets.

    Raises:
        ValueError: names them.
    """
    unread = []
    for name in kwargs:
        if template is None or not re.search(rf"\b{re.escape(name)}\b", template):
            unread.append(name)
    if unread:
        raise ValueError(
            f"{option}={dict(kwargs)}: the chat template does not read {', '.join(unread)}. "
            "Leave it out, or name a template that does"
        )

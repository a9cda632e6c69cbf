r"""Lists of messages, answers or scores that are stored as text: pandas' CSV, JSON in a cell.

    "[{'role': 'user', 'content': 'Why?'}]"   (what pandas writes of a Python list)
    "[{\"role\": \"user\", \"content\": \"Why?\"}]"   (JSON)

Such text is read where it is a list for certain, and refused where it only begins like a list of
messages: it is never trained on as text.
"""

import ast
import json
import re
from typing import Any

from jaxdpo.data.formats.roles import KNOWN_ROLES

_OPENS = r"""["\s]*(?:array\(\s*)?(?:[\[(]\s*)*"""
_BEGINS = re.compile(
    rf"""{_OPENS}\{{\s*\\?["']{{1,2}}(?:role|from|content|value|messages)\\?["']{{1,2}}\s*:"""
)
"""How text begins that may be a list of messages, or one message."""
_BEGINS_LATER = re.compile(
    rf"""{_OPENS}\{{[^{{}}\[\]]*?["'](?:role|from)\\?["']{{1,2}}\s*:\s*\\?["']{{1,2}}"""
    rf"""(?:{"|".join(sorted(KNOWN_ROLES))})\\?["']""",
    re.IGNORECASE,
)
"""The same behind other fields: a name, an id, a weight."""
_ROLE = rf"""["'](?:{"|".join(sorted(KNOWN_ROLES))})["']"""
_OTHER_FORMS = re.compile(
    # [('user', 'Why?')]
    rf"""\s*[\[(]\s*[\[(]\s*{_ROLE}\s*,"""
    # Message(id=3, role=<Role.USER: 'user'>, content='Why?')
    rf"""|\s*(?:[\[(]\s*)?[A-Z]\w*\((?:\w+=[^,()]*,\s*)*role=<?(?:\w+[.:]\s*)*{_ROLE}"""
    # ChatMessage(content='Why?, ...', role='user')
    r"""|\s*(?:[\[(]\s*)?[A-Z]\w*(?:Message|Turn)\(content=["']"""
    r"""|\s*(?:[\[(]\s*)?OrderedDict\([\[(]*\{?["'](?:role|content)["']""",
    re.IGNORECASE,
)
"""How other Python objects of messages begin, as text. They are not read."""
_HAS_ROLE = re.compile(
    r"""["'](?:role|from)\\?["']{1,2}\s*:\s*\\?["']{1,2}(\w+)\\?["']""", re.IGNORECASE
)
_SAYS = ("content", "tool_calls", "parts")
"""Fields of which a message with a role has one."""
REMEDY = (
    "Write the column as a list of messages in JSON lines or Parquet "
    "(pandas: df.to_json(file, orient='records', lines=True), or df.to_parquet)"
)


def read_list(value: Any) -> list[Any] | None:
    """A list, or the list that a text is for certain; None for anything else."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    found = _parse(value)
    return found if isinstance(found, list) else None


def messages_in(text: str, column: str) -> Any:
    """The messages that a text is for certain, as JSON gives them; else the text itself.

    Args:
        column: where it is from, for messages.

    Raises:
        ValueError: it begins as messages do, but cannot be read.
    """
    is_other_form = _OTHER_FORMS.match(text) is not None
    if not is_other_form and not _BEGINS.match(text) and not _BEGINS_LATER.match(text):
        return text
    found = _parse(text)
    if isinstance(found, str):  # JSON text of JSON text
        found = _parse(found)
    items = _items(found)
    are_messages = [_is_message(item) for item in items]
    if items and all(are_messages):
        return found
    are_nested = any(_is_message(part) for item in items for part in _items(item))
    roles = {role.lower() for role in _HAS_ROLE.findall(text)}
    is_unread = is_other_form or (found is None and bool(roles & KNOWN_ROLES))
    if any(are_messages) or are_nested or is_unread:
        raise ValueError(
            f"column {column!r} is text that begins like a list of messages and cannot be read as "
            f"one. {REMEDY}"
        )
    return text


def turned(value: dict[str, Any]) -> Any:
    """Messages from an object of columns, {"role": [...], "content": [...]}; else the object.

    datasets gives a Sequence of messages in this form.
    """
    columns = list(value.values())
    if not columns or not all(isinstance(column, list) for column in columns):
        return value
    if len({len(column) for column in columns}) > 1 or value.keys().isdisjoint({"role", "from"}):
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]


def _items(value: Any) -> list[Any]:
    """What may be messages: the items of a list, of an object with one, or the object itself."""
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else []


def _is_message(item: Any) -> bool:
    """Whether an item is a message, of whatever role; {"from": "Paris", "to": "Rome"} is none."""
    if not isinstance(item, dict):
        return False
    if "from" in item:  # {"from": "USD", "value": 3} is none either
        role, value = item["from"], item.get("value", 0)
        if isinstance(role, str) and role.strip().lower() in KNOWN_ROLES:
            return "value" in item
        return isinstance(role, str) and isinstance(value, str)
    return isinstance(item.get("role"), str) and not item.keys().isdisjoint(_SAYS)


def _parse(text: str) -> Any:
    """What JSON or Python reads in a text; None if neither does, or not for certain."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # perhaps Python
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    # Python joins strings that stand side by side: NumPy's ['a' 'b'] would be one answer.
    if _squeezed(repr(value)) != _squeezed(text):
        return None
    return value


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)

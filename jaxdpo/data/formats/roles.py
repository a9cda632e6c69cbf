"""Roles of messages, as data sets spell them: Human, USER, gpt, bot, prompter."""

from jaxdpo.data.formats.tool_calls import CALL_ROLES

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "function_response", "observation"), "tool"),
    "system": "system",
}
"""What the spellings mean to chat templates; letter case does not count."""
OWN_ROLES = frozenset({"developer", "function", "ipython", "document", "documents", "control"})
"""Roles that some chat templates know beside the four: they are handed to the template."""
KNOWN_ROLES = ROLES.keys() | OWN_ROLES | CALL_ROLES


def read_role(role: str) -> str | None:
    """The role that a chat template knows; None for a spelling that is unknown.

    >>> read_role("Human"), read_role("BOT"), read_role("developer"), read_role("elf")
    ('user', 'assistant', 'developer', None)
    """
    spelling = role.strip().lower()
    if spelling in OWN_ROLES:
        return spelling
    return ROLES.get(spelling)

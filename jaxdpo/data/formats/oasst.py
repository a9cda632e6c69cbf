"""OpenAssistant/oasst1 and oasst2: trees of messages whose replies are ranked, as whole trees or as one message a row."""

from collections.abc import Iterable, Iterator
from typing import Any

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import Outcome, Row, checked, number, require, string
from jaxdpo.data.formats.preference import Dropped, Message, Turns
from jaxdpo.data.formats.ranked import choose_pairs, no_pair

ROLES = {"prompter": "user", "assistant": "assistant"}
COLUMNS = (
    "message_tree_id",
    "prompt",
    "message_id",
    "parent_id",
    "text",
    "role",
    "lang",
    "rank",
    "deleted",
    "synthetic",
)

Node = dict[str, Any]


def parse_oasst(row: Row, section: DataSection) -> Iterator[Outcome]:
    """One tree {prompt: message with replies, orphans: messages without their parent}; keys that are absent count as null.

    The ranked replies (0 is best) to one message of a user are paired as data.pairing says; all of a tree stays on one side of a
    split. Rules leave out what follows a deleted message, other languages than data.oasst.languages and, without data.oasst.synthetic,
    threads that a model wrote a part of.

    Raises:
        ValueError: a message lacks a column or has one of the wrong type.
    """
    for _ in row.get("orphans") or ():
        yield Dropped("the parent message is missing")
    if row.get("prompt") is not None:
        yield from _pairs_below(row["prompt"], (), section)


def is_oasst(row: Row) -> bool:
    """Whether a row is a message of a tree or a tree."""
    return "message_tree_id" in row and (
        isinstance(row.get("prompt"), dict) or {"parent_id", "role", "text"} <= row.keys()
    )


def gather_trees(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """(place, row) of trees from those of messages, which may stand in any order; whole trees pass through.

    All messages are held in memory: the sets have some 100,000.

    Raises:
        ValueError: a message lacks a column; names its row.
    """
    trees: dict[str, list[tuple[str, Node]]] = {}
    for place, row in rows:
        if isinstance(row.get("prompt"), dict):
            yield place, row
            continue
        try:
            require(row, "message_id", "parent_id", "text", "role")
            trees.setdefault(string(row, "message_tree_id"), []).append(
                (place, {**row, "replies": []})
            )
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    yield from map(_plant, trees.values())


def _plant(placed: list[tuple[str, Node]]) -> tuple[str, Row]:
    """One tree from its messages."""
    nodes = {node["message_id"]: node for _, node in placed}
    root, orphans = None, []
    for node in nodes.values():
        parent = node["parent_id"]
        if parent is None:
            root = node
        elif parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            orphans.append(node)
    return placed[0][0], {"prompt": root, "orphans": orphans}


def _pairs_below(node: Node, before: Turns, section: DataSection) -> Iterator[Outcome]:
    """The pairs of a message's replies and of all that follows, each reply being part of the prompt of what follows it."""
    role = ROLES.get(string(node, "role"))
    if role is None:
        raise ValueError(f"column 'role' is {node['role']!r}, must be prompter or assistant")
    turns, replies = (*before, Message(role, string(node, "text"))), node.get("replies") or []
    if reason := _unwanted(node, section):
        yield from ([reason] if _ranked(replies) else [])
        return
    if role == "user":
        ranked = [
            (rank, reply) for rank, reply in _ranked(replies) if not _unwanted(reply, section)
        ]
        for better, worse in choose_pairs(ranked, section.pairing):
            answers = ((Message("assistant", string(reply, "text")),) for reply in (better, worse))
            name = f"{better.get('message_id')}>{worse.get('message_id')}"
            yield checked({"id": name}, turns, *answers, root=turns[:1])
        if replies and (nothing := no_pair(ranked)) is not None:
            yield nothing
    for reply in replies:
        yield from _pairs_below(reply, turns, section)


def _ranked(replies: list[Node]) -> list[tuple[float, Node]]:
    return [
        (number(reply["rank"], "rank"), reply) for reply in replies if reply.get("rank") is not None
    ]


def _unwanted(node: Node, section: DataSection) -> Dropped | None:
    """Why a message and all that follows it is left out, if it is."""
    if node.get("deleted"):
        return Dropped("follows a deleted message", by_rule=True)
    if section.oasst.languages and node.get("lang") not in section.oasst.languages:
        return Dropped("other language", by_rule=True)
    if not section.oasst.synthetic and node.get("synthetic"):
        return Dropped("written by a model", by_rule=True)
    return None

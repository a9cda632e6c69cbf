"""OpenAssistant/oasst1 and oasst2: trees of messages whose replies are ranked, 0 being the best.

Either a complete tree in a row (the export), or one message a row (the hub set):

    {"message_tree_id": "t", "prompt": {"message_id": "m", "text": "Why?", "role": "prompter",
     "replies": [{"message_id": "n", "text": "So.", "role": "assistant", "rank": 0, ...}, ...]}}
    {"message_tree_id": "t", "message_id": "n", "parent_id": "m", "text": "So.",
     "role": "assistant", "rank": 0, "lang": "en", "deleted": false, "synthetic": false}

The ranked replies to one message of a user are paired as data.pairing says. Dropped, beyond what
make_preference drops: messages whose parent is missing. Filtered: what follows a deleted message,
other languages than data.oasst.languages, without data.oasst.synthetic threads that a model wrote
a part of, and replies that make no pair (ties, fewer than two ranks).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.common import (
    Outcome,
    Row,
    make_preference,
    number,
    one_turn,
    require,
    string,
)
from jaxdpo.data.formats.preference import Dropped, Turns
from jaxdpo.data.formats.ranked import choose_pairs, no_pair
from jaxdpo.utils.text import has_content

ROLES = {"prompter": "user", "assistant": "assistant"}
TREE_COLUMNS = ("message_tree_id", "prompt")
MESSAGE_COLUMNS = (
    "message_tree_id", "message_id", "parent_id", "text", "role", "lang", "rank", "deleted",
    "synthetic",
)  # fmt: skip

Node = dict[str, Any]
"""A message, with its replies under "replies"."""


def parse_oasst(row: Row, section: DataSection) -> Iterator[Outcome]:
    """Parse a tree {prompt: message with replies, orphans: messages without their parent}.

    Keys that are absent count as null. All pairs of a tree stay on one side of a split.

    Raises:
        ValueError: a message lacks a column or has one of the wrong type.
    """
    for _ in row.get("orphans") or ():
        yield Dropped("the parent message is missing")
    if row.get("prompt") is not None:
        tree = str(row.get("message_tree_id") or row["prompt"].get("message_id") or "")
        yield from _pairs_below(row["prompt"], (), tree, section)


def unread_oasst(row: Row, section: DataSection) -> Iterator[str]:
    """Columns of a row that are not read: all but those of the set, also weight, system and id."""
    read = TREE_COLUMNS if isinstance(row.get("prompt"), dict) else MESSAGE_COLUMNS
    for name, value in row.items():
        if name not in read and has_content(value):
            yield str(name)


def is_oasst(row: Row) -> bool:
    """Whether a row is a tree, or a message of one."""
    if "message_tree_id" not in row:
        return False
    return isinstance(row.get("prompt"), dict) or {"parent_id", "role", "text"} <= row.keys()


def gather_trees(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """Rows of trees from rows of messages, which may come in any order; trees pass through.

    All messages are held in memory: the sets have about 100,000.

    Args:
        rows: (place, row), a place being file:number.

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
            tree = string(row, "message_tree_id")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        trees.setdefault(tree, []).append((place, {**row, "replies": []}))
    for tree, placed in trees.items():
        first_place, _ = placed[0]
        yield first_place, _build_tree(tree, [node for _, node in placed])


def _build_tree(tree: str, messages: list[Node]) -> Row:
    """One tree from its messages, each with an empty list of replies."""
    nodes = {node["message_id"]: node for node in messages}
    root, orphans = None, []
    for node in nodes.values():
        parent = node["parent_id"]
        if parent is None:
            root = node
        elif parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            orphans.append(node)
    return {"message_tree_id": tree, "prompt": root, "orphans": orphans}


def _pairs_below(node: Node, before: Turns, tree: str, section: DataSection) -> Iterator[Outcome]:
    """The pairs of a message's replies, and of every message below it.

    Each reply is part of the prompt of the messages that follow it.

    Args:
        tree: the id of the tree, which all of its pairs keep as their group.
    """
    role = ROLES.get(string(node, "role"))
    if role is None:
        raise ValueError(f"column 'role' is {node['role']!r}, must be prompter or assistant")
    turns = before + one_turn(role, string(node, "text"))
    replies = node.get("replies") or []
    reason = _filtered(node, section)
    if reason is not None:
        if _ranked(replies):  # otherwise there was no pair to filter
            yield reason
        return
    if role == "user":
        yield from _pairs_of(replies, turns, tree, section)
    for reply in replies:
        yield from _pairs_below(reply, turns, tree, section)


def _pairs_of(
    replies: list[Node], prompt: Turns, tree: str, section: DataSection
) -> Iterator[Outcome]:
    """The pairs of the replies to one message of a user."""
    ranked = []
    for rank, reply in _ranked(replies):
        if _filtered(reply, section) is None:
            ranked.append((rank, reply))
    for better, worse in choose_pairs(ranked, section.pairing):
        chosen = one_turn("assistant", string(better, "text"))
        rejected = one_turn("assistant", string(worse, "text"))
        name = f"{better.get('message_id')}>{worse.get('message_id')}"
        yield make_preference({"id": name, "group": tree}, prompt, chosen, rejected)
    nothing = no_pair(ranked)
    if replies and nothing is not None:
        yield nothing


def _ranked(replies: list[Node]) -> list[tuple[float, Node]]:
    """(rank, reply) of the replies that have a rank."""
    found = []
    for reply in replies:
        if reply.get("rank") is not None:
            found.append((number(reply["rank"], "rank"), reply))
    return found


def _filtered(node: Node, section: DataSection) -> Dropped | None:
    """Why a message and everything below it is filtered; None if it is not."""
    if node.get("deleted"):
        return Dropped("follows a deleted message", filtered=True)
    if section.oasst.languages and node.get("lang") not in section.oasst.languages:
        return Dropped("other language", filtered=True)
    if not section.oasst.synthetic and node.get("synthetic"):
        return Dropped("written by a model", filtered=True)
    return None

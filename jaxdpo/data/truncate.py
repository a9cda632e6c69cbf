"""Truncation: data.max_prompt_length and data.max_length.

The prompt is truncated first, and both answers of a pair keep the same prompt, because DPO compares
two answers to one prompt. A long prompt loses its beginning (the last turns are what the answers
reply to), a long answer loses its end, and with it the eos token, so the model is not taught to
stop where the text was cut.
"""

from typing import TypeVar

Item = TypeVar("Item")


def truncate_prompt(ids: list[int], max_prompt_length: int, bos_id: int | None) -> list[int]:
    """The last max_prompt_length tokens of a prompt; a bos token in front stays in front."""
    if len(ids) <= max_prompt_length:
        return ids
    bos = []
    if ids[0] == bos_id:
        bos = ids[:1]
    num_kept = max_prompt_length - len(bos)
    return bos + ids[len(ids) - num_kept :]


def truncate_completion(items: list[Item], prompt_length: int, max_length: int) -> list[Item]:
    """What of an answer (token ids, or its completion mask) fits behind a prompt; may be empty."""
    return items[: max(max_length - prompt_length, 0)]

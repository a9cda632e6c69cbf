"""Truncation: data.max_prompt_length and data.max_length.

Only what does not fit is cut. The prompt keeps what the longer answer leaves of data.max_length, at
least half of it, and both answers keep the same prompt, because DPO compares two answers to one
prompt. A long prompt loses its beginning (the last turns are what the answers reply to), a long
answer loses its end, and with it the eos token, so the model is not taught to stop where the text
was cut.
"""

from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")


def prompt_limit(max_length: int, max_prompt_length: int, longer_answer: Any) -> Any:
    """Most tokens that a prompt keeps beside its answers.

    Args:
        max_length: most tokens of prompt and answer.
        max_prompt_length: as the option is set. 0: what the longer answer leaves, at least half.
        longer_answer: tokens of it, with its eos: an integer, or an array of them.

    >>> int(prompt_limit(100, 0, 30)), int(prompt_limit(100, 0, 80)), prompt_limit(100, 60, 30)
    (70, 50, 60)
    """
    if max_prompt_length:
        return max_prompt_length
    return np.maximum(max_length - longer_answer, max_length // 2)


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

"""Pairs to packed rows. numpy only.

A row of T slots holds several pairs. In the shared layout a pair takes one run of slots,

    reverse(C) | P | R        (chosen reversed, prompt, rejected)

so that what any token may see is one interval of slots: a token of P or R sees from P's first slot to itself, a token of C
from itself to P's last slot. The prompt is computed once for both answers. In the separate layout a pair takes two causal
runs, P C and P R. Answer tokens are read by gather: each has the slot whose hidden state predicts it.

Dimension names: M microbatches, B rows of a microbatch, T slots of a row, S scored tokens of a row, P pair places of a row.
"""

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdpo.data.pair_table import EncodedPair

Array = Any  # numpy on the host, JAX on the devices

SLOT_MULTIPLE = 64


class Batch(NamedTuple):
    """The pairs of one optimizer step as M microbatches of B rows; int32 but for weights and margins. Padding has weight 0."""

    tokens_MBT: Array
    """Token ids."""
    positions_MBT: Array
    """Rotary positions: both answers continue from the prompt's length."""
    k_start_MBT: Array
    """First slot that a slot attends to."""
    k_end_MBT: Array
    """One past the last slot that a slot attends to."""
    slots_MBS: Array
    """Slot whose hidden state predicts a scored token."""
    targets_MBS: Array
    """Id of a scored token."""
    sides_MBS: Array
    """Owner of a scored token: 2 * pair place + (0 chosen, 1 rejected); -1 where there is none. Scored tokens come first."""
    common_MBS: Array
    """1 where a scored token lies within the length of its pair's shorter answer, else 0."""
    lengths_MBP2: Array
    """Scored tokens of the chosen and the rejected side."""
    weights_MBP: Array
    """float32 weight of a pair; 0 in an empty place."""
    margins_MBP: Array
    """float32 margin of a pair."""
    index_MBP: Array
    """Place of a pair within its step, from 0; -1 in an empty place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packer:
    """Packs the pairs of a step into rows of a few fixed lengths.

    Args:
        share_prefix: whether the two answers of a pair share one copy of its prompt.
        num_rows: rows of a microbatch (B), the number of devices that see different rows.
        packed_lengths: allowed row lengths in slots, ascending; the last is the longest.
        num_places: pair places of a row (P), at least the pairs of a step.
    """

    share_prefix: bool
    num_rows: int
    packed_lengths: tuple[int, ...]
    num_places: int

    def __call__(self, pairs: Sequence[EncodedPair], mine: Container[int] | None = None) -> Batch:
        """Pack all the pairs; as many microbatches as they need.

        Args:
            mine: the rows of a microbatch (0 to B - 1) that this process feeds. Of others nothing is read and nothing filled in but
                index_MBP. None: all.

        Raises:
            ValueError: when a pair is longer than the longest row.
        """
        rows = balance(
            [pair_slots(pair, self.share_prefix) for pair in pairs],
            self.num_rows,
            self.packed_lengths[-1],
        )
        longest = max(sum(pair_slots(pairs[i], self.share_prefix) for i in row) for row in rows)
        num_slots = next(size for size in self.packed_lengths if size >= longest)
        read = [mine is None or number % self.num_rows in mine for number in range(len(rows))]
        packed = [
            self._row([pairs[i] for i in row] if own else [], row, num_slots)
            for row, own in zip(rows, read, strict=True)
        ]
        shape = (len(rows) // self.num_rows, self.num_rows)
        return Batch(
            *(
                np.stack(arrays).reshape(*shape, *arrays[0].shape)
                for arrays in zip(*packed, strict=True)
            )
        )

    def _row(self, pairs: Sequence[EncodedPair], index: Sequence[int], num_slots: int) -> Batch:
        row = _empty_row(num_slots, self.num_places)
        lay = _lay_shared if self.share_prefix else _lay_separate
        slot = scored = 0
        row.index_MBP[: len(index)] = index
        for place, pair in enumerate(pairs):
            slot, scored = lay(row, pair, place, slot, scored)
            row.lengths_MBP2[place] = [np.count_nonzero(mask) for _, mask in pair.answers]
            row.weights_MBP[place] = pair.weight
            row.margins_MBP[place] = pair.margin
        return row


def pair_slots(pair: EncodedPair, share_prefix: bool) -> int:
    """Slots that a pair takes in a row."""
    prompts = 1 if share_prefix else 2
    return prompts * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def balance(sizes: Sequence[int], num_rows: int, max_slots: int) -> list[list[int]]:
    """Spread items over a multiple of num_rows rows so that none holds more than max_slots, longest items first.

    Returns:
        For each row the indices of its items; M * num_rows rows with the smallest M that fits.

    Raises:
        ValueError: when one item alone is too long.
    """
    if max(sizes) > max_slots:
        raise ValueError(
            f"data.packed_length={max_slots}: a pair needs {max(sizes)} slots. Raise it, or lower data.max_length"
        )
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    num = num_rows * max(1, -(-sum(sizes) // (num_rows * max_slots)))
    while True:
        rows: list[list[int]] = [[] for _ in range(num)]
        loads = [0] * num
        for i in order:
            lightest = loads.index(min(loads))
            rows[lightest].append(i)
            loads[lightest] += sizes[i]
        if max(loads) <= max_slots:
            return [sorted(row) for row in rows]
        num += num_rows


def choose_packed_lengths(loads: Iterable[int], count: int, max_slots: int) -> tuple[int, ...]:
    """At most `count` row lengths (one compiled program each) that waste the fewest slots on rows of these loads.

    The lengths are multiples of SLOT_MULTIPLE, but for max_slots, which always ends the list, so that any row fits.
    """
    rounded = np.minimum(-(-np.asarray(list(loads)) // SLOT_MULTIPLE) * SLOT_MULTIPLE, max_slots)
    sizes, counts = np.unique(np.append(rounded, max_slots), return_counts=True)
    counts[-1] -= 1  # max_slots was added by hand
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: fewest slots for all rows up to size j when size j is chosen; one more round for each further length
    cost = sizes * below[1:]
    choices = [[int(size)] for size in sizes]
    for _ in range(count - 1):
        rounds = [
            min(range(j + 1), key=lambda i: cost[i] + (below[j + 1] - below[i + 1]) * sizes[j])
            for j in range(len(sizes))
        ]
        choices = [[*choices[i], int(sizes[j])] for j, i in enumerate(rounds)]
        cost = np.array(
            [cost[i] + (below[j + 1] - below[i + 1]) * sizes[j] for j, i in enumerate(rounds)]
        )
    return tuple(sorted(set(choices[-1])))


def _empty_row(num_slots: int, num_places: int) -> Batch:
    slots = np.arange(num_slots, dtype=np.int32)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    return Batch(
        tokens_MBT=zeros(num_slots),
        positions_MBT=zeros(num_slots),
        k_start_MBT=slots.copy(),
        k_end_MBT=slots + 1,
        slots_MBS=zeros(num_slots),
        targets_MBS=zeros(num_slots),
        sides_MBS=zeros(num_slots) - 1,
        common_MBS=zeros(num_slots),
        lengths_MBP2=zeros(num_places, 2),
        weights_MBP=np.zeros(num_places, np.float32),
        margins_MBP=np.zeros(num_places, np.float32),
        index_MBP=zeros(num_places) - 1,
    )


def _lay_shared(
    row: Batch, pair: EncodedPair, place: int, slot: int, scored: int
) -> tuple[int, int]:
    """Write reverse(C) | P | R from `slot` on; returns the next free slot and scored token."""
    p, c, r = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
    prompt, after = slot + c, slot + c + p + r
    row.tokens_MBT[slot:after] = np.concatenate(
        [pair.chosen_ids[::-1], pair.prompt_ids, pair.rejected_ids]
    )
    row.positions_MBT[slot:prompt] = np.arange(p + c - 1, p - 1, -1)
    row.positions_MBT[prompt:after] = np.arange(p + r)
    row.k_end_MBT[slot:prompt] = prompt + p  # a C token: itself to the end of P
    row.k_start_MBT[prompt:after] = prompt  # a P or R token: the start of P to itself
    last = prompt + p - 1
    scored = _score(
        row, place, 0, scored, pair, np.concatenate([[last], np.arange(prompt - 1, slot, -1)])
    )
    scored = _score(row, place, 1, scored, pair, np.arange(last, after - 1))
    return after, scored


def _lay_separate(
    row: Batch, pair: EncodedPair, place: int, slot: int, scored: int
) -> tuple[int, int]:
    """Write P C and P R from `slot` on; returns the next free slot and scored token."""
    p = len(pair.prompt_ids)
    for side, answer in enumerate((pair.chosen_ids, pair.rejected_ids)):
        after = slot + p + len(answer)
        row.tokens_MBT[slot:after] = np.concatenate([pair.prompt_ids, answer])
        row.positions_MBT[slot:after] = np.arange(after - slot)
        row.k_start_MBT[slot:after] = slot
        scored = _score(row, place, side, scored, pair, np.arange(slot + p - 1, after - 1))
        slot = after
    return slot, scored


def _score(
    row: Batch, place: int, side: int, scored: int, pair: EncodedPair, slots: np.ndarray
) -> int:
    """Note the scored tokens of an answer, whose tokens are predicted at `slots`; returns the next free scored token."""
    answers = pair.answers
    answer, mask = answers[side]
    count, other = (int(np.count_nonzero(answers[number][1])) for number in (side, 1 - side))
    end = scored + count
    row.slots_MBS[scored:end] = slots[mask]
    row.targets_MBS[scored:end] = answer[mask]
    row.sides_MBS[scored:end] = 2 * place + side
    row.common_MBS[scored:end] = np.arange(count) < min(count, other)
    return end

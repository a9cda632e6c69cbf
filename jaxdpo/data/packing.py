"""Packing: the pairs of one optimizer step as token sequences of a few fixed lengths. NumPy only.

Prefix sharing (`data.share_prefix=true`, the default): both answers (completions) of a pair read
one copy of the prompt P. The chosen answer A1 is stored in reverse order before P, the rejected
answer A2 after it. A prompt of 3 tokens with answers of 2 and 3 tokens, in a sequence of 10:

                 reverse(A1)       P              A2         padding
    index          0   1       2   3   4       5   6   7      8   9
    tokens        c1  c0      p0  p1  p2      r0  r1  r2      0   0
    positions      4   3       0   1   2       3   4   5      0   0     rotary positions
    k_start        0   1       2   2   2       2   2   2      8   9
    k_end          5   5       3   4   5       6   7   8      9  10

Token t attends to the indices k_start[t] <= s < k_end[t]: a token of P or A2 sees from the start of
P to itself, a token of A1 from itself to the end of P. One interval per token is all that attention
needs, so no [T, T] mask exists anywhere, and several pairs share a sequence without seeing each
other. The prompt is computed once instead of twice.

Without prefix sharing a pair takes two causal runs, P A1 and P A2.

A batch is [M, B, T]: M microbatches (gradient accumulation) of B sequences (data parallelism: each
device computes some of the B) of T tokens. M grows with the tokens of the step, B is fixed, T is
one of a few lengths, so a run compiles one program per length. Packing changes the speed and never
the loss.

Dimension names: M microbatches, B sequences of a microbatch, T tokens of a sequence, S loss tokens
of a sequence (padded to T), P pairs of a sequence (padded to the pairs of a step), 2 chosen and
rejected.
"""

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdpo.config.data_options import LENGTH_MULTIPLE
from jaxdpo.data.pair_table import EncodedPair

Array = Any  # NumPy on the host, JAX on the devices


class Batch(NamedTuple):
    """The pairs of one optimizer step, packed. int32 except weights and margins (float32).

    The token arrays describe what the model computes (see the picture above), the loss token
    arrays what the loss reads, the pair arrays what it multiplies by. Padding has weight 0.
    """

    # tokens
    tokens_MBT: Array
    """Token ids; 0 in padding."""
    positions_MBT: Array
    """Rotary positions: both answers continue from the prompt's length."""
    k_start_MBT: Array
    """First index that a token attends to."""
    k_end_MBT: Array
    """One past the last index that a token attends to."""

    # loss tokens (the completion mask as a list): first all that exist, then padding
    slots_MBS: Array
    """Index of the token whose hidden state predicts the loss token (the one before it)."""
    targets_MBS: Array
    """Token id of the loss token."""
    sides_MBS: Array
    """The answer it belongs to: 2 * pair + (0 chosen, 1 rejected), pair < P; -1 in padding."""
    common_MBS: Array
    """1 where it is within the length of the pair's shorter answer, else 0 (for losses that
    compare answers over their common length)."""

    # pairs
    lengths_MBP2: Array
    """Number of loss tokens of the chosen and of the rejected answer."""
    weights_MBP: Array
    """float32 weight of a pair; 0 in padding."""
    margins_MBP: Array
    """float32 margin of a pair."""
    index_MBP: Array
    """Number of the pair within its step, from 0; -1 in padding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packer:
    """Packs the pairs of a step into sequences of a few fixed lengths.

    Args:
        share_prefix: both answers of a pair read one copy of the prompt (prefix sharing).
        num_rows: B, sequences of a microbatch; a multiple of the devices that see different data.
        packed_lengths: allowed sequence lengths T in tokens, ascending.
        max_pairs: P, at least the pairs of a step.
    """

    share_prefix: bool
    num_rows: int
    packed_lengths: tuple[int, ...]
    max_pairs: int

    def __call__(self, pairs: Sequence[EncodedPair], mine: Container[int] | None = None) -> Batch:
        """Pack all the pairs, in as many microbatches as they need.

        Args:
            mine: which of the B sequences of a microbatch this process feeds. Pairs of other
                sequences are not read, and only index_MBP is filled in for them. None: all.

        Raises:
            ValueError: a pair is longer than the longest sequence.
        """
        sizes = [pair_length(pair, self.share_prefix) for pair in pairs]
        # Every process computes the same assignment of pairs to sequences.
        assigned = balance(sizes, self.num_rows, self.packed_lengths[-1])

        # All sequences get the shortest length in which the fullest of them fits.
        fullest = 0
        for indices in assigned:
            fullest = max(fullest, sum(sizes[i] for i in indices))
        length = next(length for length in self.packed_lengths if length >= fullest)

        sequences = []
        for number, indices in enumerate(assigned):
            own_pairs = []
            if mine is None or number % self.num_rows in mine:
                own_pairs = [pairs[i] for i in indices]
            sequences.append(self._sequence(own_pairs, indices, length))

        # The sequences field by field, each stacked to [M, B, ...].
        M = len(assigned) // self.num_rows
        arrays = []
        for parts in zip(*sequences, strict=True):
            arrays.append(np.stack(parts).reshape(M, self.num_rows, *parts[0].shape))
        return Batch(*arrays)

    def _sequence(self, pairs: Sequence[EncodedPair], indices: Sequence[int], length: int) -> Batch:
        """One packed sequence: a Batch without M and B."""
        sequence = _empty_sequence(length, self.max_pairs)
        sequence.index_MBP[: len(indices)] = indices
        write = _write_shared if self.share_prefix else _write_separate
        start = num_loss = 0
        for number, pair in enumerate(pairs):
            start, num_loss = write(sequence, pair, number, start, num_loss)
            for side, (_, mask) in enumerate(pair.answers):
                sequence.lengths_MBP2[number, side] = np.count_nonzero(mask)
            sequence.weights_MBP[number] = pair.weight
            sequence.margins_MBP[number] = pair.margin
        return sequence


def pair_length(pair: EncodedPair, share_prefix: bool) -> int:
    """Tokens that a pair takes in a packed sequence."""
    prompts = 1 if share_prefix else 2
    return prompts * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def balance(sizes: Sequence[int], num_rows: int, max_length: int) -> list[list[int]]:
    """Assign pairs to M * num_rows sequences of at most max_length tokens, M as small as fits.

    Longest pairs first, each to the sequence with the fewest tokens so far: the devices of a
    microbatch wait for its fullest sequence, so equal loads matter more than full ones.

    Returns:
        For each sequence the indices of its pairs, ascending.

    Raises:
        ValueError: one pair alone is too long.
    """
    if max(sizes) > max_length:
        raise ValueError(
            f"data.packed_length={max_length}: a pair needs {max(sizes)} token positions. "
            "Raise it, or lower data.max_length"
        )
    longest_first = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    # As few as the tokens fill (rounded up); more if the pairs cannot be divided so well.
    M = max(1, -(-sum(sizes) // (num_rows * max_length)))
    while True:
        assigned: list[list[int]] = [[] for _ in range(M * num_rows)]
        loads = [0] * len(assigned)
        for i in longest_first:
            lightest = loads.index(min(loads))
            assigned[lightest].append(i)
            loads[lightest] += sizes[i]
        if max(loads) <= max_length:
            return [sorted(indices) for indices in assigned]
        M += 1


def choose_packed_lengths(loads: Iterable[int], count: int, max_length: int) -> tuple[int, ...]:
    """At most `count` sequence lengths (one compiled program each) with the least padding.

    Args:
        loads: tokens of sampled sequences, each to be padded to the next of the lengths.
        count: most lengths to choose.
        max_length: always the last of them, so that any sequence fits.

    Returns:
        Multiples of LENGTH_MULTIPLE, except max_length; ascending.
    """
    loads = np.asarray(list(loads))
    # The candidates: the lengths that occur, rounded up, and max_length.
    rounded = np.minimum(-(-loads // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max_length)
    sizes, counts = np.unique(np.append(rounded, max_length), return_counts=True)
    counts[-1] -= 1  # max_length was appended by hand
    up_to = np.cumsum(counts)  # up_to[j]: number of sequences of at most sizes[j]

    # Dynamic programming over the longest chosen length. cost[j]: fewest tokens, padding included,
    # of the sequences of at most sizes[j], if sizes[j] is chosen and nothing longer. With one
    # length all of them are padded to it; each round allows one length more.
    cost = sizes * up_to
    choices = [[int(size)] for size in sizes]
    for _ in range(min(count, len(sizes)) - 1):  # more lengths than candidates change nothing
        next_cost = []
        next_choices = []
        for j, size in enumerate(sizes):
            # For each i <= j: the sequences of at most sizes[i] cost what they did, the longer ones
            # are padded to `size`. i = j adds no length.
            num_longer = up_to[j] - up_to[: j + 1]
            totals = cost[: j + 1] + num_longer * size
            i = int(np.argmin(totals))
            next_cost.append(totals[i])
            next_choices.append([*choices[i], int(size)])
        cost = np.array(next_cost)
        choices = next_choices
    return tuple(sorted(set(choices[-1])))


def _empty_sequence(length: int, max_pairs: int) -> Batch:
    """Padding only. A padding token attends to itself: softmax over no key would be NaN."""
    index = np.arange(length, dtype=np.int32)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    return Batch(
        tokens_MBT=zeros(length),
        positions_MBT=zeros(length),
        k_start_MBT=index.copy(),
        k_end_MBT=index + 1,
        slots_MBS=zeros(length),
        targets_MBS=zeros(length),
        sides_MBS=zeros(length) - 1,
        common_MBS=zeros(length),
        lengths_MBP2=zeros(max_pairs, 2),
        weights_MBP=np.zeros(max_pairs, np.float32),
        margins_MBP=np.zeros(max_pairs, np.float32),
        index_MBP=zeros(max_pairs) - 1,
    )


def _write_shared(
    sequence: Batch, pair: EncodedPair, number: int, start: int, num_loss: int
) -> tuple[int, int]:
    """Write reverse(A1) | P | A2 from index `start` on.

    Returns:
        The next free token index, and the next free loss token.
    """
    # A1 is at start:prompt_start, P at prompt_start:prompt_end, A2 at prompt_end:end.
    prompt_length = len(pair.prompt_ids)
    chosen_length = len(pair.chosen_ids)
    prompt_start = start + chosen_length
    prompt_end = prompt_start + prompt_length
    end = prompt_end + len(pair.rejected_ids)

    sequence.tokens_MBT[start:prompt_start] = pair.chosen_ids[::-1]
    sequence.tokens_MBT[prompt_start:prompt_end] = pair.prompt_ids
    sequence.tokens_MBT[prompt_end:end] = pair.rejected_ids

    chosen_positions = np.arange(prompt_length, prompt_length + chosen_length)
    sequence.positions_MBT[start:prompt_start] = chosen_positions[::-1]
    sequence.positions_MBT[prompt_start:end] = np.arange(end - prompt_start)

    # Where an interval is not written it ends at the token itself (see _empty_sequence).
    sequence.k_end_MBT[start:prompt_start] = prompt_end  # A1: itself to the end of P
    sequence.k_start_MBT[prompt_start:end] = prompt_start  # P and A2: the start of P to itself

    # The last prompt token predicts the first token of both answers.
    last = prompt_end - 1
    predict_chosen = np.concatenate([[last], np.arange(prompt_start - 1, start, -1)])
    predict_rejected = np.arange(last, end - 1)
    num_loss = _write_loss_tokens(sequence, pair, number, 0, num_loss, predict_chosen)
    num_loss = _write_loss_tokens(sequence, pair, number, 1, num_loss, predict_rejected)
    return end, num_loss


def _write_separate(
    sequence: Batch, pair: EncodedPair, number: int, start: int, num_loss: int
) -> tuple[int, int]:
    """Write P A1 and P A2 from index `start` on; returns as _write_shared does."""
    for side, answer in enumerate((pair.chosen_ids, pair.rejected_ids)):
        prompt_end = start + len(pair.prompt_ids)
        end = prompt_end + len(answer)
        sequence.tokens_MBT[start:prompt_end] = pair.prompt_ids
        sequence.tokens_MBT[prompt_end:end] = answer
        sequence.positions_MBT[start:end] = np.arange(end - start)
        sequence.k_start_MBT[start:end] = start
        # A token is predicted by the one before it, the answer's first by the last of the prompt.
        predict = np.arange(prompt_end - 1, end - 1)
        num_loss = _write_loss_tokens(sequence, pair, number, side, num_loss, predict)
        start = end
    return start, num_loss


def _write_loss_tokens(
    sequence: Batch, pair: EncodedPair, number: int, side: int, num_loss: int, predict: np.ndarray
) -> int:
    """Append an answer's loss tokens (those in its completion mask).

    Args:
        predict: index of the token that predicts each token of the answer.

    Returns:
        The next free loss token.
    """
    answer, mask = pair.answers[side]
    _, other_mask = pair.answers[1 - side]
    count = int(np.count_nonzero(mask))
    other_count = int(np.count_nonzero(other_mask))
    end = num_loss + count
    sequence.slots_MBS[num_loss:end] = predict[mask]
    sequence.targets_MBS[num_loss:end] = answer[mask]
    sequence.sides_MBS[num_loss:end] = 2 * number + side
    sequence.common_MBS[num_loss:end] = np.arange(count) < min(count, other_count)
    return end

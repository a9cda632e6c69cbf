"""Encoded pairs as a table: a few long columns that may be memory-mapped files. NumPy only."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

LENGTHS = ("prompt", "chosen", "rejected")

Columns = Mapping[str, np.ndarray]
"""Columns of pairs by the names of COLUMNS. Two chunks of pairs are joined by concatenating each
column."""


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """One pair as the model sees it: prompt + chosen and prompt + rejected.

    "Answer" is what TRL calls completion.
    """

    prompt_ids: np.ndarray
    """int32, at least one token; with bos, if the tokenizer or the chat template adds it."""
    chosen_ids: np.ndarray
    """int32, at least one token; with eos, if the text has one and was not truncated."""
    rejected_ids: np.ndarray
    """int32, as chosen_ids."""
    chosen_mask: np.ndarray | None = None
    """Completion mask: bool, which tokens of the chosen answer are loss tokens; turns of users and
    tools within it are not. None: all."""
    rejected_mask: np.ndarray | None = None
    """Completion mask of the rejected answer."""
    id: str = ""
    weight: float = 1.0
    """Factor of this pair in the loss."""
    margin: float = 0.0
    """By how much the chosen answer should win, in units of the logit."""
    truncated_prompt: bool = False
    truncated_chosen: bool = False
    truncated_rejected: bool = False
    ended_chosen: bool = False
    """Whether the chosen answer ends in eos (or the end marker of its chat template)."""
    ended_rejected: bool = False
    prompt_key: int = 0
    """64-bit hash of the prompt before it was encoded (Preference.prompt_key)."""
    group_key: int = 0
    """64-bit hash of what the pair belongs to (Preference.group_key)."""
    pair_key: tuple[int, bool] = (0, False)
    """64-bit hash of the prompt and both answers before, and their order (Preference.pair_key)."""
    source: int = 0
    """Which of the data sets it comes from."""
    left_out: frozenset[str] = frozenset()
    """What the chat template left out of it (data/left_out.py); the table does not keep it."""
    is_open: bool = False
    """Its answers begin with thoughts (chat_template.PairText); the table does not keep it."""

    def __len__(self) -> int:
        """Tokens of prompt + chosen + rejected."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def answers(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Of the chosen and of the rejected answer: token ids, and the completion mask."""
        chosen_mask, rejected_mask = self.chosen_mask, self.rejected_mask
        if chosen_mask is None:
            chosen_mask = np.ones(len(self.chosen_ids), bool)
        if rejected_mask is None:
            rejected_mask = np.ones(len(self.rejected_ids), bool)
        return (self.chosen_ids, chosen_mask), (self.rejected_ids, rejected_mask)


TRUNCATED = ("truncated_prompt", "truncated_chosen", "truncated_rejected")
ENDED = ("ended_chosen", "ended_rejected")
FLAGS = (*TRUNCATED, *ENDED)
"""Fields of a pair that are one bit each in the column flags."""

COLUMNS: dict[str, Any] = {
    "tokens": np.int32,
    "completion_mask": np.bool_,
    "sizes": np.int32,
    "names": np.uint8,
    "name_sizes": np.int32,
    "weights": np.float32,
    "margins": np.float32,
    "flags": np.uint8,
    "prompt_keys": np.uint64,
    "group_keys": np.uint64,
    "pair_keys": np.uint64,
    "orders": np.bool_,
    "sources": np.int32,
    "digests": np.uint64,
}
"""Columns of a table and their dtypes.

tokens, completion_mask: prompt, chosen and rejected of one pair after another; sizes: 3 numbers of
tokens a pair; names: ids in UTF-8, name_sizes bytes each; flags: one bit for each of FLAGS;
digests: a hash of all that training sees of a pair."""


def to_columns(pairs: Iterable[EncodedPair]) -> dict[str, np.ndarray]:
    """The columns of some pairs."""
    lists: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for pair in pairs:
        (chosen, chosen_mask), (rejected, rejected_mask) = pair.answers
        prompt_mask = np.zeros(len(pair.prompt_ids), bool)
        tokens = np.concatenate([pair.prompt_ids, chosen, rejected], dtype=np.int32)
        mask = np.concatenate([prompt_mask, chosen_mask, rejected_mask])
        sizes = [len(pair.prompt_ids), len(chosen), len(rejected)]
        name = pair.id.encode()
        pair_key, order = pair.pair_key
        lists["tokens"].append(tokens)
        lists["completion_mask"].append(mask)
        lists["sizes"].append(sizes)
        lists["names"].append(np.frombuffer(name, np.uint8))
        lists["name_sizes"].append(len(name))
        lists["weights"].append(pair.weight)
        lists["margins"].append(pair.margin)
        lists["flags"].append(sum(getattr(pair, flag) << bit for bit, flag in enumerate(FLAGS)))
        lists["prompt_keys"].append(pair.prompt_key)
        lists["group_keys"].append(pair.group_key)
        lists["pair_keys"].append(pair_key)
        lists["orders"].append(order)
        lists["sources"].append(pair.source)
        lists["digests"].append(_digest(tokens, mask, sizes, pair))
    columns = {}
    for name, dtype in COLUMNS.items():
        values: Any = lists[name]
        if values and name in ("tokens", "completion_mask", "sizes", "names"):
            values = np.concatenate(values)
        columns[name] = np.asarray(values, dtype)
    return columns


def _digest(tokens: np.ndarray, mask: np.ndarray, sizes: list[int], pair: EncodedPair) -> int:
    """64 bits of a hash."""
    hasher = hashlib.blake2b(digest_size=8)
    hasher.update(np.array(sizes, np.int32).tobytes())
    hasher.update(tokens.tobytes())
    hasher.update(mask.tobytes())
    hasher.update(np.array([pair.weight, pair.margin], np.float32).tobytes())
    return int.from_bytes(hasher.digest(), "little")


@dataclasses.dataclass(frozen=True)
class Names:
    """Many strings in one array of bytes: as a Python list, a million ids would take 75 MB."""

    text: np.ndarray
    """uint8: UTF-8."""
    starts: np.ndarray
    """int64 [M]: where each string begins in the array."""
    sizes: np.ndarray
    """int32 [M]: and how many bytes it has."""
    indices: np.ndarray
    """int64 [N]: which of them these are."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> str:
        index = self.indices[number]
        start = self.starts[index]
        return self.text[start : start + self.sizes[index]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))


def _column(name: str, doc: str) -> property:
    """A column, at a table's indices."""
    return property(lambda table: table.columns[name][table.indices], doc=doc)


@dataclasses.dataclass(frozen=True)
class PairTable:
    """Some of the pairs that columns hold; table[i] is a view of them, not a copy.

    Arrays over all pairs (weights, lengths, ...) are made when asked for and not cached.
    """

    columns: Columns
    """All of COLUMNS, of M pairs."""
    indices: np.ndarray
    """int64 [N]: which of those pairs these are, in order."""
    token_starts: np.ndarray
    """int64 [M]: where each pair's tokens begin in the columns."""
    name_starts: np.ndarray
    """int64 [M]: where each pair's name begins."""

    weights = _column("weights", "float32 [N].")
    margins = _column("margins", "float32 [N].")
    prompt_keys = _column("prompt_keys", "uint64 [N]: hashes of the prompts before encoding.")
    group_keys = _column("group_keys", "uint64 [N]: hashes of what the pairs belong to.")
    pair_keys = _column("pair_keys", "uint64 [N]: equal for a pair and its contradiction.")
    orders = _column("orders", "bool [N]: differs between a pair and its contradiction.")
    sources = _column("sources", "int32 [N]: which of the data sets each pair comes from.")
    digests = _column("digests", "uint64 [N]: hashes of each pair's tokens, weight and margin.")

    @classmethod
    def from_columns(cls, columns: Columns) -> "PairTable":
        """The table of all pairs of the columns."""
        indices = np.arange(len(columns["weights"]))
        tokens = columns["sizes"].reshape(-1, len(LENGTHS)).sum(axis=1, dtype=np.int64)
        return cls(columns, indices, _starts(tokens), _starts(columns["name_sizes"]))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> EncodedPair:
        index, columns = self.indices[number], self.columns
        tokens, mask = columns["tokens"], columns["completion_mask"]
        sizes = columns["sizes"][len(LENGTHS) * index :][: len(LENGTHS)]
        start, chosen, rejected, end = itertools.accumulate(
            map(int, sizes), initial=int(self.token_starts[index])
        )
        bits = int(columns["flags"][index])
        flags: dict[str, Any] = {}
        for bit, name in enumerate(FLAGS):
            flags[name] = bool(bits >> bit & 1)
        return EncodedPair(
            prompt_ids=tokens[start:chosen],
            chosen_ids=tokens[chosen:rejected],
            rejected_ids=tokens[rejected:end],
            chosen_mask=mask[chosen:rejected],
            rejected_mask=mask[rejected:end],
            id=self.ids[number],
            weight=float(columns["weights"][index]),
            margin=float(columns["margins"][index]),
            prompt_key=int(columns["prompt_keys"][index]),
            group_key=int(columns["group_keys"][index]),
            pair_key=(int(columns["pair_keys"][index]), bool(columns["orders"][index])),
            source=int(columns["sources"][index]),
            **flags,
        )

    def take(self, index: np.ndarray) -> "PairTable":
        """The pairs that an integer or boolean index picks; columns are shared, not copied."""
        return dataclasses.replace(self, indices=self.indices[index])

    @property
    def ids(self) -> Names:
        """Each pair's name."""
        columns = self.columns
        return Names(columns["names"], self.name_starts, columns["name_sizes"], self.indices)

    @property
    def num_prompts(self) -> int:
        """Number of different prompts."""
        return len(np.unique(self.prompt_keys))

    @property
    def lengths(self) -> np.ndarray:
        """int32 [N, 3]: tokens of each pair's prompt, chosen and rejected."""
        return self.columns["sizes"].reshape(-1, len(LENGTHS))[self.indices]

    @property
    def flags(self) -> np.ndarray:
        """bool [N, len(FLAGS)]."""
        bits = np.arange(len(FLAGS), dtype=np.uint8)
        return (self.columns["flags"][self.indices, None] >> bits & 1).astype(bool)

    def fingerprint(self) -> str:
        """Hex SHA-256 of the digests in order: equal for tables that are equal to training."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()

    def statistics(self) -> dict[str, Any]:
        """Counts for the data report: pairs, prompts, tokens, truncations, eos."""
        lengths, flags = self.lengths, self.flags
        truncated, length = {}, {}
        for number, name in enumerate(LENGTHS):
            truncated[name] = int(flags[:, number].sum())
            length[name] = _quantiles(lengths[:, number])
        return {
            "pairs": len(self),
            "prompts": self.num_prompts,
            "tokens": int(lengths.sum()),
            "truncated": truncated,
            "length": length,
            "chosen_longer": _share(lengths[:, 1] > lengths[:, 2]),
            "equal_length": _share(lengths[:, 1] == lengths[:, 2]),
            "ended": _share(flags[:, len(TRUNCATED) :]),
            "fingerprint": self.fingerprint(),
        }


def _starts(sizes: np.ndarray) -> np.ndarray:
    """int64 [N]: where items of these sizes begin that follow one another."""
    return np.cumsum(sizes, dtype=np.int64) - sizes


def _quantiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {"p50": 0, "p95": 0, "max": 0}
    p50, p95 = np.percentile(values, (50, 95), method="higher")
    return {"p50": int(p50), "p95": int(p95), "max": int(values.max())}


def _share(values: np.ndarray) -> float | None:
    """Share of True, or None where there is nothing to count."""
    return round(float(values.mean()), 4) if values.size else None

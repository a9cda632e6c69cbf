"""Encoded pairs, held flat: a few long columns that may lie in files. NumPy only."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

LENGTHS = ("prompt", "chosen", "rejected")

Columns = Mapping[str, np.ndarray]
"""Columns of pairs by the names of COLUMNS; those of several lots of pairs are joined end to end."""


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """One pair as the model sees it: prompt + chosen and prompt + rejected, of which the answers are scored."""

    prompt_ids: np.ndarray
    """int32, at least one token."""
    chosen_ids: np.ndarray
    """int32, at least one token; with the end marker, if the text has one and was not cut."""
    rejected_ids: np.ndarray
    """int32, as chosen_ids."""
    chosen_scored: np.ndarray | None = None
    """bool, which tokens of the chosen answer are scored: not those of the turns of others within it. None: all."""
    rejected_scored: np.ndarray | None = None
    """bool, as chosen_scored."""
    id: str = ""
    weight: float = 1.0
    margin: float = 0.0
    """By how much the chosen answer should win, in units of the logit."""
    truncated_prompt: bool = False
    truncated_chosen: bool = False
    truncated_rejected: bool = False
    ended_chosen: bool = False
    """Whether the chosen answer ends in an end marker."""
    ended_rejected: bool = False
    prompt_key: int = 0
    """64-bit hash of the prompt before it was encoded (Preference.prompt_key)."""
    pair_key: tuple[int, bool] = (0, False)
    """64-bit hash of the prompt and both answers before, and their order (Preference.pair_key)."""
    source: int = 0
    """Which of the sets it comes from."""

    def __len__(self) -> int:
        """Tokens of prompt + chosen + rejected."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def answers(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Of the chosen and of the rejected answer: token ids, and which of them are scored."""
        sides = ((self.chosen_ids, self.chosen_scored), (self.rejected_ids, self.rejected_scored))
        chosen, rejected = (
            (ids, np.ones(len(ids), bool) if scored is None else scored) for ids, scored in sides
        )
        return chosen, rejected


FLAGS = (
    "truncated_prompt",
    "truncated_chosen",
    "truncated_rejected",
    "ended_chosen",
    "ended_rejected",
)

COLUMNS: dict[str, Any] = {
    "tokens": np.int32,
    "scored": np.bool_,
    "sizes": np.int32,
    "names": np.uint8,
    "name_sizes": np.int32,
    "weights": np.float32,
    "margins": np.float32,
    "flags": np.uint8,
    "prompt_keys": np.uint64,
    "pair_keys": np.uint64,
    "orders": np.bool_,
    "sources": np.int32,
    "digests": np.uint64,
}
"""What is kept of pairs, and its type. tokens and scored: prompt, chosen and rejected of one pair after another, `sizes` of each;
names: ids in UTF-8, name_sizes bytes of each; flags: one bit for each of FLAGS; digests: of all that training sees of a pair."""


def to_columns(pairs: Iterable[EncodedPair]) -> dict[str, np.ndarray]:
    """The columns of some pairs."""
    lists: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for pair in pairs:
        (chosen, chosen_scored), (rejected, rejected_scored) = pair.answers
        tokens = np.concatenate([pair.prompt_ids, chosen, rejected], dtype=np.int32)
        scored = np.concatenate(
            [np.zeros(len(pair.prompt_ids), bool), chosen_scored, rejected_scored]
        )
        sizes = [len(pair.prompt_ids), len(chosen), len(rejected)]
        name = pair.id.encode()
        row = (
            tokens,
            scored,
            sizes,
            np.frombuffer(name, np.uint8),
            len(name),
            pair.weight,
            pair.margin,
        )
        bits = sum(getattr(pair, flag) << bit for bit, flag in enumerate(FLAGS))
        digest = _digest(tokens, scored, sizes, pair)
        for column, value in zip(
            lists.values(),
            (*row, bits, pair.prompt_key, *pair.pair_key, pair.source, digest),
            strict=True,
        ):
            column.append(value)
    joined = {
        name: np.concatenate(lists[name]) if lists[name] else np.zeros(0)
        for name in ("tokens", "scored", "sizes", "names")
    }
    return {
        name: np.asarray(joined.get(name, lists[name]), dtype) for name, dtype in COLUMNS.items()
    }


def _digest(tokens: np.ndarray, scored: np.ndarray, sizes: list[int], pair: EncodedPair) -> int:
    """64 bits of a hash."""
    numbers = np.array([pair.weight, pair.margin], np.float32).tobytes()
    data = b"".join(
        [np.array(sizes, np.int32).tobytes(), tokens.tobytes(), scored.tobytes(), numbers]
    )
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class Names:
    """Many strings in one array of bytes."""

    text: np.ndarray
    """uint8: UTF-8."""
    starts: np.ndarray
    """int64 [M]: where each string in the array begins."""
    sizes: np.ndarray
    """int32 [M]: and how many bytes it has."""
    places: np.ndarray
    """int64 [N]: which of them these are."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> str:
        place = self.places[index]
        start = self.starts[place]
        return self.text[start : start + self.sizes[place]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def _column(name: str, doc: str) -> property:
    """A column, at a table's places."""
    return property(lambda table: table.columns[name][table.places], doc=doc)


@dataclasses.dataclass(frozen=True)
class PairTable:
    """Some of the pairs that lie in columns; table[i] is a view, not a copy. Arrays of all pairs are made when asked for, not kept."""

    columns: Columns
    """All of COLUMNS, of M pairs; may be mapped from files."""
    places: np.ndarray
    """int64 [N]: which of those pairs these are, in order."""
    token_starts: np.ndarray
    """int64 [M]: where each pair's tokens begin in the columns."""
    name_starts: np.ndarray
    """int64 [M]: where each pair's name begins."""

    weights = _column("weights", "float32 [N].")
    margins = _column("margins", "float32 [N].")
    prompt_keys = _column(
        "prompt_keys",
        "uint64 [N]: hashes of the prompts before encoding; equal prompts have equal keys.",
    )
    pair_keys = _column(
        "pair_keys",
        "uint64 [N]: hashes of the prompts and answers before encoding; a pair and its contradiction have equal keys.",
    )
    orders = _column("orders", "bool [N]: differs between a pair and its contradiction.")
    sources = _column("sources", "int32 [N]: which of the sets each pair comes from.")
    digests = _column("digests", "uint64 [N]: hashes of each pair's tokens, weight and margin.")

    @classmethod
    def from_pairs(cls, pairs: Iterable[EncodedPair]) -> "PairTable":
        """A table in memory."""
        return cls.from_columns(to_columns(pairs))

    @classmethod
    def from_columns(cls, columns: Columns) -> "PairTable":
        """The table of all of COLUMNS."""
        places = np.arange(len(columns["weights"]))
        tokens = columns["sizes"].reshape(-1, len(LENGTHS)).sum(axis=1, dtype=np.int64)
        return cls(columns, places, _starts(tokens), _starts(columns["name_sizes"]))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> EncodedPair:
        place, column = self.places[index], self.columns
        sizes = column["sizes"][len(LENGTHS) * place :][: len(LENGTHS)]
        start, chosen, rejected, end = itertools.accumulate(
            map(int, sizes), initial=int(self.token_starts[place])
        )
        return EncodedPair(
            prompt_ids=column["tokens"][start:chosen],
            chosen_ids=column["tokens"][chosen:rejected],
            rejected_ids=column["tokens"][rejected:end],
            chosen_scored=column["scored"][chosen:rejected],
            rejected_scored=column["scored"][rejected:end],
            id=self.ids[index],
            weight=float(column["weights"][place]),
            margin=float(column["margins"][place]),
            prompt_key=int(column["prompt_keys"][place]),
            pair_key=(int(column["pair_keys"][place]), bool(column["orders"][place])),
            source=int(column["sources"][place]),
            **{name: bool(column["flags"][place] >> bit & 1) for bit, name in enumerate(FLAGS)},
        )

    def take(self, index: np.ndarray) -> "PairTable":
        """The pairs that an integer or boolean index picks; the columns are shared, not copied."""
        return dataclasses.replace(self, places=self.places[index])

    @property
    def ids(self) -> Names:
        """Each pair's name."""
        return Names(
            self.columns["names"], self.name_starts, self.columns["name_sizes"], self.places
        )

    @property
    def lengths(self) -> np.ndarray:
        """int32 [N, 3]: tokens of each pair's prompt, chosen and rejected."""
        return self.columns["sizes"].reshape(-1, len(LENGTHS))[self.places]

    @property
    def flags(self) -> np.ndarray:
        """bool [N, len(FLAGS)]."""
        return (
            self.columns["flags"][self.places, None] >> np.arange(len(FLAGS), dtype=np.uint8) & 1
        ).astype(bool)

    def fingerprint(self) -> str:
        """Hex SHA-256 of the pairs' digests in order: two tables are equal to training if this is."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()

    def statistics(self) -> dict[str, Any]:
        """Counts for the data report: pairs, prompts, truncations, lengths in tokens, shares of longer and of ended answers."""
        lengths = self.lengths
        truncated = self.flags[:, : FLAGS.index("ended_chosen")].sum(axis=0)
        ended = self.flags[:, FLAGS.index("ended_chosen") :]
        return {
            "pairs": len(self),
            "prompts": len(np.unique(self.prompt_keys)),
            "tokens": int(lengths.sum()),
            "truncated": dict(zip(LENGTHS, map(int, truncated), strict=True)),
            "length": {
                name: _quantiles(column) for name, column in zip(LENGTHS, lengths.T, strict=True)
            },
            "chosen_longer": _share(lengths[:, 1] > lengths[:, 2]),
            "equal_length": _share(lengths[:, 1] == lengths[:, 2]),
            "ended": _share(ended),
            "fingerprint": self.fingerprint(),
        }


def _starts(sizes: np.ndarray) -> np.ndarray:
    """int64 [N]: where items of these sizes begin that lie one behind another."""
    return np.cumsum(sizes, dtype=np.int64) - sizes


def _quantiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {"p50": 0, "p95": 0, "max": 0}
    p50, p95 = np.percentile(values, (50, 95), method="higher")
    return {"p50": int(p50), "p95": int(p95), "max": int(values.max())}


def _share(values: np.ndarray) -> float | None:
    """Share of True, or None where there is nothing to count."""
    return round(float(values.mean()), 4) if values.size else None

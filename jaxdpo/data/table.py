"""Encoded pairs, held flat: one array of token ids and the places where prompts and answers begin. NumPy only."""

import array
import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

LENGTHS = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """One pair as the model sees it: prompt + chosen and prompt + rejected, of which the answers are scored."""

    prompt_ids: np.ndarray
    """int32, at least one token."""
    chosen_ids: np.ndarray
    """int32, at least one token; with the end marker, if the text has one and was not cut."""
    rejected_ids: np.ndarray
    """int32, as chosen_ids."""
    id: str = ""
    weight: float = 1.0
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


FLAGS = ("truncated_prompt", "truncated_chosen", "truncated_rejected", "ended_chosen", "ended_rejected")


@dataclasses.dataclass(frozen=True)
class PairTable:
    """Many encoded pairs in a few flat arrays; table[i] is a view, not a copy."""

    tokens: np.ndarray
    """int32: prompt, chosen, rejected of one pair after another. May hold pairs that `bounds` does not name (see take)."""
    bounds: np.ndarray
    """int64 [N, 4]: where in tokens each pair's prompt, chosen and rejected begin, and its end."""
    ids: np.ndarray
    """object [N]: each pair's name."""
    weights: np.ndarray
    """float32 [N]."""
    flags: np.ndarray
    """bool [N, len(FLAGS)]."""
    prompt_keys: np.ndarray
    """uint64 [N]: hashes of the prompts before encoding; equal prompts have equal keys."""
    pair_keys: np.ndarray
    """uint64 [N]: hashes of the prompts and answers before encoding; a pair and its contradiction have equal keys."""
    orders: np.ndarray
    """bool [N]: differs between a pair and its contradiction."""
    sources: np.ndarray
    """int32 [N]: which of the sets each pair comes from."""

    @classmethod
    def from_pairs(cls, pairs: Iterable[EncodedPair]) -> "PairTable":
        """Collect pairs, one at a time, into a table."""
        tokens, ends = array.array("i"), array.array("q", [0])
        ids, weights, flags, sources = [], array.array("f"), array.array("B"), array.array("i")
        keys, pair_keys, orders = array.array("Q"), array.array("Q"), array.array("B")
        for pair in pairs:
            for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
                tokens.frombytes(np.asarray(part, np.int32).tobytes())
                ends.append(len(tokens))
            ids.append(pair.id)
            weights.append(pair.weight)
            flags.append(sum(getattr(pair, name) << bit for bit, name in enumerate(FLAGS)))
            keys.append(pair.prompt_key)
            pair_keys.append(pair.pair_key[0])
            orders.append(pair.pair_key[1])
            sources.append(pair.source)
        edges = np.array(ends, np.int64)
        bounds = np.lib.stride_tricks.sliding_window_view(edges, 4)[::3] if len(ids) else np.zeros((0, 4), np.int64)
        bits = np.array(flags, np.uint8)[:, None] >> np.arange(len(FLAGS), dtype=np.uint8) & 1
        return cls(
            tokens=np.frombuffer(tokens, np.int32),
            bounds=np.ascontiguousarray(bounds),
            ids=np.array(ids, object),
            weights=np.array(weights, np.float32),
            flags=bits.astype(bool),
            prompt_keys=np.array(keys, np.uint64),
            pair_keys=np.array(pair_keys, np.uint64),
            orders=np.array(orders, bool),
            sources=np.array(sources, np.int32),
        )

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> EncodedPair:
        start, chosen, rejected, end = self.bounds[index]
        flags = dict(zip(FLAGS, map(bool, self.flags[index]), strict=True))
        return EncodedPair(
            prompt_ids=self.tokens[start:chosen],
            chosen_ids=self.tokens[chosen:rejected],
            rejected_ids=self.tokens[rejected:end],
            id=self.ids[index],
            weight=float(self.weights[index]),
            prompt_key=int(self.prompt_keys[index]),
            pair_key=(int(self.pair_keys[index]), bool(self.orders[index])),
            source=int(self.sources[index]),
            **flags,
        )

    def take(self, index: np.ndarray) -> "PairTable":
        """The pairs that an integer or boolean index picks; the tokens are shared, not copied."""
        rows = (self.bounds, self.ids, self.weights, self.flags, self.prompt_keys, self.pair_keys, self.orders, self.sources)
        return PairTable(self.tokens, *(row[index] for row in rows))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N, 3]: tokens of each pair's prompt, chosen and rejected."""
        return np.diff(self.bounds, axis=1)

    def fingerprint(self) -> str:
        """Hex SHA-256 of the tokens, lengths and weights in order: two tables are equal to training if this is."""
        digest = hashlib.sha256(np.ascontiguousarray(self.lengths).tobytes() + self.weights.tobytes())
        for start, _, _, end in self.bounds:
            digest.update(self.tokens[start:end].tobytes())
        return digest.hexdigest()

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
            "length": {name: _quantiles(column) for name, column in zip(LENGTHS, lengths.T, strict=True)},
            "chosen_longer": _share(lengths[:, 1] > lengths[:, 2]),
            "equal_length": _share(lengths[:, 1] == lengths[:, 2]),
            "ended": _share(ended),
            "fingerprint": self.fingerprint(),
        }


def _quantiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {"p50": 0, "p95": 0, "max": 0}
    p50, p95 = np.percentile(values, (50, 95), method="higher")
    return {"p50": int(p50), "p95": int(p95), "max": int(values.max())}


def _share(values: np.ndarray) -> float | None:
    """Share of True, or None where there is nothing to count."""
    return round(float(values.mean()), 4) if values.size else None

"""Training and validation splits: by the hash of the prompt, and as the files of a folder.

Folders are those of `datasets` (save_to_disk), and copies of hub sets.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxdpo.data.readers import file_kind

NEAR = 2.0
"""A held-out share within this factor of data.eval_fraction is what chance gives (a hash is a coin
toss for each prompt); 0.05 of 100 prompts are 3 to 10 in 96% of all sets."""


def split_by_prompt(prompt_keys: np.ndarray, fraction: float) -> np.ndarray:
    """Choose validation pairs by their prompt's hash (data.eval_fraction).

    Pairs that share a prompt stay together. Where the hashes hold out a share of the pairs that is
    near to the fraction (NEAR), a prompt's side depends on the prompt alone, so it does not move
    when rows are added. Elsewhere (few prompts, or one with most pairs) prompts are chosen so that
    their pairs are as near to the fraction as whole prompts allow: at least one of them, and never
    more than half of the pairs, unless the fraction itself is more.

    Args:
        prompt_keys: uint64 [N], hashes that are spread evenly.
        fraction: share to hold out, 0 to 1.

    Returns:
        bool [N], True for validation; none are where there is only one prompt.
    """
    prompts, prompt_of, counts = np.unique(prompt_keys, return_inverse=True, return_counts=True)
    if fraction == 0 or len(prompts) < 2:
        return np.zeros(len(prompt_keys), bool)
    by_hash = prompt_keys < np.uint64(int(fraction * 2**64))
    share, most = by_hash.mean(), max(fraction, 0.5)
    if 0 < by_hash.sum() < len(by_hash) and fraction / NEAR <= share <= min(fraction * NEAR, most):
        return by_hash
    return _nearest(counts, fraction * len(prompt_keys), most * len(prompt_keys))[prompt_of]


def _nearest(counts: np.ndarray, target: float, most: float) -> np.ndarray:
    """Which prompts together have as near to `target` pairs as possible (a subset sum).

    Args:
        counts: int [P], pairs of each prompt, at least two prompts.
        target: pairs to hold out.
        most: pairs to hold out at most; the smallest prompt is held out nevertheless.

    Returns:
        bool [P], at least one True and one False.
    """
    total = int(counts.sum())
    largest = max(min(int(most), 2 * int(np.ceil(target)), total - 1), int(counts.min()))
    wanted = min(max(int(target + 0.5), 1), largest)
    # added_by[s]: the first prompt with which some prompts up to it have s pairs; -1: none has.
    added_by = np.full(largest + 1, -1)
    reached = np.zeros(largest + 1, bool)
    reached[0] = True
    for prompt, count in enumerate(counts.tolist()):
        new = np.zeros_like(reached)
        if count <= largest:
            new[count:] = reached[: largest + 1 - count] & ~reached[count:]
        added_by[new] = prompt
        reached |= new
        if reached[wanted]:
            break
    sums = np.flatnonzero(reached[1:]) + 1
    left = int(sums[np.argmin(np.abs(sums - target))])
    chosen = np.zeros(len(counts), bool)
    while left:
        prompt = added_by[left]
        chosen[prompt] = True
        left -= int(counts[prompt])
    return chosen


def joined_keys(prompt_keys: np.ndarray, group_keys: np.ndarray) -> np.ndarray:
    """Keys by which pairs are split, so that neither a prompt nor a group is on both sides.

    Args:
        prompt_keys: uint64 [N], hashes of the prompts.
        group_keys: uint64 [N], hashes of what the pairs belong to; the prompt's for those that
            belong to nothing.

    Returns:
        uint64 [N], equal for pairs that share a prompt or a group, also through other pairs: the
        smallest of their group keys.
    """
    if np.array_equal(prompt_keys, group_keys):
        return prompt_keys
    of_prompt = np.unique(prompt_keys, return_inverse=True)[1]
    of_group = np.unique(group_keys, return_inverse=True)[1]
    labels = group_keys
    while True:
        spread = _smallest(_smallest(labels, of_prompt), of_group)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _smallest(labels: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """For each item the smallest label in its part, the parts being numbered from 0."""
    found = np.full(int(parts.max(initial=-1)) + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(found, parts, labels)
    return found[parts]


def split_files(folder: Path, split: str | None, usual: Sequence[str]) -> list[Path]:
    """The files with the rows of a split, in order.

    Args:
        split: the split that is asked for; None: the first of `usual` that the folder has, or its
            only one.

    Raises:
        ValueError: the folder has no rows, or no such split; names those that it has.
    """
    if (folder / "state.json").is_file():
        return _saved_files(folder, split)
    splits = _splits(folder)
    if not splits:
        raise ValueError(
            f"{folder}: is a folder without rows. Name a file, or a folder of files or from "
            "save_to_disk"
        )
    name = split or next((name for name in usual if name in splits), None)
    if name is None and len(splits) == 1:
        (name,) = splits
    if name is None or name not in splits:
        near = difflib.get_close_matches(split or usual[0], splits, n=1, cutoff=0.0)[0]
        asked = f"no split {split}" if split else f"no split {' or '.join(usual)}"
        raise ValueError(
            f"{folder}: has {asked}. Its splits: {', '.join(splits)}. Write {folder}:{near}"
        )
    return splits[name]


def _splits(folder: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    if (folder / "dataset_dict.json").is_file():
        for path in sorted(folder.glob("*/state.json")):
            splits[path.parent.name] = _saved_files(path.parent, None)
        return splits
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or not file_kind(path) or path.name == "dataset_infos.json":
            continue
        # Hidden folders hold caches of the hub client, with files of the same names.
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        splits.setdefault(_split_of(path), []).append(path)
    return splits


def _split_of(path: Path) -> str:
    """train.jsonl.gz and train-00000-of-00002.parquet have the split train."""
    stem = path.name
    if path.suffixes:
        stem = stem[: -len("".join(path.suffixes))]
    return re.sub(r"-\d+-of-\d+$", "", stem)


def _saved_files(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files of one set from save_to_disk."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(item["filename"]) for item in state["_data_files"]]
        found = state.get("_split")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: its state.json is not from datasets' save_to_disk ({error!r})"
        ) from None
    if split is not None and found is not None and split != str(found):
        raise ValueError(
            f"{folder}: has no split {split}, it is the split {found}. Leave the split out"
        )
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{folder}: its state.json names files outside of the folder")
    return [folder / name for name in names]

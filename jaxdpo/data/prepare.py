"""From data options to encoded pairs: read, encode, split, check, report."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.dedup import settle_overlap, settle_repeats
from jaxdpo.data.disk_cache import TableWriter, load_or_make
from jaxdpo.data.pair_table import PairTable
from jaxdpo.data.report import DataReport, describe_counts
from jaxdpo.data.sources import READING_OPTIONS, read_set, set_identity
from jaxdpo.data.tokenize import Encoder, Tokenizer, check_vocabulary
from jaxdpo.data.tokenize_parallel import encode_records

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The pairs of a run."""

    train: PairTable
    eval: PairTable
    report: dict[str, Any]
    """Plain JSON values, for data_report.json."""


def prepare(section: DataSection, tokenizer: Tokenizer, vocab_size: int) -> Prepared:
    """Read, encode and split the pairs that the data options name. The rows' text is not kept in memory.

    Raises:
        ValueError: a set cannot be read, loses more than data.max_dropped_fraction of its rows, or leaves no usable pair; no
            training answer has an end; or a token id has no row in the model.
    """
    encoder = Encoder.create(tokenizer, section)
    train, train_reports, train_repeats = _read_sets(
        section, "data.train", section.train, encoder, vocab_size
    )
    if section.eval:
        held_out, eval_reports, eval_repeats = _read_sets(
            section, "data.eval", section.eval, encoder, vocab_size
        )
        held_out = settle_overlap(held_out, train, section, eval_reports)
        for item in eval_reports:
            _check_kept(item, "data.eval")
    else:
        mask = split_by_prompt(train.prompt_keys, section.eval_fraction)
        train, held_out, eval_reports, eval_repeats = train.take(~mask), train.take(mask), [], {}
    report = {
        **_report(train, held_out, {"train": train_reports, "eval": eval_reports}, encoder),
        "repeats": {"train": train_repeats, "eval": eval_repeats},
    }
    _check_ends(report["train"], section)
    for warning in report["warnings"]:
        logger.warning("data: %s", warning)
    return Prepared(train, held_out, report)


def split_by_prompt(prompt_keys: np.ndarray, fraction: float) -> np.ndarray:
    """Choose validation pairs by their prompt's hash: bool [N], True for validation.

    A prompt's side depends on the prompt alone, so it does not move when rows are added, and pairs that share a prompt stay
    together. Where the hashes would leave a side empty although there are two prompts, the nearest prompt crosses over.
    """
    prompts = np.unique(prompt_keys)
    if fraction == 0 or len(prompts) < 2:
        return np.zeros(len(prompt_keys), bool)
    limit = np.uint64(int(fraction * 2**64))
    limit = np.clip(limit, prompts[0] + np.uint64(1), prompts[-1])
    return prompt_keys < limit


def summary(report: dict[str, Any]) -> list[str]:
    """The report as lines for the console: what became of each set, then what the model will see."""
    lines = [describe_counts(item) for item in (*report["sets"]["train"], *report["sets"]["eval"])]
    for part in ("train", "eval"):
        stats = report[part]
        if stats["pairs"]:
            lengths = ", ".join(
                f"{name} {q['p50']}/{q['p95']}/{q['max']}" for name, q in stats["length"].items()
            )
            cut = ", ".join(f"{count} {name}" for name, count in stats["truncated"].items())
            pairs = f"{stats['pairs']} pairs of {stats['prompts']} prompts, the chosen answer longer in {stats['chosen_longer']:.0%}"
            lines.append(f"{part}: {pairs}; tokens p50/p95/max: {lengths}; truncated: {cut}")
    return lines


def _read_sets(
    section: DataSection, option: str, names: list[str], encoder: Encoder, vocab_size: int
) -> tuple[PairTable, list[DataReport], dict[str, int]]:
    """The pairs of all sets of an option, a report for each set, and the number of pairs that repeat or contradict others."""

    def make(writer: TableWriter) -> dict[str, Any]:
        reports, largest = [], -1
        for source, name in enumerate(names):
            report, records = read_set(name, section, option)
            for columns in encode_records(records, report, encoder, source, section.num_proc):
                writer.append(columns)
                largest = max(largest, int(columns["tokens"].max(initial=-1)))
            reports.append(dataclasses.asdict(report))
        return {"reports": reports, "largest_id": largest}

    table, notes = load_or_make(section.cache, _identity(section, option, names, encoder), make)
    check_vocabulary(notes["largest_id"], encoder.tokenizer, vocab_size)
    reports = [DataReport(**note) for note in notes["reports"]]
    for report in reports:
        _check_kept(report, option)
        _check_dropped(report, option, section.max_dropped_fraction)
    table, repeats = settle_repeats(table, section, option, reports)
    for report in reports:
        _check_kept(report, option)
    return table, reports, repeats


def _identity(
    section: DataSection, option: str, names: list[str], encoder: Encoder
) -> dict[str, Any]:
    """All that the encoded pairs of an option depend on, each part named as the user knows it."""
    values = dataclasses.asdict(section)
    return {
        "data": [set_identity(name, option) for name in names],
        "options": {name: values[name] for name in READING_OPTIONS} | {"option": option},
        **encoder.identity,
        "code": _code(),
    }


@functools.cache
def _code() -> str:
    """Hash of the code that reads and encodes, and the versions of what it stands on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest() + "".join(
        f" {name} {version(name)}" for name in ("tokenizers", "transformers")
    )


def _check_kept(report: DataReport, option: str) -> None:
    if report.kept == 0:
        raise ValueError(
            f"{option}={report.name}: no usable pair is left. {describe_counts(report.to_json())}"
        )


def _check_dropped(report: DataReport, option: str, limit: float) -> None:
    if report.dropped_fraction > limit:
        raise ValueError(
            f"{option}={report.name}: {report.dropped_fraction:.1%} of the pairs are unusable, more than "
            f"data.max_dropped_fraction={limit}. {describe_counts(report.to_json())}. Repair the rows or raise the limit"
        )


def _check_ends(statistics: dict[str, Any], section: DataSection) -> None:
    if statistics["ended"] == 0 and section.missing_eos == "error":
        cut = sum(statistics["truncated"][side] for side in ("chosen", "rejected"))
        raise ValueError(
            f"data.train: none of {2 * statistics['pairs']} answers ends in an end marker ({cut} were cut), so the model would not learn "
            "to stop. Raise data.max_length, or use a tokenizer or a data.chat_template that has one; data.missing_eos=keep trains nevertheless"
        )


def _report(
    train: PairTable, held_out: PairTable, sets: dict[str, list[DataReport]], encoder: Encoder
) -> dict[str, Any]:
    shared = np.intersect1d(train.prompt_keys, held_out.prompt_keys)
    report = {
        "train": train.statistics(),
        "eval": held_out.statistics(),
        "sets": {part: [item.to_json() for item in reports] for part, reports in sets.items()},
        "shared_prompts": len(shared),
        "with_margin": int(np.count_nonzero(train.margins) + np.count_nonzero(held_out.margins)),
    }
    return {**report, "warnings": list(_warnings(report, encoder))}


def _warnings(report: dict[str, Any], encoder: Encoder) -> Iterator[str]:
    if report["shared_prompts"]:
        yield f"{report['shared_prompts']} validation prompts are in the training sets too: validation looks better than it is"
    if report["with_margin"]:
        yield f"{report['with_margin']} pairs have a margin, taken from the loss's logit (ODPO). Rename the column if that is not meant"
    for part in ("train", "eval"):
        if report[part]["ended"] == 0:
            yield f"{part}: no answer ends in an end-of-text token, so the model will not learn to stop"
    for item in (*report["sets"]["train"], *report["sets"]["eval"]):
        if item["special_text"]:
            yield (
                f"{item['name']}: {item['special_text']} rows spell a special token in their text, which is never read as that token. "
                "If the text is the output of a chat template, give messages instead"
            )
        if item["verbatim"] and encoder.template is not None:
            yield (
                f"{item['name']}: {item['verbatim']} rows are plain strings, used as they are: the chat template applies to messages only"
            )

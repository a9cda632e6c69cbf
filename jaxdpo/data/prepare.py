"""From data options to encoded pairs: read, encode, deduplicate, split, check, report."""

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
from jaxdpo.data.dedup import deduplicate, remove_overlap
from jaxdpo.data.disk_cache import TableWriter, load_or_make
from jaxdpo.data.left_out import ANSWER_TEXT, PROMPT_TEXT
from jaxdpo.data.pair_table import PairTable
from jaxdpo.data.report import DataReport, describe_counts
from jaxdpo.data.sources import READING_OPTIONS, check_score, read_set, set_identity
from jaxdpo.data.splits import NEAR, joined_keys, split_by_prompt
from jaxdpo.data.tokenize import Encoder, check_vocabulary
from jaxdpo.data.tokenize_parallel import encode_records
from jaxdpo.data.tokenizer_json import Tokenizer
from jaxdpo.utils.text import printable

logger = logging.getLogger(__name__)

MANY_CUT = 0.05
"""Share of truncated answers from which a warning names them: a few very long ones are usual."""
MANY_REPEAT = 0.05
"""Share of pairs whose answers begin with the prompt, likewise: a few repeat a question."""
NO_VALIDATION = "no pair is held out for validation"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The pairs of a run."""

    train: PairTable
    eval: PairTable
    report: dict[str, Any]
    """Plain JSON values, for data_report.json."""


def prepare(section: DataSection, tokenizer: Tokenizer, vocab_size: int) -> Prepared:
    """Read, encode and split the pairs of the data options. Memory does not hold the rows' text.

    Raises:
        ValueError: a set cannot be read, more than data.max_dropped_fraction of its pairs are
            invalid, or none is valid; no training answer ends in eos; or the model has no embedding
            for a token id.
    """
    encoder = Encoder.create(tokenizer, section)
    logger.info("data: %s", encoder.template_note)
    train, train_reports, train_repeats = _read_sets(
        section, "data.train", section.train, encoder, vocab_size
    )
    if section.eval:
        held_out, eval_reports, eval_repeats = _read_sets(
            section, "data.eval", section.eval, encoder, vocab_size
        )
        held_out = remove_overlap(held_out, train, section, eval_reports)
        for item in eval_reports:
            _check_kept(item, "data.eval")
    else:
        keys = joined_keys(train.prompt_keys, train.group_keys)
        mask = split_by_prompt(keys, section.eval_fraction)
        train, held_out = train.take(~mask), train.take(mask)
        eval_reports, eval_repeats = [], {}
    check_score(section, [*train_reports, *eval_reports])
    sets = {"train": train_reports, "eval": eval_reports}
    report = _report(train, held_out, sets, encoder)
    report["repeats"] = {"train": train_repeats, "eval": eval_repeats}
    if not section.eval:
        report["warnings"] += _split_warning(report, section.eval_fraction)
    _check_eos(report["train"], section)
    for warning in report["warnings"]:
        logger.warning("data: %s", warning)
    return Prepared(train, held_out, report)


def summary(report: dict[str, Any]) -> list[str]:
    """The report as lines for the console: the counts of each set, then what the model will see."""
    lines = [report["chat_template"]]
    for item in (*report["sets"]["train"], *report["sets"]["eval"]):
        lines.append(describe_counts(item))
    for part in ("train", "eval"):
        statistics = report[part]
        if not statistics["pairs"]:
            continue
        lengths = []
        for name, quantiles in statistics["length"].items():
            lengths.append(f"{name} {quantiles['p50']}/{quantiles['p95']}/{quantiles['max']}")
        truncated = [f"{count} {name}" for name, count in statistics["truncated"].items()]
        lines.append(
            f"{part}: {statistics['pairs']} pairs of {statistics['prompts']} prompts, "
            f"the chosen answer longer in {statistics['chosen_longer']:.0%}; "
            f"tokens p50/p95/max: {', '.join(lengths)}; truncated: {', '.join(truncated)}"
        )
    return lines


def _read_sets(
    section: DataSection, option: str, names: list[str], encoder: Encoder, vocab_size: int
) -> tuple[PairTable, list[DataReport], dict[str, int]]:
    """The pairs of all sets of an option.

    Returns:
        The pairs, a report for each set, and how many pairs repeat or contradict others.
    """

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
        _check_strings(report, option, section)
        _check_kept(report, option)
        _check_dropped(report, option, section.max_dropped_fraction)
    # Not part of the cache: these options can change without encoding again.
    table, repeats = deduplicate(table, section, option, reports)
    for report in reports:
        _check_kept(report, option)
    return table, reports, repeats


def _identity(
    section: DataSection, option: str, names: list[str], encoder: Encoder
) -> dict[str, Any]:
    """All that the encoded pairs of an option depend on, each part named as the user knows it."""
    values = dataclasses.asdict(section)
    options = {name: values[name] for name in READING_OPTIONS}
    return {
        "data": [set_identity(name, option) for name in names],
        "options": {**options, "option": option},
        **encoder.identity,
        "code": _code_version(),
    }


@functools.cache
def _code_version() -> str:
    """The code that reads and encodes, and the versions of the libraries that tokenize."""
    text = code_hash(Path(__file__).parent)
    for name in ("tokenizers", "transformers"):
        text += f" {name} {version(name)}"
    return text


def code_hash(folder: Path) -> str:
    """Hex SHA-256 of the Python files in a folder and its subfolders (formats/ parses the rows)."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _check_strings(report: DataReport, option: str, section: DataSection) -> None:
    """Strings with special tokens may be what a chat template wrote, or text about such tokens."""
    if report.special_strings and section.strings is None:
        raise ValueError(
            f"{option}={report.name}: {report.special_strings} rows of strings spell special "
            f"tokens of the tokenizer ({printable(', '.join(report.special_examples))}). "
            "Say what they are: data.strings=templated if a chat template wrote them (special "
            "tokens are read as such), data.strings=verbatim if they are text about such tokens "
            "(which stay the characters that spell them)"
        )


def _check_kept(report: DataReport, option: str) -> None:
    if report.kept == 0:
        raise ValueError(
            f"{option}={report.name}: no valid pair is left. {describe_counts(report.to_json())}"
        )


def _check_dropped(report: DataReport, option: str, limit: float) -> None:
    if report.dropped_fraction > limit:
        raise ValueError(
            f"{option}={report.name}: {report.dropped_fraction:.1%} of the pairs are invalid, "
            f"more than data.max_dropped_fraction={limit}. {describe_counts(report.to_json())}. "
            "Repair the rows or raise the limit"
        )


def _check_eos(statistics: dict[str, Any], section: DataSection) -> None:
    """Training on answers of which none ends in eos would teach the model not to stop."""
    if statistics["ended"] == 0 and section.missing_eos == "error":
        truncated = statistics["truncated"]
        raise ValueError(
            f"data.train: none of {2 * statistics['pairs']} answers ends in an end marker "
            f"({truncated['chosen'] + truncated['rejected']} were cut), so the model would not "
            "learn to stop. Raise data.max_length, or use a tokenizer or a data.chat_template "
            "that has one; data.missing_eos=keep trains nevertheless"
        )


def _split_warning(report: dict[str, Any], fraction: float) -> Iterator[str]:
    """What to know about a held-out share that is far from data.eval_fraction."""
    held_out = report["eval"]["pairs"]
    total = report["train"]["pairs"] + held_out
    share = held_out / total
    if fraction / NEAR <= share <= fraction * NEAR:  # 0 too
        return
    if not held_out:
        prompts = report["train"]["prompts"]
        why = "data.train has one prompt"
        if prompts > 1:
            why = f"all {prompts} prompts of data.train belong to one group (column group)"
        yield (
            f"data.eval_fraction={fraction}: {NO_VALIDATION} (0 of {total}), as {why}, which would "
            "be held out whole. Set data.eval, or data.eval_fraction=0"
        )
        return
    yield (
        f"data.eval_fraction={fraction}: {held_out} of {total} pairs ({share:.1%}) are held out, "
        f"all those of {report['eval']['prompts']} prompts: whole prompts come no nearer. "
        "Set data.eval for others"
    )


def _report(
    train: PairTable, held_out: PairTable, sets: dict[str, list[DataReport]], encoder: Encoder
) -> dict[str, Any]:
    shared = np.intersect1d(train.prompt_keys, held_out.prompt_keys)
    report = {
        "chat_template": encoder.template_note,
        "train": train.statistics(),
        "eval": held_out.statistics(),
        "sets": {part: [item.to_json() for item in reports] for part, reports in sets.items()},
        "shared_prompts": len(shared),
        "with_margin": int(np.count_nonzero(train.margins) + np.count_nonzero(held_out.margins)),
    }
    return {**report, "warnings": list(_warnings(report, encoder))}


def _warnings(report: dict[str, Any], encoder: Encoder) -> Iterator[str]:
    if report["shared_prompts"]:
        yield (
            f"{report['shared_prompts']} validation prompts are in the training sets too: "
            "validation looks better than it is"
        )
    if report["with_margin"]:
        yield (
            f"{report['with_margin']} pairs have a margin, taken from the loss's logit (ODPO). "
            "Rename the column if that is not meant"
        )
    for part in ("train", "eval"):
        answers = 2 * report[part]["pairs"]
        cut = report[part]["truncated"]["chosen"] + report[part]["truncated"]["rejected"]
        if answers and cut >= MANY_CUT * answers:
            yield (
                f"{part}: {cut} of {answers} answers ({cut / answers:.0%}) lost their end, and "
                "with it the eos token, to data.max_length. Raise it; `python -m jaxdpo.data` "
                "with model.path shows what each length cuts"
            )
        if report[part]["ended"] == 0:
            yield (
                f"{part}: no answer ends in an end-of-text token, so the model will not learn "
                "to stop"
            )
    for item in (*report["sets"]["train"], *report["sets"]["eval"]):
        # Of strings that a template wrote, the tokens are read; those of messages drop the row.
        if item["special_text"] and encoder.strings != "templated":
            yield (
                f"{item['name']}: {item['special_text']} rows spell a special token in their "
                "text, which is never read as that token. Strings that a chat template wrote are "
                "read with data.strings=templated"
            )
        if item["repeats_prompt"] >= MANY_REPEAT * item["parsed"] > 0:
            yield (
                f"{item['name']}: both answers of {item['repeats_prompt']} of {item['parsed']} "
                "pairs begin with their prompt, which the model then learns to repeat. Remove it "
                "from the answers, or leave out the prompt column if both are complete texts"
            )
        if ANSWER_TEXT in item["left_out"]:
            yield (
                f"{item['name']}: the chat template leaves out text of the answers of "
                f"{item['left_out'][ANSWER_TEXT]} pairs, which is not learned (templates of "
                "reasoning models cut all before </think>). Name a template that keeps it in "
                "data.chat_template, or shorten the answers"
            )
        if PROMPT_TEXT in item["left_out"]:
            yield (
                f"{item['name']}: the chat template leaves out text of the prompts of "
                f"{item['left_out'][PROMPT_TEXT]} pairs (system messages, or thoughts of earlier "
                "turns). If it matters, name a template that keeps it in data.chat_template"
            )
        if item["verbatim"] and encoder.template is not None and encoder.strings is None:
            yield (
                f"{item['name']}: {item['verbatim']} rows are plain strings, used as they are: "
                "the chat template applies to messages only"
            )

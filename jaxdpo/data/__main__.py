"""`python -m jaxdpo.data data.train=[pairs.jsonl] [model.path=...] [out=ours.jsonl]`: what a model would learn from, before it does.

Counts what is read and dropped, shows pairs and, with a tokenizer, what is scored and how long it is; converts any source to our
JSON lines. Exit status: 0 done, 1 fault, 2 wrong options.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxdpo import options
from jaxdpo.config import STRICT_KEYS, DataSection
from jaxdpo.data.chat import describe_pair, load_tokenizer
from jaxdpo.data.prepare import prepare, summary
from jaxdpo.data.records import DataReport, Preference, Text, describe_counts, printable, strings
from jaxdpo.data.sources import read_set
from jaxdpo.data.table import PairTable

DONE, FAULT = 0, 1
MAX_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
UNCUT = 2**24
"""A length in tokens that cuts nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """Whose tokens are counted."""

    __pydantic_config__ = STRICT_KEYS

    path: str | None = None
    """Hugging Face folder or hub id with a tokenizer. Without it, lengths are in characters and no template is applied."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit. Default: the hub's main branch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Look at preference data, or convert it."""

    __pydantic_config__ = STRICT_KEYS

    data: DataSection = dataclasses.field(default_factory=DataSection)
    model: TokenizerSection = TokenizerSection()
    show: int = 3
    """Pairs of data.train to show."""
    out: str | None = None
    """File to write the pairs of data.train to, as JSON lines of {prompt, chosen, rejected, weight, id}. It must not exist."""


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, _ = options.load(DataConfig, argv, command="data", checks=[_check])
    try:
        if config.out is not None or config.model.path is None:
            _read(config)
        if config.model.path is not None:
            _encode(config)
    except (ValueError, OSError) as error:
        print(f"jaxdpo.data: {error}", file=sys.stderr)
        return FAULT
    return DONE


def to_row(record: Preference) -> dict[str, Any]:
    """A record as JSON values, which the form `preference` reads back to an equal one (but for its root)."""

    def plain(text: Text) -> Any:
        return text if isinstance(text, str) else [{"role": turn.role, "content": turn.content} for turn in text]

    row = {"prompt": plain(record.prompt), "chosen": plain(record.chosen), "rejected": plain(record.rejected)}
    tools = {"tools": json.loads(record.tools)} if record.tools else {}
    return {**row, **tools, "weight": record.weight, "id": record.id}


def _check(config: DataConfig) -> list[str]:
    checks = [
        (bool(config.data.train), "data.train=[]: name at least one set, e.g. data.train=[pairs.jsonl]"),
        (config.show >= 0, f"show={config.show}: must not be negative"),
        (config.out is None or not Path(config.out).expanduser().exists(), f"out={config.out}: exists. Name a new file, or remove it"),
    ]
    return [message for ok, message in checks if not ok]


def _read(config: DataConfig) -> None:
    """Read every set as text; show the first pairs and, where asked to, write all of data.train."""
    opened = [read_set(name, config.data, "data.train") for name in config.data.train]
    with _new_file(config.out) as out:
        records = _written(itertools.chain.from_iterable(records for _, records in opened), out)
        shown = list(itertools.islice(records, 0 if config.model.path else config.show))
        for record in shown:
            print(describe_record(record))
        lengths = _lengths(itertools.chain(shown, records))
    _tell([report for report, _ in opened])
    _tell_lengths("train", lengths, "characters")
    held_out = [read_set(name, config.data, "data.eval") for name in config.data.eval]
    lengths = _lengths(itertools.chain.from_iterable(records for _, records in held_out))
    _tell([report for report, _ in held_out])
    _tell_lengths("eval", lengths, "characters")


@contextlib.contextmanager
def _new_file(path: str | None) -> Iterator[TextIO | None]:
    """A file that has its name only once it is whole; None for None."""
    if path is None:
        yield None
        return
    target = Path(path).expanduser()
    partial = target.with_name(target.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        yield out
    partial.rename(target)


def _written(records: Iterable[Preference], out: TextIO | None) -> Iterator[Preference]:
    for record in records:
        if out is not None:
            out.write(json.dumps(to_row(record), ensure_ascii=False) + "\n")
        yield record


def _encode(config: DataConfig) -> None:
    """Prepare the sets as training would, without cutting anything; show the first pairs and what lengths there are."""
    tokenizer = load_tokenizer(str(config.model.path), config.model.revision)
    section = dataclasses.replace(config.data, max_length=UNCUT, max_prompt_length=UNCUT // 2, max_row_tokens=2 * UNCUT)
    done = prepare(section, tokenizer, vocab_size=2**31)
    for index in range(min(config.show, len(done.train))):
        print(describe_pair(done.train[index], tokenizer))
    print("\n".join(summary(done.report)))
    for name, table in (("train", done.train), ("eval", done.eval)):
        _tell_lengths(name, table.lengths, "tokens")
        if len(table):
            _tell_cuts(name, table)


def _lengths(records: Iterable[Preference]) -> np.ndarray:
    """int64 [N, 3]: characters of prompt, chosen and rejected."""
    sizes = [[sum(map(len, strings(text))) for text in (r.prompt, r.chosen, r.rejected)] for r in records]
    return np.array(sizes, np.int64).reshape(-1, 3)


def _tell(reports: Sequence[DataReport]) -> None:
    for report in reports:
        print(describe_counts(dataclasses.replace(report, kept=report.parsed).to_json()))


def _tell_lengths(name: str, lengths: np.ndarray, unit: str) -> None:
    """Lengths, and how well the rule that the longer answer is the better one would do."""
    if not len(lengths):
        return
    quantiles = np.percentile(lengths, (50, 95, 100), axis=0, method="higher").T.astype(int).tolist()
    each = ", ".join(f"{part} {'/'.join(map(str, row))}" for part, row in zip(("prompt", "chosen", "rejected"), quantiles, strict=True))
    longer, equal = (lengths[:, 1] > lengths[:, 2]).mean(), (lengths[:, 1] == lengths[:, 2]).mean()
    print(
        f"{name}: {len(lengths)} pairs; {unit} p50/p95/max: {each}; the longer answer is the chosen one in {longer:.1%}, equal {equal:.1%}"
    )


def _tell_cuts(name: str, table: PairTable) -> None:
    longest = table.lengths[:, 0] + table.lengths[:, 1:].max(axis=1)
    shares = ", ".join(f"{limit}: {(longest > limit).mean():.1%}" for limit in MAX_LENGTHS if (longest > limit).any())
    print(f"{name}: pairs that data.max_length would cut: {shares or f'none from {MAX_LENGTHS[0]} on'}")


def describe_record(record: Preference) -> str:
    """A pair as text, for a terminal."""
    prompt = [("", record.prompt)] if isinstance(record.prompt, str) else [(f"{turn.role}: ", turn.content) for turn in record.prompt]
    answers = [(f"{name}: ", strings(text)[-1]) for name, text in (("chosen", record.chosen), ("rejected", record.rejected))]
    lines = "\n".join(label + text for label, text in [*prompt, *answers])
    return f"pair {printable(record.id)}, weight {record.weight:g}\n" + "\n".join("  " + line for line in printable(lines).split("\n"))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""`python -m jaxdpo.data data.train=[pairs.jsonl] [model.path=...] [page=report.html] [out=ours.jsonl]`: what a model would learn from.

Counts what is read and dropped, shows pairs and, with a tokenizer, what is scored and how long it is; tells what is almost the same
and what is odd; converts any source to our JSON lines. Exit status: 0 done, 1 fault, 2 wrong options.
"""

import contextlib
import dataclasses
import io
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdpo.config import cli
from jaxdpo.config.data_options import DEFAULT_MAX_LENGTH, DataSection
from jaxdpo.config.sections import STRICT_KEYS
from jaxdpo.data.formats.preference import Preference, Text
from jaxdpo.data.inspect import near_duplicates
from jaxdpo.data.inspect.examples import example_of_record, example_of_tokens, show
from jaxdpo.data.inspect.survey import NAMED, Survey, Texts, read_texts, survey_tokens
from jaxdpo.data.inspect.tables import bars, tables
from jaxdpo.data.pair_table import LENGTHS, EncodedPair
from jaxdpo.data.prepare import Prepared, prepare
from jaxdpo.data.sources import read_set
from jaxdpo.data.tokenize import Encoder, Tokenizer, load_tokenizer
from jaxdpo.utils import html_report
from jaxdpo.utils.console import Console, say, show_table, stdout
from jaxdpo.utils.files import whole_file
from jaxdpo.utils.text import printable

DONE, FAULT, STOPPED = 0, 1, 130
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
    """Pairs to show: the first of data.train."""
    odd: int = 0
    """Odd pairs of each kind to show, besides naming them: the longest, those that are cut, ... At most 5."""
    near: float = near_duplicates.USUAL
    """How alike two texts are that count as almost the same: share of common runs of three words, 0.6 to 1. 0: do not search."""
    page: str | None = None
    """HTML file to write the report and the shown pairs to. It must not exist, or be a page that was written before."""
    out: str | None = None
    """File to write the pairs of data.train to, as JSON lines of {prompt, chosen, rejected, weight, id}. It must not exist."""


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    log = logging.StreamHandler()
    log.addFilter(_Once())
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[log])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not in UTF-8
    config, _ = cli.load(DataConfig, argv, command="data", checks=[_check])
    try:
        _look(config)
    except (ValueError, OSError) as error:
        print(f"jaxdpo.data: {error}", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        print("jaxdpo.data: stopped", file=sys.stderr)
        return STOPPED
    return DONE


def to_row(record: Preference) -> dict[str, Any]:
    """A record as JSON values, which the form `preference` reads back to an equal one (but for its root)."""

    def plain(text: Text) -> Any:
        return (
            text
            if isinstance(text, str)
            else [{"role": turn.role, "content": turn.content} for turn in text]
        )

    row = {
        "prompt": plain(record.prompt),
        "chosen": plain(record.chosen),
        "rejected": plain(record.rejected),
    }
    tools = {"tools": json.loads(record.tools)} if record.tools else {}
    margin = {"margin": record.margin} if record.margin else {}
    return {**row, **tools, "weight": record.weight, **margin, "id": record.id}


class _Once(logging.Filter):
    """Passes what was not told before: sets are read as text, and for their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be told."""
        told = record.getMessage() in self._told
        self._told.add(record.getMessage())
        return not told


def _check(config: DataConfig) -> list[str]:
    least = near_duplicates.LEAST
    checks = [
        (
            bool(config.data.train),
            "data.train=[]: name at least one set, e.g. data.train=[pairs.jsonl]",
        ),
        (config.show >= 0, f"show={config.show}: must not be negative"),
        (0 <= config.odd <= NAMED, f"odd={config.odd}: must lie between 0 and {NAMED}"),
        (
            config.near == 0 or least <= config.near <= 1,
            f"near={config.near}: must be 0 (no search) or lie between {least} and 1",
        ),
    ]
    problems = [message for ok, message in checks if not ok]
    for option, text in (("out", config.out), ("page", config.page)):
        path = None if text is None else Path(text).expanduser()
        if path is not None and not path.parent.is_dir():
            problems.append(
                f"{option}={text}: there is no folder {path.parent}. Make it, or name another"
            )
        elif path is not None and not (
            html_report.may_write(path) if option == "page" else not path.exists()
        ):
            problems.append(f"{option}={text}: exists. Name a new file, or remove it")
    if config.page is not None and config.page == config.out:
        problems.append(f"page={config.page}: is the same file as out. Name two")
    return problems


def _look(config: DataConfig) -> None:
    first: list[Preference] = []
    tokenizer = (
        None
        if config.model.path is None
        else load_tokenizer(config.model.path, config.model.revision)
    )
    uncut = dataclasses.replace(
        config.data, max_length=UNCUT, max_prompt_length=UNCUT // 2, packed_length=2 * UNCUT
    )
    texts = Texts(
        config.near, None if tokenizer is None else Encoder.create(tokenizer, uncut).spells_special
    )
    with (
        contextlib.nullcontext()
        if config.out is None
        else whole_file(Path(config.out).expanduser()) as out
    ):

        def take(record: Preference) -> None:
            if len(first) < config.show:
                first.append(record)
            if out is not None:
                out.write(json.dumps(to_row(record), ensure_ascii=False) + "\n")

        survey = read_texts(config.data, texts, take)
    if tokenizer is None:
        shown = [(record, "") for record in first] + _odd_records(config, survey)
        examples = [
            example_of_record(record, why, config.data.loss_turns == "all") for record, why in shown
        ]
    else:
        done = prepare(uncut, tokenizer, vocab_size=2**31)
        survey = survey_tokens(survey, texts.odd_by_words(), done, _limits(config.data))
        examples = [
            example_of_tokens(done.train[i], tokenizer)
            for i in range(min(config.show, len(done.train)))
        ]
        examples += _odd_pairs(config, survey, done, tokenizer)
    if config.page is not None:
        with whole_file(Path(config.page).expanduser()) as page:
            page.write(_page(config, survey, examples))
    _tell(survey, examples, stdout())


def _limits(section: DataSection) -> tuple[int, int]:
    """data.max_length and data.max_prompt_length as a model of enough positions would have them."""
    length = section.max_length or max(DEFAULT_MAX_LENGTH, section.max_prompt_length + 1)
    return length, section.max_prompt_length or length // 2


def _wanted(config: DataConfig, survey: Survey) -> dict[str, str]:
    """Ids of the odd pairs that are to be shown, and what is odd about each."""
    wanted: dict[str, str] = {}
    for item in survey.odd:
        for name in item.ids[: config.odd]:
            wanted[name] = f"{wanted[name]}; {item.kind}" if name in wanted else item.kind
    return wanted


def _odd_records(config: DataConfig, survey: Survey) -> list[tuple[Preference, str]]:
    """The odd pairs that are to be shown, read again (texts are not kept), and what is odd about each."""
    wanted = _wanted(config, survey)
    found: dict[str, Preference] = {}
    sets = (("data.train", config.data.train), ("data.eval", config.data.eval))
    for option, names in sets if wanted else ():
        for name in names:
            found.update(
                {
                    record.id: record
                    for record in read_set(name, config.data, option)[1]
                    if record.id in wanted
                }
            )
    return [(found[name], why) for name, why in wanted.items()]


def _odd_pairs(
    config: DataConfig, survey: Survey, done: Prepared, tokenizer: Tokenizer
) -> list[html_report.Example]:
    """The odd pairs that are to be shown, but for those that are dropped."""
    wanted = _wanted(config, survey)
    found: dict[str, EncodedPair] = {}
    for table in (done.train, done.eval) if wanted else ():
        found.update({name: table[place] for place, name in enumerate(table.ids) if name in wanted})
    return [
        example_of_tokens(found[name], tokenizer, why)
        for name, why in wanted.items()
        if name in found
    ]


def _tell(survey: Survey, examples: Sequence[html_report.Example], console: Console) -> None:
    for example in examples:
        show(example, console)
        say(console, "")
    blocks = _can_print(console, "█▏")
    for table in tables(survey):
        show_table(table.title, table.header, table.rows, console)
        for note in table.notes:
            say(console, note)
        say(console, "")
        if table.title.startswith("Lengths"):
            drawn = bars(survey.parts[0], survey.unit, console.width, blocks)
            show_table(drawn.title, drawn.header, drawn.rows, console)
            say(console, "")


def _can_print(console: Console, text: str) -> bool:
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        return False
    return True


def _page(config: DataConfig, survey: Survey, examples: Sequence[html_report.Example]) -> str:
    sections: list[html_report.Section] = []
    for table in tables(survey):
        sections.append(table)
        if table.title.startswith("Lengths"):
            for part in survey.parts:
                drawing = html_report.histogram(
                    dict(zip(LENGTHS, part.lengths.T, strict=True)), survey.unit, part.name
                )
                caption = f"Shares of the {len(part.lengths):,} pairs by {survey.unit}, on a scale that doubles."
                sections.append(
                    html_report.Picture(f"How long the {part.name} texts are", drawing, caption)
                )
    note = "Underlined on a coloured ground: what is scored, and so learned. The rest is context."
    if examples:
        sections.append(html_report.Examples("Some of the pairs", note, examples))
    names = ", ".join(map(printable, (*config.data.train, *config.data.eval)))
    lengths = (
        "in characters; no tokenizer was given"
        if config.model.path is None
        else f"in tokens of {printable(config.model.path)}"
    )
    return html_report.html_page(
        "Preference data", f"What {names} would teach a model. Lengths are {lengths}.", sections
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""What `python -m jaxdpo.data` does: read, survey, show, convert."""

import contextlib
import dataclasses
import json
from pathlib import Path

from jaxdpo.config.data_options import DEFAULT_MAX_LENGTH, DataSection
from jaxdpo.data.formats.preference import Preference
from jaxdpo.data.inspect.convert import to_row
from jaxdpo.data.inspect.examples import example_of_record, example_of_tokens
from jaxdpo.data.inspect.options import DataConfig
from jaxdpo.data.inspect.page import print_report, report_page
from jaxdpo.data.inspect.survey import Survey, Texts, read_texts, survey_tokens
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.prepare import Prepared, prepare
from jaxdpo.data.sources import read_set
from jaxdpo.data.tokenize import Encoder
from jaxdpo.data.tokenizer_json import Tokenizer, load_tokenizer
from jaxdpo.utils.console import stdout
from jaxdpo.utils.files import atomic_write
from jaxdpo.utils.html_report import Example

NO_LIMIT = 2**24
"""A data.max_length that truncates nothing: lengths are surveyed as they are."""
ANY_VOCABULARY = 2**31
"""No model is loaded, so every token id of the tokenizer is valid."""


def inspect_data(config: DataConfig) -> None:
    """Survey the sets, print the report, and write the page and the converted pairs.

    Raises:
        ValueError: a set, or the tokenizer, cannot be read, or no pair is usable.
        OSError: a file cannot be written.
    """
    tokenizer = None
    if config.model.path is not None:
        tokenizer = load_tokenizer(config.model.path, config.model.revision)
    section = dataclasses.replace(
        config.data,
        max_length=NO_LIMIT,
        max_prompt_length=NO_LIMIT // 2,
        packed_length=2 * NO_LIMIT,
    )
    spells_special = None
    if tokenizer is not None:
        spells_special = Encoder.create(tokenizer, section).spells_special
    texts = Texts(config.near, spells_special)
    survey, first = _read(config, texts)
    if tokenizer is None:
        examples = _text_examples(config, survey, first)
    else:
        done = prepare(section, tokenizer, vocab_size=ANY_VOCABULARY)
        survey = survey_tokens(survey, texts.odd_by_words(), done, _limits(config.data))
        examples = _token_examples(config, survey, done, tokenizer)
    if config.page is not None:
        with atomic_write(Path(config.page).expanduser()) as page:
            page.write(report_page(config, survey, examples))
    print_report(survey, examples, stdout())


def _read(config: DataConfig, texts: Texts) -> tuple[Survey, list[Preference]]:
    """Read all sets once: into `texts`, into the file `out`, and the first records to show."""
    first: list[Preference] = []
    with contextlib.ExitStack() as stack:
        out = None
        if config.out is not None:
            out = stack.enter_context(atomic_write(Path(config.out).expanduser()))

        def take(record: Preference) -> None:
            if len(first) < config.show:
                first.append(record)
            if out is not None:
                out.write(json.dumps(to_row(record), ensure_ascii=False) + "\n")

        survey = read_texts(config.data, texts, take)
        if not survey.parts:  # raised here, so that no empty file `out` appears
            print_report(survey, [], stdout())
            raise ValueError("no usable pair was found; the report above says what was dropped")
    return survey, first


def _limits(section: DataSection) -> tuple[int, int]:
    """data.max_length and data.max_prompt_length, for a model with enough positions."""
    length = section.max_length or max(DEFAULT_MAX_LENGTH, section.max_prompt_length + 1)
    return length, section.max_prompt_length


# --- pairs to show ---


def _text_examples(config: DataConfig, survey: Survey, first: list[Preference]) -> list[Example]:
    """The first pairs and the odd ones, as text."""
    all_turns = config.data.loss_turns == "all"
    examples = [example_of_record(record, "", all_turns) for record in first]
    reasons = _odd_reasons(config, survey)
    found: dict[str, Preference] = {}
    if reasons:  # texts are not kept, so the sets are read again
        for option, names in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            for name in names:
                _, records = read_set(name, config.data, option)
                found.update((record.id, record) for record in records if record.id in reasons)
    for name, why in reasons.items():
        examples.append(example_of_record(found[name], why, all_turns))
    return examples


def _token_examples(
    config: DataConfig, survey: Survey, done: Prepared, tokenizer: Tokenizer
) -> list[Example]:
    """The first pairs and the odd ones, as tokens; odd pairs that are dropped are not shown."""
    examples = []
    for number in range(min(config.show, len(done.train))):
        examples.append(example_of_tokens(done.train[number], tokenizer))
    reasons = _odd_reasons(config, survey)
    found: dict[str, EncodedPair] = {}
    for table in (done.train, done.eval):
        for number, name in enumerate(table.ids):
            if name in reasons:
                found[name] = table[number]
    for name, why in reasons.items():
        if name in found:
            examples.append(example_of_tokens(found[name], tokenizer, why))
    return examples


def _odd_reasons(config: DataConfig, survey: Survey) -> dict[str, str]:
    """Ids of the odd pairs to show, and what is odd about each."""
    reasons: dict[str, list[str]] = {}
    for item in survey.odd:
        for name in item.ids[: config.odd]:
            reasons.setdefault(name, []).append(item.kind)
    return {name: "; ".join(kinds) for name, kinds in reasons.items()}

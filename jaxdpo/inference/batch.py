"""Many prompts answered by several models, one in memory at a time; answers as rows and as text."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdpo.data.formats.preference import strings
from jaxdpo.distributed import sharding
from jaxdpo.inference.model import Answer, LoadedModel, Source
from jaxdpo.inference.options import GenerateConfig
from jaxdpo.inference.prompts import Prompt
from jaxdpo.utils.text import clean


def load(config: GenerateConfig, source: Source) -> LoadedModel:
    """Load one of the models.

    Raises:
        ValueError: it cannot be used.
    """
    mesh = sharding.make_mesh(config.mesh)
    dtype = config.model.compute_dtype
    if dtype == "auto":
        dtype = sharding.default_dtype(mesh)
    return LoadedModel.open(source, config.sampling, mesh, dtype)


def answer_all(
    config: GenerateConfig, prompts: Sequence[Prompt]
) -> Iterator[tuple[Prompt, dict[str, Answer]]]:
    """Each prompt with the models' answers, by the models' names.

    Raises:
        ValueError: a model or a prompt cannot be used.
    """
    by_model = {}
    for name, source in config.sources.items():
        by_model[name] = _answers_of(config, name, source, prompts)
    for number, prompt in enumerate(prompts):
        yield prompt, {name: answers[number] for name, answers in by_model.items()}


def _answers_of(
    config: GenerateConfig, name: str, source: Source, prompts: Sequence[Prompt]
) -> list[Answer]:
    """The answers of one model, which is freed on return."""
    label = clean(name)

    def report(done: int) -> None:
        print(f"{label}: {done} of {len(prompts)} prompts answered", file=sys.stderr)

    model = load(config, source)
    print(f"{label}: {clean(model.encoder.template_note)}", file=sys.stderr)
    if model.start_note is not None:
        print(f"{label}: {clean(model.start_note)}", file=sys.stderr)
    answers = model.answer(prompts, report=report)
    truncated = sum(answer.prompt_truncated for answer in answers)
    if truncated:
        print(
            f"{label}: {truncated} prompts lost their beginning (max_prompt_length)",
            file=sys.stderr,
        )
    return answers


def to_row(prompt: Prompt, answers: Mapping[str, Answer]) -> dict[str, Any]:
    """A line of the output file: the prompt, and each field of the answer.

    A field is a plain value for one model, and an object with a value for each of several.
    """
    row: dict[str, Any] = {}
    if isinstance(prompt.text, str):
        row["prompt"] = prompt.text
    else:
        row["prompt"] = [turn.fields for turn in prompt.text]
    for key in Answer._fields:
        values = {name: getattr(answer, key) for name, answer in answers.items()}
        row[key] = values if len(values) > 1 else next(iter(values.values()))
    return row


def show(prompt: Prompt, answers: Mapping[str, Answer]) -> None:
    """Print a prompt and its answers."""
    for text in strings(prompt.text):
        for line in text.split("\n"):
            print(clean(f"> {line}"))
    for name, answer in answers.items():
        label = f"[{name}] " if len(answers) > 1 else ""
        print(clean(label + answer.text.strip()) + "\n")

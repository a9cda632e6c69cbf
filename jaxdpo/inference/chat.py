"""A chat in the terminal with one model, or with several that are asked the same questions."""

from collections.abc import Iterator, Mapping

from jaxdpo.data.formats.preference import Message, Turns
from jaxdpo.inference.model import LoadedModel
from jaxdpo.inference.prompts import Prompt
from jaxdpo.utils.text import clean, is_unicode

NEW = "/new"
"""What a user types to start another conversation."""


def chat(models: Mapping[str, LoadedModel], seed: int) -> None:
    """Ask and answer until Ctrl-D or Ctrl-C; each model's history holds its own answers."""
    names = ", ".join(map(clean, models))
    print(f"{names}: say something. {NEW} starts another conversation; Ctrl-D ends.")
    histories: dict[str, Turns] = dict.fromkeys(models, ())
    try:
        for number, line in enumerate(_lines()):
            if line.strip() == NEW:
                histories = dict.fromkeys(models, ())
                continue
            for name, model in models.items():
                label = f"[{name}] " if len(models) > 1 else ""
                # One more for each line, so that a question asked twice is not answered the same.
                histories[name] = _answer(model, histories[name], line, label, seed + number)
    except KeyboardInterrupt:
        print()


def _lines() -> Iterator[str]:
    """The lines that the user types, without empty ones."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def _answer(model: LoadedModel, history: Turns, line: str, label: str, seed: int) -> Turns:
    """Answer one line; returns the history with both, or as it was if there is no answer."""
    if not is_unicode(line):
        print("that is not valid Unicode")
        return history
    conversation = (*history, Message("user", line))
    is_text = model.encoder.strings in ("verbatim", "templated")
    text = line if is_text else conversation
    try:
        prompt = Prompt(text, "that cannot be answered")
        (answer,) = model.answer([prompt], seed=seed % (1 << 32))
    except ValueError as error:
        print(f"{label}{clean(str(error))}")
        return history
    reply = answer.text.strip()
    print(clean(label + reply))
    if answer.prompt_truncated:
        print(
            f"{label}(this conversation is longer than the model's context: "
            f"its beginning is cut off. {NEW} starts another)"
        )
    return (*conversation, Message("assistant", reply))

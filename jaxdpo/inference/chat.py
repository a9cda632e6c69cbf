"""A conversation in the terminal with one model, or with several that hear the same questions."""

from collections.abc import Iterator, Mapping

from jaxdpo.data.formats.preference import Message, Turns
from jaxdpo.inference.model import LoadedModel
from jaxdpo.inference.prompts import Prompt
from jaxdpo.utils.text import clean, is_unicode

NEW = "/new"


def converse(models: Mapping[str, LoadedModel], seed: int) -> None:
    """Ask, answer, and so on until Ctrl-D or Ctrl-C. Each model remembers what was said and what it answered itself."""
    print(
        f"{', '.join(map(clean, models))}: say something. {NEW} forgets what was said; Ctrl-D ends."
    )
    histories: dict[str, Turns] = dict.fromkeys(models, ())
    try:
        for number, line in enumerate(_lines()):
            if line.strip() == NEW:
                histories = dict.fromkeys(models, ())
                continue
            for name, model in models.items():
                histories[name] = _turn(
                    model,
                    histories[name],
                    line,
                    f"[{name}] " if len(models) > 1 else "",
                    seed + number,
                )
    except KeyboardInterrupt:
        print()


def _lines() -> Iterator[str]:
    """What the user types, empty lines left out."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def _turn(model: LoadedModel, history: Turns, line: str, label: str, seed: int) -> Turns:
    """Answer one line; returns what was said by then, which a line that cannot be answered is no part of."""
    if not is_unicode(line):
        print("that is not valid Unicode")
        return history
    asked = (*history, Message("user", line))
    verbatim = not model.source.strings_are_messages
    try:
        (answer,) = model.answer(
            [Prompt(line if verbatim else asked, "that cannot be answered")], seed=seed % (1 << 32)
        )
    except ValueError as error:
        print(f"{label}{clean(str(error))}")
        return history
    print(clean(label + answer.text.strip()))
    if answer.prompt_truncated:
        print(
            f"{label}(this conversation is longer than the model can take: its beginning is forgotten. {NEW} starts another)"
        )
    return (*asked, Message("assistant", answer.text.strip()))

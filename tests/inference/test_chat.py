"""The chat in the terminal: `python -m jaxdpo.generate` without prompts."""

import builtins
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxdpo import generate
from tests.inference.models import STOP, greedy, words, write_chat_model
from tests.tiny import mesh


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command uses one of the eight devices."""
    one = mesh()
    monkeypatch.setattr("jaxdpo.distributed.sharding.make_mesh", lambda *_: one)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    write_chat_model(folder)
    return folder


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Type these lines in a terminal; an exception is what a key does."""

    def types(*lines: str | type[BaseException]) -> None:
        typed = iter(lines)

        def read(prompt: str) -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr(builtins, "input", read)

    return types


def test_a_chat_remembers_until_new_starts_another(
    chatty: Path, say: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    say("w5 w9", "", "w7 <|stop|>", "w8", "/new", "w8")
    assert (
        generate.main([f"model.path={chatty}", "max_new_tokens=5", "compilation_cache=null"]) == 0
    )
    first = greedy(1, [61, 5, 9, 62], stop_ids=(0, STOP))
    kept = [i for i in first if i not in (0, STOP)]
    second = greedy(1, [61, 5, 9, 62, *kept, STOP, 61, 8, 62], stop_ids=(0, STOP))
    anew = greedy(1, [61, 8, 62], stop_ids=(0, STOP))
    printed = capsys.readouterr().out.strip().split("\n")[1:]
    answers = [words(i for i in ids if i not in (0, STOP)) for ids in (first, second, anew)]
    assert printed == [
        answers[0],
        "that cannot be answered: text spells a special token of the chat template",
        *answers[1:],
    ]


def test_ctrl_c_ends_a_chat(
    chatty: Path, say: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    say("w5", KeyboardInterrupt)
    assert (
        generate.main([f"model.path=[{chatty}]", "max_new_tokens=5", "compilation_cache=null"]) == 0
    )
    assert "Traceback" not in capsys.readouterr().err

"""Helpers: a command line of jaxdpo.train, and what a wrong one is answered."""

import pytest

from jaxdpo.config import cli
from jaxdpo.config.cross_checks import cross_check
from jaxdpo.config.schema import Config
from jaxdpo.losses.rules import check

NEEDED = ["model.path=m", "data.train=[a]"]


def load(*words: str) -> Config:
    config, given_flags = cli.load(Config, words, command="train", checks=[cross_check])
    assert given_flags <= {"--config"}
    return config


def complaints(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What a wrong command line is told, one item a problem."""
    with pytest.raises(SystemExit) as ended:
        cli.load(
            Config,
            words,
            command="train",
            checks=[cross_check, lambda config: check(config.loss, config.reference)],
        )
    out = capsys.readouterr()
    assert ended.value.code == 2 and not out.out
    first, *problems, last = out.err.rstrip("\n").split("\n")
    assert first == f"jaxdpo.train: {len(problems)} wrong option{'s' * (len(problems) != 1)}:"
    assert last == "`python -m jaxdpo.train --help` lists all."
    return [problem.strip() for problem in problems]

"""The console script `jaxdpo COMMAND ...` and `python -m jaxdpo COMMAND ...`."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxdpo import __version__
from jaxdpo.__main__ import COMMANDS, main
from tests.house import ROOT


def test_every_command_is_listed_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = {path.stem for path in (ROOT / "jaxdpo").glob("*.py") if path.stem[0] != "_"}
    rooms = {path.parent.name for path in (ROOT / "jaxdpo").glob("*/__main__.py")}
    assert set(COMMANDS) == files | rooms
    for name, summary in COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [name]] == [f"  {name:10} {summary}"]
    assert max(map(len, lines)) <= 100


# Other tests have imported the commands already, which runpy warns about and a process never sees.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_exits_0(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["jaxdpo"])
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"python -m jaxdpo.{name} ")


def test_an_unknown_command_is_exit_code_2_with_the_nearest_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["trian", "seed=1"]) == 2
    assert capsys.readouterr().err == (
        "jaxdpo: trian: there is no such command. Did you mean train?\n"
    )
    assert main(["xyz"]) == 2
    assert "Commands: train, data, generate" in capsys.readouterr().err
    assert main([]) == 2 and "jaxdpo COMMAND" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"jaxdpo {__version__}\n"


def test_the_console_script_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"jaxdpo": "jaxdpo.__main__:main"}


def test_the_process_imports_only_the_chosen_command(tmp_path: Path) -> None:
    """The list of commands starts without JAX, and exit codes and options reach the command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "jaxdpo", "--help"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert listed.returncode == 0 and "jaxdpo" in listed.stderr
    assert " jax\n" not in listed.stderr and "numpy" not in listed.stderr
    chosen = subprocess.run(
        [sys.executable, "-m", "jaxdpo", "export", "dtyp=float32"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert chosen.returncode == 2 and "Did you mean dtype?" in chosen.stderr

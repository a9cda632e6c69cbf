"""SIGTERM and Ctrl-C while the command still imports."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdpo.utils.early_signals import SIGNALS
from tests.house import ROOT

COMMANDS = {"module": ["jaxdpo.train"], "console script": ["jaxdpo", "train"]}
SLOW = """
import time
print("importing", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("slow", ["jax", "numpy"])
def test_sigterm_while_python_imports_is_exit_code_75(
    tmp_path: Path, command: str, number: signal.Signals, slow: str
) -> None:
    """A package of this name takes a minute to import, as on a cold disk of the network."""
    (tmp_path / f"{slow}.py").write_text(SLOW)
    with subprocess.Popen(
        [sys.executable, "-m", *COMMANDS[command], "run_dir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "importing\n", process.stderr.read()
        process.send_signal(number)
        assert process.wait(20) == 75
        assert "nothing to save" in process.stderr.read()
    assert not (tmp_path / "run").exists()

"""What the tests of launch/ share: its folder, and programs that may be installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def tool(name: str, package: str) -> str:
    """The path of a program; skips the test where it is not installed."""
    folders = f"{os.environ.get('JAXDPO_LAUNCH_TOOLS', '')}/bin:{os.environ['PATH']}"
    found = shutil.which(name, path=folders)
    if found is None:
        pytest.skip(f"{name} is not installed ({package})")
    return found


def run(*words: object, **variables: str) -> str:
    """The output of a command, which must succeed."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | variables
    done = subprocess.run(
        [str(word) for word in words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

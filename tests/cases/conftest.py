"""The folder of cases beside the real data, and their models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cases(real_data: Path) -> Path:
    folder = real_data.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def home(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cases' tiny models in models/."""
    folder = tmp_path_factory.mktemp("cases")
    environment = {**os.environ, "PYTHONPATH": str(cases / "_models")}
    for name in ("mk.py", "mk2.py", "mk3.py"):
        # mk2 ends with models that need torch, which no case names.
        subprocess.run(
            [sys.executable, "-B", str(cases / "_models" / name)],
            cwd=folder,
            env=environment,
            capture_output=True,
        )
    assert (folder / "models/leftover2").is_dir() and (folder / "models/named").is_dir()
    return folder

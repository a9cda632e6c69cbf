"""Peak memory: loading holds the model once, exports a small part of it.

Measured in processes of their own (tests/memory.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdpo.models.hf.config_json import load_model_config
from tests.memory import model_mib

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc"
    ),
]
ROOT = Path(__file__).parents[3]
ROOM = 150.0
"""MiB for what does not grow with the model: compiled programs, allocator, pages of libraries."""


def measured(what: str, folder: Path) -> float:
    """MiB."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.memory", what, str(folder)],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])["peak"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("memory")
    measured("make", made)
    return made


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_a_sharded_load_holds_the_model_once(folder: Path, axis: str) -> None:
    model = model_mib(load_model_config(folder / "model"))
    assert model > 4 * ROOM
    assert model < measured(f"load {axis}", folder) < model + ROOM


@pytest.mark.parametrize("form", ["full", "merged", "adapter"])
def test_an_export_holds_a_part_of_the_model(folder: Path, form: str) -> None:
    """The largest weight, the token embedding, is a tenth of the model: 62 MiB, 31 in the file."""
    model = model_mib(load_model_config(folder / "model"))
    assert measured(f"export {form}", folder) < 62 + 31 + ROOM + 20 < 0.45 * model

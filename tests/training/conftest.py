"""What the tests of runs have in common: a folder with inputs, and one device."""

from pathlib import Path

import pytest

from tests.runs import folder_with_inputs, use_one_device


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a module's runs."""
    return folder_with_inputs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """See use_one_device."""
    use_one_device(monkeypatch)

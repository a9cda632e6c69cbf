"""Pushing a folder to the Hugging Face hub: private unless asked otherwise, with a token from the environment alone."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from jaxdpo.models.hf.folder import read_json

TOKEN = "HF_TOKEN"
"""The environment variable that has the token; nothing ever shows its value."""
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model's repository on the hub."""

    name: str
    """owner/name."""
    private: bool

    def problems(self) -> list[str]:
        """What is wrong before the hub is asked, as messages."""
        checks = [
            (
                _REPO.fullmatch(self.name) is not None,
                f"push_to={self.name}: is no name of a model on the hub. Write owner/name",
            ),
            (
                bool(os.environ.get(TOKEN)),
                f"push_to={self.name}: needs a token of the hub that may write. Set {TOKEN} in the environment",
            ),
        ]
        return [message for ok, message in checks if not ok]

    def check(self) -> None:
        """Ask the hub whether it is there and takes the token, and make sure that what is to be private will be.

        Raises:
            ValueError: why not.
        """
        with self._refusals():
            is_private = self._is_private()
        if self.private and is_private is False:
            raise ValueError(
                f"push_to={self.name}: is there and public, for all to see. Set private=false, or name another"
            )

    def _is_private(self) -> bool | None:
        """None: it does not exist."""
        try:
            return bool(self._api().repo_info(self.name).private)
        except RepositoryNotFoundError:
            return None

    def push(self, folder: Path, files: Sequence[Path]) -> str:
        """Push these files of a folder, in one commit; returns where they are then.

        Raises:
            ValueError: the hub cannot be reached or does not take them.
        """
        names = [str(path.relative_to(folder)) for path in files]
        with self._refusals():
            url = self._api().create_repo(self.name, private=self.private, exist_ok=True)
        self.check()  # an older repository keeps the visibility that it has
        with self._refusals():
            self._api().upload_folder(
                repo_id=self.name,
                folder_path=folder,
                allow_patterns=names,
                commit_message="Upload by jaxdpo",
            )
        return str(url)

    def _api(self) -> HfApi:
        return HfApi(token=os.environ[TOKEN])

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Errors of the hub's library as one line of text, without the request that they carry."""
        try:
            yield
        except (OSError, ValueError, HTTPError) as error:
            reason = str(error).strip().split("\n")[0].replace(os.environ[TOKEN], "***")
            raise ValueError(
                f"push_to={self.name}: the hub cannot be reached or refuses ({type(error).__name__}: {reason})"
            ) from None


def fetch_model(name: str, revision: str | None) -> Path:
    """Fetch config, weights and tokenizer of a hub model into the hub's cache, and return their folder.

    Raises:
        ValueError: the hub cannot be reached and the cache does not hold it, or there is no such model.
    """
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
    twice = ["original/*", "consolidated*"]  # the same weights in another form
    with _hub_errors(name):
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=twice
            )
        )


def fetch_config(name: str, revision: str | None) -> dict[str, Any]:
    """The parsed config.json of a hub model, and nothing else of it.

    Raises:
        ValueError: the hub cannot be reached and the cache does not hold it, or there is no such model.
    """
    with _hub_errors(name):
        return read_json(Path(hf_hub_download(name, "config.json", revision=revision)))


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Errors of the hub as errors of model.path."""
    try:
        yield
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are of these kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model.path={name}: neither a folder here nor a model that the hub gives ({reason})"
        ) from None

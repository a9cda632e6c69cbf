"""The Hugging Face hub, both ways: fetching a model's files, and pushing an exported folder.

A push creates a private repository unless asked otherwise, with a token from the environment only.
"""

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
"""The environment variable with the token; its value is never shown."""
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Config, weights and tokenizer: no pickles, no code."""
_DUPLICATES = ("original/*", "consolidated*")
"""Meta's and Mistral's repositories have the same weights a second time in their own form."""


# ---- fetching -----------------------------------------------------------------------------------


def fetch_model(name: str, revision: str | None) -> Path:
    """Fetch config, weights and tokenizer of a hub model into the hub's cache, and return their
    folder.

    Raises:
        ValueError: the hub cannot be reached and the cache lacks the model, or there is no such
            model.
    """
    with _fetch_errors(name):
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_FETCHED),
            ignore_patterns=list(_DUPLICATES),
        )
    return Path(folder)


def fetch_config(name: str, revision: str | None) -> dict[str, Any]:
    """The parsed config.json of a hub model; nothing else is fetched.

    Raises:
        ValueError: the hub cannot be reached and the cache lacks the file, or there is no such
            model.
    """
    with _fetch_errors(name):
        return read_json(Path(hf_hub_download(name, "config.json", revision=revision)))


@contextlib.contextmanager
def _fetch_errors(name: str) -> Iterator[None]:
    """Errors of the hub as errors of model.path."""
    try:
        yield
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are subclasses of these
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model.path={name}: is neither a local folder nor a model on the hub that can be "
            f"fetched ({reason})"
        ) from None


# ---- pushing ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model's repository on the hub."""

    name: str
    """owner/name."""
    private: bool

    def problems(self) -> list[str]:
        """What is wrong before the hub is asked, as messages."""
        problems = []
        if _REPO.fullmatch(self.name) is None:
            problems.append(
                f"push_to={self.name}: is no name of a model on the hub. Write owner/name"
            )
        if not os.environ.get(TOKEN):
            problems.append(
                f"push_to={self.name}: needs a token of the hub that may write. "
                f"Set {TOKEN} in the environment"
            )
        return problems

    def check(self) -> None:
        """Make sure that the hub accepts the token, and that what is to be private will be.

        Raises:
            ValueError: why not.
        """
        with self._push_errors():
            is_private = self._is_private()
        if self.private and is_private is False:
            raise ValueError(
                f"push_to={self.name}: exists and is public. Set private=false, or name another"
            )

    def _is_private(self) -> bool | None:
        """None: it does not exist."""
        try:
            return bool(self._api().repo_info(self.name).private)
        except RepositoryNotFoundError:
            return None

    def push(self, folder: Path, files: Sequence[Path]) -> str:
        """Push these files of a folder, in one commit; returns the repository's address.

        Raises:
            ValueError: the hub cannot be reached or refuses them.
        """
        names = [str(path.relative_to(folder)) for path in files]
        with self._push_errors():
            url = self._api().create_repo(self.name, private=self.private, exist_ok=True)
        self.check()  # a repository that existed before keeps its visibility
        with self._push_errors():
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
    def _push_errors(self) -> Iterator[None]:
        """Errors of the hub's library as one line of text, without the token."""
        try:
            yield
        except (OSError, ValueError, HTTPError) as error:
            reason = str(error).strip().split("\n")[0].replace(os.environ[TOKEN], "***")
            raise ValueError(
                f"push_to={self.name}: the hub cannot be reached or refuses "
                f"({type(error).__name__}: {reason})"
            ) from None

"""Pushing a folder to the Hugging Face hub: private unless asked otherwise, with a token from the environment alone."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

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

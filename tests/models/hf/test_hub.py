"""Pushing to the hub, with a fake hub."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from jaxdpo import export
from jaxdpo.models.hf import hub
from jaxdpo.models.hf.hub import HubModel
from tests.test_export import run_dir as run_dir  # the fixture

SECRET = "hf_secretsecretsecret"


class NotFound(RepositoryNotFoundError):
    """The hub's answer, without the request that it was for."""

    def __init__(self) -> None:
        """Nothing is there."""
        Exception.__init__(self, "404 Client Error")


class FakeApi:
    """A hub that knows one repository, or none, and notes what it is asked."""

    def __init__(self, repos: dict[str, bool], failure: Exception | None = None):
        """Repositories as name -> private; a failure is raised by every request."""
        self.repos, self.failure, self.calls = repos, failure, []
        self.pushed: dict[str, list[str]] = {}

    def __call__(self, token: str) -> "FakeApi":
        """What the class is to the code under test."""
        assert token == SECRET
        return self

    def request(self, name: str) -> None:
        self.calls.append(name)
        if self.failure is not None:
            raise self.failure

    def repo_info(self, repo: str) -> Any:
        self.request("repo_info")
        if repo not in self.repos:
            raise NotFound
        return SimpleNamespace(private=self.repos[repo])

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        self.request("create_repo")
        assert exist_ok
        self.repos.setdefault(repo, private)
        return f"https://hub/{repo}"

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> None:
        self.request("upload_folder")
        assert commit_message and all((folder_path / name).is_file() for name in allow_patterns)
        self.pushed[repo_id] = allow_patterns


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi({})
    monkeypatch.setenv(hub.TOKEN, SECRET)
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


def run_export(run: Path, out: Path, *more: str) -> int:
    return export.main([f"run_dir={run}", f"out={out}", "push_to=me/mine", *more])


def test_what_is_pushed_is_listed_first_and_private(
    run_dir: Path, tmp_path: Path, api: FakeApi, capsys: pytest.CaptureFixture
) -> None:
    printed_before_upload = []
    upload = api.upload_folder
    api.upload_folder = lambda **given: (
        printed_before_upload.append(capsys.readouterr().out),
        upload(**given),
    )  # type: ignore[method-assign]
    assert run_export(run_dir, tmp_path / "out") == 0
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert api.repos == {"me/mine": True} and sorted(api.pushed["me/mine"]) == sorted(files)
    (told,) = printed_before_upload
    assert all(f"{size:,}  {tmp_path / 'out' / name}" in told for name, size in files.items())
    assert (
        f"pushing these {len(files)} files, {sum(files.values()):,} bytes, to me/mine (private)"
        in told
    )
    output = capsys.readouterr()
    assert "https://hub/me/mine" in output.out and SECRET not in told + output.out + output.err


def test_public_only_when_asked(run_dir: Path, tmp_path: Path, api: FakeApi) -> None:
    assert run_export(run_dir, tmp_path / "out", "private=false") == 0
    assert api.repos == {"me/mine": False}


def test_a_repository_that_is_public_already_is_refused(
    run_dir: Path, tmp_path: Path, api: FakeApi, capsys: pytest.CaptureFixture
) -> None:
    """The hub keeps the visibility of what exists, whatever a push asks for."""
    api.repos["me/mine"] = False
    assert run_export(run_dir, tmp_path / "out") == 1
    assert "push_to=me/mine: exists and is public. Set private=false" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not api.pushed
    with pytest.raises(
        ValueError, match="exists and is public"
    ):  # also one that appears between the check and the push
        HubModel(name="me/mine", private=True).push(tmp_path, [])
    assert not api.pushed


OFFLINE = OfflineModeIsEnabled("Cannot reach https://hub/api: offline mode is enabled.")


@pytest.mark.parametrize(
    "failure",
    [OFFLINE, HTTPError("[Errno -2] Name or service not known"), TimeoutError("timed out")],
)
def test_without_a_network_nothing_is_exported(
    run_dir: Path, tmp_path: Path, api: FakeApi, failure: Exception, capsys: pytest.CaptureFixture
) -> None:
    api.failure = failure
    assert run_export(run_dir, tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert (
        f"push_to=me/mine: the hub cannot be reached or refuses ({type(failure).__name__}" in told
        and "Traceback" not in told
    )
    assert not (tmp_path / "out").exists() and api.calls == ["repo_info"]


def test_the_folder_stays_when_the_push_fails(
    run_dir: Path, tmp_path: Path, api: FakeApi, capsys: pytest.CaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(f"403 Forbidden: {SECRET} may not write\nRequest ID: 7")

    api.upload_folder = refuse  # type: ignore[method-assign]
    assert run_export(run_dir, tmp_path / "out") == 1
    output = capsys.readouterr()
    assert (
        "403 Forbidden: *** may not write" in output.err and SECRET not in output.out + output.err
    )
    assert (
        f"The folder is complete. To push it later: hf upload me/mine {tmp_path / 'out'} --private"
        in output.err
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "token", "complaint"),
    [("mine", SECRET, "is no name of a model"), ("me/mine", "", "Set HF_TOKEN")],
)
def test_a_wrong_name_and_a_missing_token_are_refused_first(
    run_dir: Path,
    tmp_path: Path,
    api: FakeApi,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    name: str,
    token: str,
    complaint: str,
) -> None:
    monkeypatch.setenv(hub.TOKEN, token)
    with pytest.raises(SystemExit) as exit_:
        export.main([f"run_dir={run_dir}", f"out={tmp_path / 'out'}", f"push_to={name}"])
    assert exit_.value.code == 2 and complaint in capsys.readouterr().err
    assert not api.calls and not (tmp_path / "out").exists()

"""Object stores and web pages where a file or folder of this machine is wanted."""

import pytest

from jaxdpo import export, generate, plan, preflight, train
from jaxdpo.config.addresses import remote_paths
from jaxdpo.data import __main__ as data_command

COMMANDS = {
    "train": (train.main, ["data.train=[pairs.jsonl]", "model.path=m", "run_dir={}"]),
    "train model": (train.main, ["data.train=[pairs.jsonl]", "model.path={}"]),
    "train data": (train.main, ["data.train=[pairs.jsonl,{}]", "model.path=m"]),
    "train adapter": (train.main, ["data.train=[a]", "model.path=m", "lora.path={}"]),
    "train cache": (train.main, ["data.train=[a]", "model.path=m", "train.compilation_cache={}"]),
    "preflight": (preflight.main, ["data.train=[pairs.jsonl]", "model.path=m", "run_dir={}"]),
    "plan": (plan.main, ["data.train=[pairs.jsonl]", "model.path={}", "topology=v5e-8"]),
    "export": (export.main, ["run_dir={}", "out=out"]),
    "export out": (export.main, ["run_dir=run", "out={}"]),
    "generate": (generate.main, ["model.path={}", "prompts=[Who are you?]"]),
    "generate prompts": (generate.main, ["model.path=m", "prompts={}"]),
    "data": (data_command.main, ["data.train=[{}]"]),
}


@pytest.mark.parametrize(
    "address",
    [
        "gs://bucket/run",
        pytest.param("s3://bucket/run", marks=pytest.mark.slow),
        pytest.param("hf://owner/name", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_addresses_are_refused_at_once_by_every_command(
    command: str,
    address: str,
    tmp_path: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(str(tmp_path))
    main, words = COMMANDS[command]
    with pytest.raises(SystemExit) as ended:
        main([word.format(address) for word in words])
    assert ended.value.code == 2
    assert f"={address}: is an address, and only files and folders of this machine" in (
        capsys.readouterr().err
    )


def test_what_is_no_address_passes() -> None:
    some = {
        "run_dir": "runs/dpo",
        "model": {"path": "owner/name", "revision": None},
        "data": {"train": ["C:/pairs.jsonl", "a:b.jsonl"], "eval": []},
        "seed": 3,
        "prompts": ["https://example.com is what?", "https://example.com"],
        "note": "see https://example.com",
    }
    assert remote_paths(some) == []


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("gs:/bucket/run", "for a bucket: gcsfuse"),
        ("https://example.com/pairs.jsonl", "copy it"),
        ("abfs://container@account/run", "Mount it"),
        ("file:///home/me/run", "Write the path: /home/me/run"),
        ("FILE:/home/me/run", "Write the path: /home/me/run"),
    ],
)
def test_each_address_says_what_to_write_instead(address: str, remedy: str) -> None:
    (problem,) = remote_paths({"data": {"train": ["pairs.jsonl", address]}})
    assert problem.startswith(f"data.train={address}: is an address") and remedy in problem

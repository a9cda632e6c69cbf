"""Commands as users type them, for the tests of their cases."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SHORT_RUN = ("eval.every=0", "data.eval_fraction=0", "log.tensorboard=false")


class Done(NamedTuple):
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


def run(
    home: Path,
    command: str,
    *words: str | Path,
    env: dict[str, str] | None = None,
    limit: int = 180,
) -> Done:
    """Run `python -m jaxdpo.<command>` in the folder with the models."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    environment.pop("XLA_FLAGS", None)
    environment["JAX_NUM_CPU_DEVICES"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", f"jaxdpo.{command}", *map(str, words)],
        cwd=home,
        env=environment,
        capture_output=True,
        timeout=limit,
        encoding="utf-8",
        errors="replace",
    )
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return Done(done.returncode, done.stdout, done.stderr)


def data(home: Path, file: Path, *words: str, model: str = "models/chatml") -> Done:
    return run(home, "data", f"data.train=[{file}]", f"model.path={model}", "near=0", *words)


def converted(home: Path, tmp_path: Path, file: Path, *words: str) -> list[dict]:
    """The pairs of a file, as jaxdpo reads them."""
    out = tmp_path / f"{file.stem}-{len(words)}.jsonl"
    done = data(home, file, f"out={out}", *words)
    assert done.code == 0, done.said
    return [json.loads(line) for line in out.read_text().splitlines()]


def text(value: object) -> str:
    """All text of a prompt or an answer, in its order."""
    if isinstance(value, str):
        return value
    assert isinstance(value, list)
    return "\n".join(message["content"] for message in value)


def answers(cases: Path) -> tuple[set[str], set[str]]:
    """The good and the bad answers that all cases are made of."""
    rows = [json.loads(line) for line in (cases / "chat/chat.jsonl").read_text().splitlines()]
    return {text(row["chosen"]) for row in rows}, {text(row["rejected"]) for row in rows}


def check_pairs(cases: Path, rows: Sequence[dict], count: int) -> None:
    """The good answer is chosen in each row."""
    good, bad = answers(cases)
    assert len(rows) == count
    for row in rows:
        assert any(answer in text(row["chosen"]) for answer in good), row
        assert any(answer in text(row["rejected"]) for answer in bad), row


def train(home: Path, run_dir: Path, file: Path, *words: str) -> Done:
    return run(
        home,
        "train",
        f"run_dir={run_dir}",
        "model.path=models/chatml",
        f"data.train=[{file}]",
        *words,
    )

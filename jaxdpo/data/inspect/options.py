"""The options of `python -m jaxdpo.data`."""

import dataclasses
from pathlib import Path

from jaxdpo.config.data_options import DataSection
from jaxdpo.config.sections import section
from jaxdpo.data.inspect.near_duplicates import DEFAULT_THRESHOLD, MIN_THRESHOLD
from jaxdpo.data.inspect.survey import MAX_NAMED
from jaxdpo.utils import html_report


@section
class TokenizerSection:
    """Whose tokens are counted."""

    path: str | None = None
    """Hugging Face folder or hub id with a tokenizer. Without it, lengths are in characters and no
    chat template is applied."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit. Default: the hub's main branch."""


@section
class DataConfig:
    """Look at preference data, or convert it."""

    data: DataSection = dataclasses.field(default_factory=DataSection)
    model: TokenizerSection = TokenizerSection()
    show: int = 3
    """Pairs to show: the first of data.train."""
    odd: int = 0
    """Odd pairs of each kind to show, not only to name: the longest, those truncated, ... At most
    5."""
    near: float = DEFAULT_THRESHOLD
    """Least Jaccard index of near-duplicates: share of common runs of three words, 0.6 to 1. 0: do
    not search for them."""
    page: str | None = None
    """HTML file to write the report and the shown pairs to. It must not exist, or be a page that
    was written before."""
    out: str | None = None
    """File to write the pairs of data.train to, as JSON lines of {prompt, chosen, rejected, weight,
    id, group}: group is the tree or post of a pair, which stays on one side of a split. It must not
    exist."""


def check(config: DataConfig) -> list[str]:
    """Problems of the options, as messages."""
    problems = []
    if not config.data.train:
        problems.append("data.train=[]: name at least one set, e.g. data.train=pairs.jsonl")
    if config.show < 0:
        problems.append(f"show={config.show}: must not be negative")
    if not 0 <= config.odd <= MAX_NAMED:
        problems.append(f"odd={config.odd}: must lie between 0 and {MAX_NAMED}")
    if config.near != 0 and not MIN_THRESHOLD <= config.near <= 1:
        problems.append(
            f"near={config.near}: must be 0 (no search) or lie between {MIN_THRESHOLD} and 1"
        )
    problems += _check_file("out", config.out)
    problems += _check_file("page", config.page)
    if config.page is not None and config.page == config.out:
        problems.append(f"page={config.page}: is the same file as out. Name two")
    return problems


def _check_file(option: str, name: str | None) -> list[str]:
    """Why a file cannot be written, as a message."""
    if name is None:
        return []
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        return [f"{option}={name}: there is no folder {path.parent}. Make it, or name another"]
    writable = html_report.may_write(path) if option == "page" else not path.exists()
    return [] if writable else [f"{option}={name}: exists. Name a new file, or remove it"]

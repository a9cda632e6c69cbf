"""The documentation agrees with the code: links, files and options exist, options.md is current."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import make_options
from jaxdpo.config.cli import fields
from jaxdpo.config.schema import Config

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "launch" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = "jaxdpo|tests|benchmarks|docs|launch|configs"
FILE_ENDINGS = (".py", ".md", ".json", ".jsonl", ".gz")
"""train.py and train.jsonl.gz are files, not options."""
TERMS = (
    "gradient accumulation",
    "global batch size",
    "data parallelism",
    "tensor parallelism",
    "context parallelism",
    "mixed precision",
    "weight decay",
    "packing",
    "prefix sharing",
    "offload",
    "preemption",
)


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    """Each page of the documentation."""
    return request.param


def test_the_generated_pages_are_up_to_date() -> None:
    assert list(make_options.outdated()) == [], "run `python docs/make_options.py`"


def test_an_outdated_page_is_found_and_written_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(make_options, "DOCS", tmp_path)
    for name in ("options.md", "from-trl.md"):
        (tmp_path / name).write_text((ROOT / "docs" / name).read_text())
    assert make_options.main(["--check"]) == 0
    (tmp_path / "options.md").write_text("old")
    assert make_options.main(["--check"]) == 1
    assert (tmp_path / "options.md").read_text() == "old"
    assert make_options.main([]) == 0
    assert make_options.main(["--check"]) == 0


def test_the_table_of_names_stays_between_its_marks() -> None:
    text = (ROOT / "docs" / "from-trl.md").read_text()
    assert text.index(make_options.BEGIN) < text.index(make_options.END)
    assert "| `lr` | `optim.learning_rate` |" in make_options.names_table(
        {"lr": "optim.learning_rate"}
    )
    assert "| `fp16` | not offered |" in make_options.names_table({"fp16": "not offered"})


def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(target)
    assert missing == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_files_that_are_named_exist(page: Path) -> None:
    pattern = rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]+\.(?:py|json|sh|yaml|md)\b"
    named = re.findall(pattern, page.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_modules_that_contributing_names_by_their_room_exist() -> None:
    package = ROOT / "jaxdpo"
    rooms = "|".join(path.name for path in package.iterdir() if path.is_dir())
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(rf"`((?:{rooms})/[\w/]+\.py)`", text)
    assert len(named) > 5
    assert [name for name in named if not (package / name).is_file()] == []


def test_options_that_are_named_exist(page: Path) -> None:
    options = {name for name, *_ in fields(Config)}
    sections = "|".join({name.partition(".")[0] for name in options if "." in name})
    text = page.read_text().split(make_options.BEGIN)[0]  # below are names of other frameworks
    named = re.findall(rf"(?<![\w./-])(?:{sections})\.[a-z][\w.]*\w", text)
    unknown = {name for name in named if name not in options}
    assert {name for name in unknown if not name.endswith(FILE_ENDINGS)} == set()


def test_commands_are_quoted_for_zsh_and_bash(page: Path) -> None:
    """zsh takes an unquoted [ for a pattern, and stops where no file matches it."""
    unquoted = [re.sub(r"\"[^\"]*\"|'[^']*'", "", line) for line in shell_lines(page)]
    assert [line for line in unquoted if re.search(r"[\[\]?*]", line)] == []


def shell_lines(page: Path) -> Iterator[str]:
    """The lines of a page's bash blocks, without comments."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines():
            yield re.sub(r"(^|\s)#.*$", "", line)


def test_prose_has_at_most_100_columns(page: Path) -> None:
    in_code, wide = False, []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            in_code = not in_code
        is_table = line.lstrip().startswith("|")
        if len(line) > 100 and not in_code and not is_table:
            wide.append(line)
    assert wide == []


def test_the_map_of_the_code_names_every_file_and_no_other() -> None:
    package = ROOT / "jaxdpo"
    named = files_of_the_map()
    assert {name for name in named if not (package / name).exists()} == set()
    folders = tuple(name for name in named if name.endswith("/"))
    files = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    missing = {name for name in files - named if not name.startswith(folders)}
    assert {name for name in missing if not name.endswith("__init__.py")} == set()


def files_of_the_map() -> set[str]:
    """The files, and folders with a final slash, in the first column of CONTRIBUTING's tables."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set()
    for room, rows in re.findall(r"^### `([\w/]+)/`.*?\n(.*?)(?=^##)", text, re.M | re.DOTALL):
        prefix = "" if room == "jaxdpo" else f"{room}/"
        for row in rows.splitlines():
            if row.startswith("| `"):
                names = re.findall(r"`([\w/]+(?:\.py|/))`", row.split("|")[1])
                named |= {prefix + name for name in names}
    return named


@pytest.mark.parametrize("term", TERMS)
def test_a_search_for_a_term_of_the_field_finds_its_explanation(term: str) -> None:
    """In a heading, or in bold where it is explained."""
    text = "\n".join(path.read_text() for path in PAGES)
    heading = rf"^#+ .*{term}"
    bold = rf"\*\*{term}s?\*\*"
    assert re.search(f"{heading}|{bold}", text, re.MULTILINE | re.IGNORECASE)

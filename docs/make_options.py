"""Writes docs/options.md, and the table of names in docs/from-trl.md, from the code.

python docs/make_options.py           write both files
python docs/make_options.py --check   write nothing; exit status 1 if a file is outdated
"""

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from jaxdpo.config.cli import fields, type_name
from jaxdpo.config.schema import Config

DOCS = Path(__file__).parent
BEGIN = "<!-- names: written by docs/make_options.py -->"
END = "<!-- end of names -->"
"""Around the table of names in docs/from-trl.md."""

INTRODUCTION = """# Options of `python -m jaxdpo.train`

Written by `python docs/make_options.py` from the schema (`jaxdpo/config/schema.py`).
`python -m jaxdpo.train --help` prints the same; the other commands have options of their own, see
their `--help`.

An option is written `section.field=value`, or in a file that `--config file.yaml` reads, as
`section:` with indented `field: value` lines; arguments override the file. Lists are written
`"data.train=[a,b]"`, one value bare. Options are checked before anything is loaded, and all errors
are reported at once. The default null means the default that the text names; an option that was set
but has no effect is an error.
"""


def options_page() -> str:
    """The text of options.md: a table for each section of the schema."""
    lines = [INTRODUCTION, "## The run", ""]
    sections = []
    general = []
    for name, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            sections.append((name, hint))
        else:
            general.append(name)
    lines += table(option for option in fields(Config) if option[0] in general)
    for name, section in sections:
        about = textwrap.fill(inspect.cleandoc(section.__doc__ or ""), 100)
        lines += [f"## {name}", "", about, ""]
        lines += table(option for option in fields(Config) if option[0].startswith(f"{name}."))
    return "\n".join(lines)


def table(options: Iterator[tuple[str, Any, Any, str]]) -> Iterator[str]:
    """The lines of a table of options (name, type, default, documentation)."""
    yield "| option | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, hint, default, doc in options:
        shown = yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
        yield f"| `{name}` | {escaped(type_name(hint))} | `{shown}` | {escaped(doc)} |"
    yield ""


def names_table(names: Mapping[str, str]) -> str:
    """The table of what other frameworks call an option, and what answers it here."""
    lines = ["", "| name elsewhere | here |", "|---|---|"]
    options = {name for name, *_ in fields(Config)}
    for name, answer in names.items():
        shown = f"`{answer}`" if answer in options else escaped(answer)
        lines.append(f"| `{name}` | {shown} |")
    return "\n".join([*lines, ""])


def escaped(text: str) -> str:
    """Text that a Markdown table shows as it is."""
    return text.replace("|", "\\|").replace("*", "\\*")


def outdated() -> dict[Path, str]:
    """What each file should hold, for the files that hold something else."""
    wanted = {DOCS / "options.md": options_page()}
    if importlib.util.find_spec("jaxdpo.config.foreign_names"):
        names = importlib.import_module("jaxdpo.config.foreign_names").FOREIGN_NAMES
        page = DOCS / "from-trl.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        wanted[page] = f"{before}{BEGIN}\n{names_table(names)}\n{END}{rest.partition(END)[2]}"
    stale = {}
    for path, text in wanted.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale[path] = text
    return stale


def main(arguments: list[str]) -> int:
    """Write or check the files; returns the exit status."""
    check = "--check" in arguments
    stale = outdated()
    for path, text in stale.items():
        if check:
            print(f"{path.name} is outdated: run `python docs/make_options.py`")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""The house rules, checked on the source: rooms and floors, heavy packages, sizes, docstrings.

Each rule is a function from the parsed package to a list of complaints, and is shown a package that
breaks it.
"""

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator

import pytest

from tests.house import ROOT, Modules, functions, imports, modules_of, own_imports, parse

FLOORS = [
    ["config", "utils"],
    ["distributed", "losses", "data.formats", "data", "data.inspect"],
    ["models", "models.hf"],
    ["checkpoints"],
    ["training"],
    ["inference", "planning"],
    ["commands"],
]
"""Rooms (folders of the package) from the ground up. A module imports from lower floors and from
its own, and rooms import each other in one direction only. Every file at the top of the package is
a command."""
MAX_FLOORS, MAX_ROOMS = 7, 25

HEAVY = {
    "orbax": "checkpoints.arrays",
    "tensorstore": "checkpoints.arrays",
    "tensorboardX": "training.metric_logger",
    "rich": "utils.console",
    "optax": "training.optim",
    "safetensors": "models.hf.safetensors_io",
    "transformers": "data.tokenizer_json",
    "datasets": "data.sources",
    "grain": "data.loader",
    "matplotlib": "utils.html_report",
}
"""The one module that may import a heavy package."""

DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "yaml": "pyyaml"}
"""Import names that differ from the name that pip knows."""


def room_of(name: str) -> str:
    """The innermost folder of a module; "commands" for files at the top and for __main__."""
    parts = name.split(".")
    return "commands" if len(parts) == 1 or parts[-1] == "__main__" else ".".join(parts[:-1])


def modules_by_room(modules: Modules) -> dict[str, list[str]]:
    """Modules of each room; a room's own docstring (its __init__) is not one."""
    rooms: dict[str, list[str]] = {}
    for name in modules:
        is_package = any(other.startswith(f"{name}.") for other in modules)
        if name and not is_package:
            rooms.setdefault(room_of(name), []).append(name)
    return rooms


def floor_of(room: str) -> int | None:
    for number, rooms in enumerate(FLOORS, start=1):
        if room in rooms:
            return number
    return None


def floors_are_kept(modules: Modules) -> list[str]:
    rooms = modules_by_room(modules)
    problems = [f"{room} has no floor: add it to FLOORS" for room in rooms if not floor_of(room)]
    for room, names in rooms.items():
        for name in names:
            for other in own_imports(modules, name):
                here, there = floor_of(room), floor_of(room_of(other))
                if here and there and there > here:
                    problems.append(f"{name} imports {other} from a higher floor")
    return problems


def rooms_import_in_one_direction(modules: Modules) -> list[str]:
    graph: dict[str, set[str]] = {}
    for room, names in modules_by_room(modules).items():
        if room != "commands":
            targets = {room_of(other) for name in names for other in own_imports(modules, name)}
            graph[room] = targets - {room}
    return [f"rooms import each other: {', '.join(found)}" for found in [cycle_in(graph)] if found]


def commands_have_a_main(modules: Modules) -> list[str]:
    problems = []
    for name in modules_by_room(modules).get("commands", []):
        if "main" not in {node.name for node in functions(modules[name])}:
            problems.append(f"{name} stands at the top and is no command: it has no function main")
    return problems


def generation_needs_no_training(modules: Modules) -> list[str]:
    found, new = set(), {"generate"} & modules.keys()
    while new:
        found |= new
        new = {other for name in new for other in own_imports(modules, name)} - found
    return [f"generate imports {name}" for name in sorted(found) if room_of(name) == "training"]


def there_are_no_cycles(modules: Modules) -> list[str]:
    found = cycle_in({name: own_imports(modules, name) for name in modules})
    return [f"import cycle among or below: {', '.join(found)}"] if found else []


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that are left when those that point nowhere are taken away again and again."""
    graph = dict(graph)
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    return sorted(graph)


def functions_import_nothing(modules: Modules) -> list[str]:
    return [
        f"{name}.{f.name} imports inside a function"
        for name, tree in modules.items()
        for f in functions(tree)
        if any(imports(f))
    ]


def heavy_packages_stay_in_one_module(modules: Modules) -> list[str]:
    used = {name: {item.split(".")[0] for item in imports(tree)} for name, tree in modules.items()}
    problems = [
        f"{name} imports {pkg}: only {HEAVY[pkg]} may"
        for name, pkgs in used.items()
        for pkg in pkgs & HEAVY.keys()
        if name != HEAVY[pkg]
    ]
    return problems + [
        f"{name} imports torch" for name, packages in used.items() if "torch" in packages
    ]


def imported_packages_are_declared(modules: Modules) -> list[str]:
    used = {(name, item.split(".")[0]) for name, tree in modules.items() for item in imports(tree)}
    foreign = {
        (name, package)
        for name, package in used
        if package not in sys.stdlib_module_names | {"jaxdpo"}
    }
    missing = [
        (name, package)
        for name, package in foreign
        if DISTRIBUTIONS.get(package, package) not in declared()
    ]
    return [
        f"{name} imports {package}, which pyproject.toml does not ask for"
        for name, package in missing
    ]


def declared_packages_are_imported(modules: Modules) -> list[str]:
    used = {item.split(".")[0] for tree in modules.values() for item in imports(tree)}
    return [
        f"pyproject.toml asks for {name}, which nothing imports"
        for name in declared() - {DISTRIBUTIONS.get(p, p) for p in used}
    ]


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {requirement.split(">")[0].strip() for requirement in project["dependencies"]}


def functions_are_short(modules: Modules) -> list[str]:
    lengths = [
        (f"{name}.{f.name}", (f.end_lineno or 0) - f.lineno + 1)
        for name, tree in modules.items()
        for f in functions(tree)
    ]
    return [
        f"{name} has {length} lines; the limit is 80" for name, length in lengths if length > 80
    ]


def what_is_public_is_documented(modules: Modules) -> list[str]:
    def missing(node: ast.AST, path: str) -> Iterator[str]:
        for item in getattr(node, "body", []):
            if isinstance(
                item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            ) and not item.name.startswith("_"):
                if not ast.get_docstring(item):
                    yield f"{path}.{item.name} has no docstring"
                if isinstance(item, ast.ClassDef):
                    yield from missing(item, f"{path}.{item.name}")

    undocumented = [
        f"{name or 'jaxdpo'} has no docstring"
        for name, tree in modules.items()
        if tree.body and not ast.get_docstring(tree)
    ]
    return undocumented + [text for name, tree in modules.items() for text in missing(tree, name)]


RULES = [
    floors_are_kept,
    rooms_import_in_one_direction,
    commands_have_a_main,
    generation_needs_no_training,
    there_are_no_cycles,
    functions_import_nothing,
    heavy_packages_stay_in_one_module,
    imported_packages_are_declared,
    declared_packages_are_imported,
    functions_are_short,
    what_is_public_is_documented,
]


@pytest.fixture(scope="module")
def package() -> Modules:
    return parse(ROOT / "jaxdpo")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Callable[[Modules], list[str]], package: Modules) -> None:
    problems = rule(package)
    assert not problems, "\n".join(["", *problems])


def test_the_house_is_small_enough_to_remember(package: Modules) -> None:
    commands = [name for name in package if "." not in name and room_of(name) == "commands"]
    assert len(FLOORS) <= MAX_FLOORS and len(modules_by_room(package)) <= MAX_ROOMS, commands


def test_no_source_file_has_more_than_400_lines() -> None:
    folders = ("jaxdpo", "tests", "benchmarks")
    sizes = {
        path: len(path.read_text().splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert [
        f"{path.relative_to(ROOT)} has {lines} lines"
        for path, lines in sizes.items()
        if lines > 400
    ] == []


BROKEN = [
    (
        floors_are_kept,
        {"losses__dpo": "from jaxdpo.models import decoder", "models__decoder": ""},
        "losses.dpo imports models.decoder from a higher floor",
    ),
    (
        floors_are_kept,
        {"models__decoder": "import jaxdpo.train", "train": ""},
        "models.decoder imports train from a higher floor",
    ),
    (floors_are_kept, {"attic__chest": ""}, "attic has no floor"),
    (
        rooms_import_in_one_direction,
        {
            "losses__dpo": "import jaxdpo.data.rows",
            "data__rows": "",
            "data__table": "from jaxdpo.losses import pairs",
            "losses__pairs": "",
        },
        "rooms import each other: data, losses",
    ),
    (commands_have_a_main, {"attic": "def run(): ..."}, "attic stands at the top"),
    (
        generation_needs_no_training,
        {
            "generate": "import jaxdpo.inference.model",
            "inference__model": "import jaxdpo.training.step",
            "training__step": "",
        },
        "generate imports training.step",
    ),
    (
        there_are_no_cycles,
        {"losses__a": "import jaxdpo.losses.b", "losses__b": "from jaxdpo.losses.a import x"},
        "losses.a, losses.b",
    ),
    (functions_import_nothing, {"losses": "def f():\n  if x:\n    import os"}, "losses.f"),
    (
        heavy_packages_stay_in_one_module,
        {"train": "import orbax.checkpoint"},
        "only checkpoints.arrays may",
    ),
    (heavy_packages_stay_in_one_module, {"train": "from torch import nn"}, "train imports torch"),
    (imported_packages_are_declared, {"train": "import requests"}, "train imports requests"),
    (
        declared_packages_are_imported,
        {"train": "import jax"},
        "asks for optax, which nothing imports",
    ),
    (functions_are_short, {"train": "def f():\n" + "  x\n" * 80}, "train.f has 81 lines"),
    (
        what_is_public_is_documented,
        {"train": '"""T."""\nclass A:\n  """A."""\n  def b(self): ...'},
        "train.A.b has no docstring",
    ),
    (what_is_public_is_documented, {"train": "x = 1"}, "train has no docstring"),
]


@pytest.mark.parametrize(("rule", "sources", "complaint"), BROKEN)
def test_a_broken_rule_is_found(
    rule: Callable[[Modules], list[str]], sources: dict[str, str], complaint: str
) -> None:
    assert any(complaint in problem for problem in rule(modules_of(**sources)))

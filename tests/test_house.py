"""The house rules, checked on the source: floors, rooms of heavy packages, sizes, docstrings, options that are read.

Each rule is a function from the parsed package to a list of complaints, and is shown a package that breaks it.
"""

import ast
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Modules = dict[str, ast.Module]

FLOORS = [
    [
        "hosts",
        "signals",
        "disk",
        "manifest",
        "sections",
        "config",
        "checks",
        "options",
        "sharding",
        "offload",
        "collectives",
        "products",
        "console",
        "report",
    ],
    ["pairs", "loss_functions", "losses", "logprobs", "optim"],
    ["models"],
    ["data"],
    [
        "flops",
        "answers",
        "step",
        "checkpoint",
        "metrics",
        "sampling",
        "judges",
        "evaluation",
        "reference",
        "watch",
    ],
    [
        "gate",
        "runweights",
        "settle",
        "program",
        "session",
        "runner",
        "dryrun",
        "train",
        "preflight",
        "runfolder",
        "modelcard",
        "hub",
        "export",
        "demo",
        "prefer",
        "compare",
        "generate",
        "loaded",
        "conversation",
        "planning",
        "plan",
        "pipeline",
    ],
]
"""A module imports from lower floors and from its own (a folder is one room; no cycles). A new module needs a place here."""

ROOMS = {
    "orbax": "checkpoint",
    "tensorstore": "checkpoint",
    "tensorboardX": "metrics",
    "rich": "console",
    "optax": "optim",
    "safetensors": "models.tensorfile",
    "transformers": "data.chat",
    "datasets": "data.sources",
    "grain": "data.loader",
    "matplotlib": "report",
}
"""The one module that may import a heavy package."""

DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "yaml": "pyyaml"}
"""Import names that differ from the name that pip knows."""


def parse(folder: Path) -> Modules:
    """Modules by name without the package's own: "", "config", "models.layers", ..."""
    trees = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        trees[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return trees


def imports(tree: ast.AST) -> Iterator[str]:
    """Everything that is imported, as dotted names; `from a import b` gives a.b, whether b is a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(modules: Modules, name: str) -> set[str]:
    """Modules of the package that a module imports."""
    dotted = (
        item.split(".")[1:] for item in imports(modules[name]) if item.split(".")[0] == "jaxdpo"
    )
    found = (
        next(
            (
                ".".join(parts[:n])
                for n in (len(parts), len(parts) - 1)
                if ".".join(parts[:n]) in modules
            ),
            "",
        )
        for parts in dotted
    )
    return set(found) - {"", name}


def floor_of(name: str) -> int | None:
    return next(
        (number for number, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms), None
    )


def floors_are_kept(modules: Modules) -> list[str]:
    names = [name for name in modules if name]
    problems = [
        f"{name} has no floor: add it to FLOORS" for name in names if floor_of(name) is None
    ]
    for name in names:
        for other in own_imports(modules, name):
            here, there = floor_of(name), floor_of(other)
            if here is not None and there is not None and there > here:
                problems.append(f"{name} imports {other} from a higher floor")
    return problems


def there_are_no_cycles(modules: Modules) -> list[str]:
    graph = {name: own_imports(modules, name) for name in modules}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    return [f"import cycle among or below: {', '.join(sorted(graph))}"] if graph else []


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def functions_import_nothing(modules: Modules) -> list[str]:
    return [
        f"{name}.{f.name} imports inside a function"
        for name, tree in modules.items()
        for f in functions(tree)
        if any(imports(f))
    ]


def heavy_packages_stay_in_their_rooms(modules: Modules) -> list[str]:
    used = {name: {item.split(".")[0] for item in imports(tree)} for name, tree in modules.items()}
    problems = [
        f"{name} imports {pkg}: only {ROOMS[pkg]} may"
        for name, pkgs in used.items()
        for pkg in pkgs & ROOMS.keys()
        if name != ROOMS[pkg]
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


def sections(config: ast.Module) -> dict[str, ast.ClassDef]:
    """The classes of options: by the name under which they hang in Config, and "config" itself."""
    classes = {node.name: node for node in config.body if isinstance(node, ast.ClassDef)}
    named = {
        name: classes[ast.unparse(kind)]
        for name, kind in fields(classes["Config"]).items()
        if ast.unparse(kind) in classes
    }
    return {**named, "config": classes["Config"]}


def fields(section: ast.ClassDef) -> dict[str, ast.expr]:
    """Name and type of the options of a section."""
    return {
        node.target.id: node.annotation
        for node in section.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def options_are_documented(modules: Modules) -> list[str]:
    def has_doc(body: list[ast.stmt], index: int) -> bool:
        after = body[index + 1] if index + 1 < len(body) else None
        return (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        )

    found = sections(modules["config"])
    return [
        f"{name}.{node.target.id} has no doc below it"
        for name, section in found.items()
        for index, node in enumerate(section.body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id not in found
        if not has_doc(section.body, index)
    ]


def read_attributes(tree: ast.AST, found: dict[str, ast.ClassDef]) -> set[tuple[str, str]]:
    """(section, attribute) pairs that a tree reads, from `x.section.attribute` or from a name that holds a section.

    A name holds a section where its annotation says so, or where it was assigned from `x.section` or from such a name.
    """
    holders = _annotated(tree, found) | {("config", "config")}
    assigned = [
        pair
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for pair in zip(_items(node.targets[0]), _items(node.value), strict=False)
    ]
    for _ in range(3):  # a name may be assigned from a name
        for target, value in assigned:
            holders |= {
                (_last(target), section) for name, section in holders if name == _last(value)
            }
            if isinstance(value, ast.Attribute) and value.attr in found:
                holders.add((_last(target), value.attr))
    reads = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            reads |= {
                (section, node.attr) for name, section in holders if name == _last(node.value)
            }
            if isinstance(node.value, ast.Attribute) and node.value.attr in found:
                reads.add((node.value.attr, node.attr))
    return reads


def _annotated(tree: ast.AST, found: dict[str, ast.ClassDef]) -> set[tuple[str, str]]:
    """(name, section) of every argument and attribute whose annotation names a class of options."""
    of_class = {section.name: name for name, section in found.items()}
    holders = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else _last(node.target)
            kinds = {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)}
            holders |= {(name, of_class[kind]) for kind in kinds & of_class.keys()}
    return holders


def _last(node: ast.expr) -> str:
    """The last name of a dotted expression."""
    return (
        node.attr
        if isinstance(node, ast.Attribute)
        else node.id
        if isinstance(node, ast.Name)
        else ""
    )


def _items(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def options_are_read(modules: Modules) -> list[str]:
    found = sections(modules["config"])
    reads = {
        read
        for name, tree in modules.items()
        if name != "config"
        for read in read_attributes(tree, found)
    }
    for name, section in found.items():
        for method in functions(section):  # a property that is read reads what it is made of
            if (name, method.name) in reads:
                reads |= {
                    (name, node.attr)
                    for node in ast.walk(method)
                    if isinstance(node, ast.Attribute)
                }
    options = [
        (name, field)
        for name, section in found.items()
        for field in fields(section)
        if field not in found
    ]
    return [
        f"{name}.{field} is read nowhere" for name, field in options if (name, field) not in reads
    ]


RULES = [
    floors_are_kept,
    there_are_no_cycles,
    functions_import_nothing,
    heavy_packages_stay_in_their_rooms,
    imported_packages_are_declared,
    declared_packages_are_imported,
    functions_are_short,
    what_is_public_is_documented,
    options_are_documented,
    options_are_read,
]


@pytest.fixture(scope="module")
def package() -> Modules:
    return parse(ROOT / "jaxdpo")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Callable[[Modules], list[str]], package: Modules) -> None:
    problems = rule(package)
    assert not problems, "\n".join(["", *problems])


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


CONFIG = '''
class LossSection:
    """Loss."""
    beta: float
    """Beta."""
    name: str
    """Name."""
    @property
    def names(self):
        return [self.name]
class Config:
    """All."""
    seed: int
    """Seed."""
    loss: LossSection
'''
READER = """
def f(config, section: LossSection | None):
    return config.seed, section.beta, section.names
"""


def modules_of(**sources: str) -> Modules:
    return {
        name.replace("__", "."): ast.parse(textwrap.dedent(source))
        for name, source in {"config": CONFIG, **sources}.items()
    }


BROKEN = [
    (
        floors_are_kept,
        {"losses": "from jaxdpo.models import decoder", "models__decoder": ""},
        "losses imports models.decoder",
    ),
    (floors_are_kept, {"attic": ""}, "attic has no floor"),
    (
        there_are_no_cycles,
        {"losses": "import jaxdpo.pairs", "pairs": "from jaxdpo.losses import x"},
        "losses, pairs",
    ),
    (functions_import_nothing, {"losses": "def f():\n  if x:\n    import os"}, "losses.f"),
    (
        heavy_packages_stay_in_their_rooms,
        {"train": "import orbax.checkpoint"},
        "only checkpoint may",
    ),
    (heavy_packages_stay_in_their_rooms, {"train": "from torch import nn"}, "train imports torch"),
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
    (options_are_documented, {"config": CONFIG.replace('"""Beta."""', "")}, "loss.beta has no doc"),
    (
        options_are_read,
        {"train": READER.replace("section.beta", "section.betas")},
        "loss.beta is read nowhere",
    ),
    (
        options_are_read,
        {"train": READER.replace("section.beta", "other.beta")},
        "loss.beta is read nowhere",
    ),
    (
        options_are_read,
        {"train": READER.replace("section.names", "section.beta")},
        "loss.name is read nowhere",
    ),
    (
        options_are_read,
        {"train": READER.replace("config.seed", "seed")},
        "config.seed is read nowhere",
    ),
]


@pytest.mark.parametrize(("rule", "sources", "complaint"), BROKEN)
def test_a_broken_rule_is_found(
    rule: Callable[[Modules], list[str]], sources: dict[str, str], complaint: str
) -> None:
    assert any(complaint in problem for problem in rule(modules_of(**sources)))


@pytest.mark.parametrize(
    "source",
    [
        READER,
        "def f(config):\n  loss = config.loss\n  return loss.beta, loss.names, config.seed",
        "def f(config):\n  a, b = config.loss, 1\n  return a.beta, a.name, config.seed",
        "def f(options): return options.config.loss.beta, options.loss.name, options.config.seed",
        "def f(x: LossSection, c: Config):\n  self._l, b = x, c\n  return self._l.beta, self._l.name, b.seed",
        "class A:\n  loss: LossSection\n  def f(self, c: Config): return self.loss.beta, self.loss.name, c.seed",
    ],
)
def test_an_option_may_be_read_in_several_ways(source: str) -> None:
    assert options_are_read(modules_of(train=source)) == []

"""Every option is documented, and read somewhere outside the schema: held on the source."""

import ast
from collections.abc import Callable

import pytest

from tests.house import ROOT, Modules, functions, modules_of, parse

OPTION_MODULES = {"config.schema", "config.data_options", "config.loss_options"}
"""Where the sections of options are declared."""


def sections(modules: Modules) -> dict[str, ast.ClassDef]:
    """The classes of options: by the field that holds them, and "config" itself."""
    classes = {}
    for name in OPTION_MODULES & modules.keys():
        for node in modules[name].body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node
    named = {"config": classes["Config"]}
    for section in classes.values():
        for name, kind in fields(section).items():
            if ast.unparse(kind) in classes:
                named[name] = classes[ast.unparse(kind)]
    return named


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

    found = sections(modules)
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
    """(section, attribute) pairs that a tree reads, from `x.section.attribute` or from a name that
    holds a section.

    A name holds a section where its annotation says so, or where it was assigned from `x.section`
    or from such a name.
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
    of_class["LossOptions"] = "loss"  # the losses' constants: the section with its defaults
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
    found = sections(modules)
    reads = {
        read
        for name, tree in modules.items()
        if name not in OPTION_MODULES
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


@pytest.fixture(scope="module")
def package() -> Modules:
    return parse(ROOT / "jaxdpo")


@pytest.mark.parametrize("rule", [options_are_documented, options_are_read])
def test_the_options_keep(rule: Callable[[Modules], list[str]], package: Modules) -> None:
    problems = rule(package)
    assert not problems, "\n".join(["", *problems])


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


BROKEN = [
    (
        options_are_documented,
        {"config__schema": CONFIG.replace('"""Beta."""', "")},
        "loss.beta has no doc",
    ),
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
    modules = modules_of(**{"config__schema": CONFIG, **sources})
    assert any(complaint in problem for problem in rule(modules))


@pytest.mark.parametrize(
    "source",
    [
        READER,
        "def f(config):\n  loss = config.loss\n  return loss.beta, loss.names, config.seed",
        "def f(config):\n  a, b = config.loss, 1\n  return a.beta, a.name, config.seed",
        "def f(options): return options.config.loss.beta, options.loss.name, options.config.seed",
        "def f(x: LossSection, c: Config):\n  self._l, b = x, c\n"
        "  return self._l.beta, self._l.name, b.seed",
        "class A:\n  loss: LossSection\n"
        "  def f(self, c: Config): return self.loss.beta, self.loss.name, c.seed",
    ],
)
def test_an_option_may_be_read_in_several_ways(source: str) -> None:
    assert options_are_read(modules_of(config__schema=CONFIG, train=source)) == []

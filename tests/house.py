"""The package's source as trees, for the tests that hold the house rules."""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
Modules = dict[str, ast.Module]


def parse(folder: Path) -> Modules:
    """Modules by name without the package's own: "", "config", "models.layers", ..."""
    trees = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        trees[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return trees


def imports(tree: ast.AST) -> Iterator[str]:
    """Everything that is imported, as dotted names; `from a import b` gives a.b, whether b is a
    module or not."""
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


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def modules_of(**sources: str) -> Modules:
    """A small package from its sources; models__decoder stands for models.decoder."""
    modules = {}
    for name, source in sources.items():
        modules[name.replace("__", ".")] = ast.parse(textwrap.dedent(source))
    return modules

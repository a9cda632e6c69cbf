"""From files and arguments to a validated config: `[--config file.yaml] [section.field=value ...]`.

Serves every command: a command is a tree of frozen dataclasses whose fields carry their documentation as the string
below them. All problems are reported at once, and end the process with status 2.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import pydantic
import yaml

T = TypeVar("T")
Check = Callable[[Any], list[str]]
USAGE = 2


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without surprises: a key that is set twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(
                f"line {node.start_mark.line + 1}: set twice: {', '.join(map(str, sorted(twice)))}. Keep one"
            )
        return super().construct_mapping(node, deep=deep)


def load(
    schema: type[T],
    argv: Sequence[str],
    *,
    command: str,
    checks: Sequence[Check] = (),
    flags: dict[str, str] | None = None,
) -> tuple[T, set[str]]:
    """Read the arguments of `python -m jaxdpo.<command>`.

    Args:
        schema: frozen dataclass tree that defines the options.
        argv: the arguments after the command's name.
        checks: functions from the valid config to a list of problems.
        flags: the command's own switches, e.g. {"--dry-run": "what it does"}.

    Returns:
        The config, and the switches that were given. Prints and exits for --help (0), --print-config (0) and problems (2).
    """
    known = {
        "--help": "This text.",
        "--print-config": "Print every option's value as YAML, and stop.",
    } | (flags or {})
    values, given, problems = _read_arguments(schema, argv, known)
    if "--help" in given:
        print(help_text(schema, command, known))
        raise SystemExit(0)
    config, invalid = validate(schema, values)
    problems += invalid or [problem for check in checks for problem in check(config)]
    if problems or config is None:
        lines = "\n".join(textwrap.indent(problem, "  ") for problem in problems)
        count = f"{len(problems)} wrong option{'s' * (len(problems) > 1)}"
        print(
            f"jaxdpo.{command}: {count}:\n{lines}\n`python -m jaxdpo.{command} --help` lists all.",
            file=sys.stderr,
        )
        raise SystemExit(USAGE)
    if "--print-config" in given:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config, given


def _read_arguments(
    schema: type, argv: Sequence[str], known: dict[str, str]
) -> tuple[dict, set[str], list[str]]:
    """Nested values, switches and problems of an argument list; `a.b=c` after and over --config."""
    values: dict = {}
    overrides: dict[str, Any] = {}
    given: set[str] = set()
    problems: list[str] = []
    hints = {name: hint for name, hint, *_ in fields(schema)}
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(words, "")
            if "--config" in given:
                problems.append(f"--config {path}: given twice. Keep one")
            given.add("--config")
            values, problem = _read_file(path)
            problems += problem
        elif word in known:
            given.add(word)
        elif "=" in word and not word.startswith("-"):
            key, _, text = word.partition("=")
            if key in overrides:
                problems.append(f"{word}: {key} is set twice. Keep one")
            overrides[key] = _read_value(text, hints.get(key), problems, word)
        else:
            near = difflib.get_close_matches(word, [*known, "--config"], 1)
            problems.append(
                f"{word}: not understood."
                + (
                    f" Did you mean {near[0]}?"
                    if near
                    else " Options are written section.field=value"
                )
            )
    for key, value in overrides.items():
        problems += _put(values, key.split("."), value, key)
    return values, given, problems


def _read_file(path: str) -> tuple[dict, list[str]]:
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        return {}, [f"--config {path}: {error}"]
    if not isinstance(values or {}, dict):
        return {}, [f"--config {path}: must hold `section:` and indented `field: value` lines"]
    return values or {}, []


def _read_value(text: str, hint: Any, problems: list[str], word: str) -> Any:
    """What an argument's text means: itself where the option is text, so that 007 or 12:30 stay what they are; else YAML."""
    kinds = set(get_args(hint)) if get_origin(hint) is not list and get_args(hint) else {hint}
    is_text = kinds <= {str, list[str], type(None)}
    if is_text and text == "null" and type(None) in kinds:
        return None
    if is_text and not text.startswith(("[", "'", '"')):
        return text
    try:
        return yaml.load(text, yaml.BaseLoader if is_text else _UniqueKeyLoader) if text else ""
    except (yaml.YAMLError, ValueError):
        if text[0] in "[{":
            problems.append(f"{word}: not a YAML list. Write [a,b]")
        return text


def _put(values: dict, path: list[str], value: Any, key: str) -> list[str]:
    for name in path[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            return [f"{key}: {name} is not a section"]
    values[path[-1]] = value
    return []


def validate(schema: type[T], values: dict) -> tuple[T | None, list[str]]:
    """Build the config, gathering problems: after each round the offending keys are left out, so that later checks run too.

    Returns:
        (config, problems); the config holds defaults where values were wrong and is for use only when there are no problems.
    """
    problems: list[str] = []
    while True:
        try:
            return pydantic.TypeAdapter(schema).validate_python(values), problems
        except pydantic.ValidationError as failure:
            errors = failure.errors()
            places = {_place(schema, error["loc"]) for error in errors}
            for place in sorted(places):
                mine = [error for error in errors if _place(schema, error["loc"]) == place]
                problems += _explain(schema, place, mine)
            before = values
            for place in places:
                values = _without(values, place)
            if values == before:  # a required option is missing: nothing to leave out
                return None, problems


def _place(schema: type, location: tuple) -> tuple[str, ...]:
    """The option an error is about: pydantic's location without list indices and union branches."""
    place: tuple[str, ...] = ()
    for name in location:
        place += (str(name),)
        if not dataclasses.is_dataclass(schema):
            break
        schema = get_type_hints(schema).get(str(name), object)
        if not dataclasses.is_dataclass(schema):
            break
    return place


def _explain(schema: type, place: tuple[str, ...], errors: list) -> list[str]:
    """Messages for the errors of one option: `path=value: reason. Remedy`."""
    error, key = errors[0], ".".join(place)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).split("\n")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        inner = error["input"] if isinstance(error["input"], dict) else {}
        return [_unknown(schema, name) for name in ([f"{key}.{name}" for name in inner] or [key])]
    if error["type"] == "list_type" and isinstance(error["input"], str | int | float):
        return [
            f"{key}={_show(error['input'])}: must be a list. Write {key}=[{_show(error['input'])}]"
        ]
    reasons = " or ".join(
        dict.fromkeys(error["msg"][0].lower() + error["msg"][1:] for error in errors)
    )
    return [f"{key}={_show(error['input'])}: {reasons}"]


def _unknown(schema: type, key: str) -> str:
    near = difflib.get_close_matches(key, [name for name, *_ in fields(schema)], 1, cutoff=0.5)
    return f"{key}: there is no such option." + (f" Did you mean {near[0]}?" if near else "")


def _show(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _without(values: Any, place: tuple[str, ...]) -> Any:
    if not place or not isinstance(values, dict):
        return {}
    rest = {key: value for key, value in values.items() if str(key) != place[0]}
    if len(place) > 1:
        rest[place[0]] = _without(values[place[0]], place[1:])
    return rest


def fields(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Every option of a schema as (dotted name, type, default, documentation)."""
    hints, docs = get_type_hints(schema), field_docs(schema)
    for field in dataclasses.fields(schema):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, name + ".")  # type: ignore[arg-type]
        else:
            default = (
                field.default_factory()
                if field.default_factory is not dataclasses.MISSING
                else field.default
            )
            yield name, hint, default, docs.get(field.name, "")


@functools.cache
def field_docs(schema: type) -> dict[str, str]:
    """The strings below a dataclass's fields, and below those that it inherits, by field name."""
    docs = {}
    for base in reversed([base for base in schema.__mro__ if dataclasses.is_dataclass(base)]):
        (body,) = (
            node.body
            for node in ast.parse(textwrap.dedent(inspect.getsource(base))).body
            if isinstance(node, ast.ClassDef)
        )
        for field, below in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def help_text(schema: type, command: str, switches: dict[str, str]) -> str:
    """The text of --help: usage, switches and every option with its type, default and documentation."""
    lines = [
        f"python -m jaxdpo.{command} [--config FILE.yaml] [option=value ...]",
        "",
        inspect.cleandoc(schema.__doc__ or ""),
        "",
    ]
    for name, doc in (
        {"--config FILE": "Read options from a YAML file; option=value arguments go over it."}
        | switches
    ).items():
        lines += [f"  {name:16} {doc}"]
    for name, hint, default, doc in fields(schema):
        shown = (
            "required"
            if default is dataclasses.MISSING
            else yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
        )
        lines += [
            "",
            f"  {name}={shown}   ({type_name(hint)})",
            textwrap.fill(doc, 120, initial_indent="      ", subsequent_indent="      "),
        ]
    return "\n".join(lines)


def type_name(hint: Any) -> str:
    """An option's type as --help and docs/options.md show it."""
    if hint is type(None):
        return "null"
    if getattr(hint, "__args__", None) and getattr(hint, "__origin__", None) is not list:
        return " | ".join(arg if isinstance(arg, str) else type_name(arg) for arg in hint.__args__)
    return str(hint) if getattr(hint, "__origin__", None) is list else hint.__name__


def to_dict(config: Any) -> dict:
    """The config as nested plain values (str, int, float, bool, None, list), as YAML and JSON take them."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The config as YAML that --config reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)

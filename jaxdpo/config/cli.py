"""From files and arguments to a validated config: `[--config file.yaml] [section.field=value ...]`.

Serves every command: a command is a tree of frozen dataclasses whose fields carry their
documentation as the string below them. All problems are reported at once, and end the process with
status 2.

Not argparse, because it ends at the first problem, and has no files; pydantic finds all problems.
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

from jaxdpo.config.addresses import remote_paths
from jaxdpo.config.foreign_names import foreign_hint
from jaxdpo.config.impossible import impossible_values, shown
from jaxdpo.config.yaml_text import read_yaml
from jaxdpo.utils.console import escape_unprintable, restart_in_utf8
from jaxdpo.utils.files import read_limited

T = TypeVar("T")
Check = Callable[[Any], list[str]]
USAGE = 2
"""Exit status of a wrong command line, as argparse has it."""
MAX_CONFIG = 2**20
"""Largest --config file, in bytes: one with every option is a hundred times smaller."""
SIMILAR = 0.75
"""An unknown name gets the most similar option as a hint if difflib's ratio is at least this. At
0.5, log.wandb got lora.rank."""


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
        command: its name.
        checks: functions from the valid config to a list of problems.
        flags: the command's own switches, e.g. {"--dry-run": "what it does"}.

    Returns:
        The config, and the switches that were given. Prints and exits for --help (0),
        --print-config (0) and problems (2).
    """
    restart_in_utf8(argv)
    escape_unprintable()
    switches = {
        "--help": "This text.",
        "--print-config": "Print every option's value as YAML, and stop.",
        **(flags or {}),
    }
    values, given, problems = _read_arguments(schema, argv, switches)
    if "--help" in given:
        print(help_text(schema, command, switches))
        raise SystemExit(0)
    config, invalid = validate(schema, values)
    problems += invalid
    if config is not None:
        problems += remote_paths(to_dict(config))
    if config is not None and not invalid:
        for check in checks:
            problems += check(config)
    if problems or config is None:
        _report(problems, command)
        raise SystemExit(USAGE)
    if "--print-config" in given:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config, given


def _report(problems: list[str], command: str) -> None:
    count = "1 wrong option" if len(problems) == 1 else f"{len(problems)} wrong options"
    print(f"jaxdpo.{command}: {count}:", file=sys.stderr)
    for problem in problems:
        print(textwrap.indent(problem, "  "), file=sys.stderr)
    print(f"`python -m jaxdpo.{command} --help` lists all.", file=sys.stderr)


def _read_arguments(
    schema: type, argv: Sequence[str], switches: dict[str, str]
) -> tuple[dict, set[str], list[str]]:
    """Nested values, switches and problems of an argument list; `a.b=c` overrides --config."""
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
            values, found = _read_file(path)
            problems += found
        elif word in switches:
            given.add(word)
        elif "=" in word and not word.startswith("-"):
            key, _, text = word.partition("=")
            if key in overrides:
                problems.append(f"{word}: {key} is set twice. Keep one")
            overrides[key] = _read_value(text, hints.get(key), problems, word)
        else:
            problems.append(_not_understood(word, [*switches, "--config"], hints))
    for key, value in overrides.items():
        problems += _put(values, key.split("."), value, key)
    return values, given, problems


def _not_understood(word: str, switches: list[str], options: dict[str, Any]) -> str:
    """Message for an argument that is neither a switch nor option=value."""
    near = difflib.get_close_matches(word, switches, 1)
    if near:
        return f"{word}: not understood. Did you mean {near[0]}?"
    # Other frameworks write --learning_rate 1e-6.
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    foreign = foreign_hint(name, options)
    hint = "" if foreign is None else f". {foreign}"
    return f"{word}: not understood. Options are written section.field=value{hint}"


def _read_file(path: str) -> tuple[dict, list[str]]:
    try:
        text = read_limited(Path(path), MAX_CONFIG).decode("utf-8")
        values = read_yaml(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        return {}, [f"--config {path}: {error}"]
    if not values:
        return {}, []
    if not isinstance(values, dict):
        return {}, [f"--config {path}: must hold `section:` and indented `field: value` lines"]
    return values, []


def _read_value(text: str, hint: Any, problems: list[str], word: str) -> Any:
    """What an argument's text means.

    Itself where the option is text, so that 007, 12:30 or true stay what they are; YAML where the
    option is a number, a bool or one of some words, and where the text begins a list or a quoted
    string.
    """
    kinds = _alternatives(hint)
    is_text = kinds <= {str, list[str], type(None)}
    if is_text and text == "null" and (type(None) in kinds or str not in kinds):
        return None  # which a list that must be there refuses
    if is_text and not text.startswith(("[", "'", '"')):
        return text
    if not text:
        return ""
    try:
        # The items of a list of texts stay as they are typed.
        return read_yaml(text, all_text=is_text)
    except (yaml.YAMLError, ValueError):
        items = _plain_items(text) if is_text else None
        if items is not None:
            return items
        if text.startswith(("[", "{")):
            problems.append(f"{word}: not a YAML list. Write [a,b]")
        return text


def _plain_items(text: str) -> list[str] | None:
    """The items of a list of plain words, [Who are you?,What's new?]; None for any other text.

    YAML takes no ? before the end of such an item, which is how questions end.
    """
    inner = text[1:-1]
    if not (text.startswith("[") and text.endswith("]")) or any(mark in inner for mark in '"[]{}#'):
        return None
    items = [item.strip() for item in inner.split(",")]
    if any(not item or item.startswith("'") for item in items):
        return None
    return items


def _alternatives(hint: Any) -> set[Any]:
    """The types of a union or the words of a Literal; else the type itself."""
    if get_args(hint) and get_origin(hint) not in (list, dict):
        return set(get_args(hint))
    return {hint}


def _put(values: dict, path: list[str], value: Any, key: str) -> list[str]:
    for name in path[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            return [f"{key}: {name} is not a section"]
    values[path[-1]] = value
    return []


def _with_lists(schema: type, values: Any) -> Any:
    """The nested values, where one bare value of a list option is a list of that one.

    Options that take a text or a list (str | list[str]) are left alone: a bare value is their text.
    """
    if not isinstance(values, dict):
        return values
    hints = get_type_hints(schema)
    result = dict(values)
    for name, value in values.items():
        hint = hints.get(name)
        kinds = _alternatives(hint) - {type(None)}
        is_list = all(get_origin(kind) is list for kind in kinds)
        if dataclasses.is_dataclass(hint):
            result[name] = _with_lists(hint, value)  # type: ignore[arg-type]
        elif is_list and isinstance(value, str | int | float) and value != "":
            result[name] = [value]
    return result


def validate(schema: type[T], values: dict) -> tuple[T | None, list[str]]:
    """Build the config from nested values, gathering all problems.

    After each round the offending keys are dropped, so that checks which come later run too.

    Returns:
        (config, problems); the config holds defaults where values were wrong and is for use only
        when there are no problems.
    """
    adapter = pydantic.TypeAdapter(schema)
    values = _with_lists(schema, values)
    problems: list[str] = []
    for option, problem in list(impossible_values(schema, values)):
        problems.append(problem)
        values = _without(values, tuple(option.split(".")))
    while True:
        try:
            return adapter.validate_python(values), problems
        except pydantic.ValidationError as failure:
            by_place: dict[tuple[str, ...], list] = {}
            for error in failure.errors():
                by_place.setdefault(_place(schema, error["loc"]), []).append(error)
        before = values
        for place in sorted(by_place):
            problems += _explain(schema, place, by_place[place])
            values = _without(values, place)
        if values == before:  # a required option is missing: there is nothing to drop
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
    value = error["input"]
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).split("\n")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if isinstance(value, dict) and value:  # a section that does not exist: name its options
            return [_unknown(schema, f"{key}.{name}") for name in value]
        return [_unknown(schema, key)]
    reasons = {error["msg"][0].lower() + error["msg"][1:]: None for error in errors}
    message = f"{key}={shown(value)}: {' or '.join(reasons)}"
    in_list = isinstance(error["loc"][-1], int)
    if error["type"] == "list_type" or (in_list and "," in str(value)):
        message += ". Lists are written [a,b]"
    return [message]


def _unknown(schema: type, key: str) -> str:
    options = [name for name, *_ in fields(schema)]
    hint = foreign_hint(key, options)
    near = difflib.get_close_matches(key, options, 1, cutoff=SIMILAR)
    if hint is None and near:
        hint = f"Did you mean {near[0]}?"
    return f"{key}: there is no such option." + (f" {hint}" if hint else "")


def _without(values: Any, place: tuple[str, ...]) -> Any:
    """The nested values without what is at a place."""
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
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield name, hint, default, docs.get(field.name, "")


@functools.cache
def field_docs(schema: type) -> dict[str, str]:
    """The strings below a dataclass's fields, and below those that it inherits, by field name."""
    docs = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = ast.parse(textwrap.dedent(inspect.getsource(base)))
        (body,) = (node.body for node in source.body if isinstance(node, ast.ClassDef))
        for field, below in itertools.pairwise(body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def help_text(schema: type, command: str, switches: dict[str, str]) -> str:
    """The text of --help: usage, switches and every option with its type, default and
    documentation."""
    lines = [
        f"python -m jaxdpo.{command} [--config FILE.yaml] [option=value ...]",
        "",
        inspect.cleandoc(schema.__doc__ or ""),
        "",
        "  --config FILE    Read options from a YAML file; option=value arguments override it.",
    ]
    for name, doc in switches.items():
        lines.append(f"  {name:16} {doc}")
    for name, hint, default, doc in fields(schema):
        shown = "required"
        if default is not dataclasses.MISSING:
            shown = yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
        indent = " " * 6
        lines += [
            "",
            f"  {name}={shown}   ({type_name(hint)})",
            textwrap.fill(doc, 100, initial_indent=indent, subsequent_indent=indent),
        ]
    return "\n".join(lines)


def type_name(hint: Any) -> str:
    """An option's type as --help and docs/options.md show it."""
    if hint is type(None):
        return "null"
    if get_origin(hint) is list:
        return str(hint)
    if get_origin(hint) is dict:
        return "{name: value}"
    if not get_args(hint):
        return hint.__name__
    names = [arg if isinstance(arg, str) else type_name(arg) for arg in get_args(hint)]
    return " | ".join(names)


def to_dict(config: Any) -> dict:
    """The config as nested plain values (str, int, float, bool, None, list), as YAML and JSON take
    them."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The config as YAML that --config reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)

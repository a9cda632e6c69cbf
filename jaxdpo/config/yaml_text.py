"""YAML of config files and arguments, where a key that is set twice is an error."""

from typing import Any

import yaml


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML takes the last value of a key silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            line = node.start_mark.line + 1
            raise ValueError(f"line {line}: set twice: {', '.join(twice)}. Keep one")
        return super().construct_mapping(node, deep=deep)


def read_yaml(text: str, *, all_text: bool = False) -> Any:
    """The value that a YAML text holds.

    Args:
        all_text: numbers, bools and nulls stay as they are typed.

    Raises:
        ValueError: a key is set twice, or lists and mappings are nested too deeply.
        yaml.YAMLError: it is not YAML.
    """
    loader = yaml.BaseLoader if all_text else _UniqueKeyLoader
    try:
        return yaml.load(text, loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None

"""`python -m jaxdpo.data data.train=pairs.jsonl [model.path=...] [page=...] [out=...]`.

Looks at preference data: counts what is read and dropped, shows pairs and, with a tokenizer, their
loss tokens and lengths; names near-duplicates and odd pairs; converts any source to our JSON lines.
Several sets are a quoted list: "data.train=[a.jsonl,b.jsonl]". Exit codes: 0 done, 1 fault, 2 wrong
options, 130 interrupted.
"""

import logging
import sys
from collections.abc import Sequence

from jaxdpo.config import cli
from jaxdpo.data.inspect.inspect_data import inspect_data
from jaxdpo.data.inspect.options import DataConfig, check

DONE, FAULT, INTERRUPTED = 0, 1, 130


class _Once(logging.Filter):
    """Passes each message once: sets are read twice, as text and for their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._logged
        self._logged.add(message)
        return is_new


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    handler = logging.StreamHandler()
    handler.addFilter(_Once())
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    config, _ = cli.load(DataConfig, argv, command="data", checks=[check])
    try:
        inspect_data(config)
    except (ValueError, OSError) as error:
        print(f"jaxdpo.data: {error}", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        print("jaxdpo.data: interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

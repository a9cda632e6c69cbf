"""Options and output that both sides of prepare_pairs.py share.

Standard library only, as both environments import it.
"""

import argparse
import json
import resource
from typing import Any


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    for name in ("rows", "tokenizer", "cache"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--processes", type=int, required=True)
    return parser.parse_args()


def print_measured(children: int, **measured: Any) -> None:
    """Print the measurements with peak memory: this process plus `children` times the largest."""
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(json.dumps({**measured, "gigabytes": mine + children * child, "main": mine}))

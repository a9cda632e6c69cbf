"""What both sides of prepare_pairs.py share: their options, and what they tell. Standard library only, as both environments import it."""

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


def tell(children: int, **measured: Any) -> None:
    """Print what was measured, with the most memory that this process held and, of its children, as many as the largest one."""
    mine, child = (
        resource.getrusage(who).ru_maxrss * 1024 / 1e9
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(json.dumps({**measured, "gigabytes": mine + children * child, "main": mine}))

"""Our side of prepare_pairs.py: rows of a file to a table of pairs, once."""

import argparse
import json
import resource
import time

from jaxdpo.config import DataSection
from jaxdpo.data.chat import load_tokenizer
from jaxdpo.data.prepare import prepare


def main() -> None:
    """Prepare, and tell the seconds, tokens and memory."""
    parser = argparse.ArgumentParser()
    for name in ("rows", "tokenizer", "cache"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--processes", type=int, required=True)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    section = DataSection(
        train=[args.rows], cache=args.cache, processes=args.processes, max_length=4096, max_prompt_length=2048, max_row_tokens=8192
    )
    began = time.perf_counter()
    done = prepare(section, tokenizer, 10**6)
    seconds = time.perf_counter() - began
    pairs, tokens = (done.report["train"][name] + done.report["eval"][name] for name in ("pairs", "tokens"))
    mine, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    gigabytes = (mine + args.processes * child) * 1024 / 1e9
    print(json.dumps({"pairs": pairs, "tokens": tokens, "seconds": seconds, "gigabytes": gigabytes, "main": mine * 1024 / 1e9}))


if __name__ == "__main__":
    main()

"""Our side of prepare_pairs.py: from rows of a file to a table of pairs, once."""

import time

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.prepare import prepare
from jaxdpo.data.tokenizer_json import load_tokenizer

from .pairs import arguments, print_measured


def main() -> None:
    """Prepare, and print seconds, tokens and memory."""
    args = arguments()
    tokenizer = load_tokenizer(args.tokenizer)
    section = DataSection(
        train=[args.rows],
        cache=args.cache,
        num_proc=args.processes,
        max_length=4096,
        max_prompt_length=2048,
        packed_length=8192,
    )
    began = time.perf_counter()
    done = prepare(section, tokenizer, 10**6)
    seconds = time.perf_counter() - began
    pairs, tokens = (
        done.report["train"][name] + done.report["eval"][name] for name in ("pairs", "tokens")
    )
    print_measured(args.processes - 1, pairs=pairs, tokens=tokens, seconds=seconds)


if __name__ == "__main__":
    main()

# pyright: reportMissingImports=false
"""TRL's side of prepare_pairs.py: from rows of a file to a prepared dataset, once.

Runs in an environment that has TRL.
"""

import time
from importlib.metadata import version

import datasets
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from .pairs import arguments, print_measured


def main() -> None:
    """Prepare, and print seconds, tokens and memory."""
    args = arguments()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = DPOConfig(
        dataset_num_proc=args.processes,
        output_dir=args.cache,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = DPOTrainer.__new__(DPOTrainer)  # its preparation needs no model
    trainer._tokenizer = tokenizer
    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=args.rows, split="train", cache_dir=args.cache)
    done = trainer._prepare_dataset(rows, tokenizer, config, "train")
    seconds = time.perf_counter() - began
    lists = (done.data.column(f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
    tokens = sum(len(chunk.flatten()) for column in lists for chunk in column.chunks)
    versions = {
        f"{name} (TRL)": version(name) for name in ("trl", "datasets", "transformers", "tokenizers")
    }
    print_measured(
        args.processes, pairs=len(done), tokens=tokens, seconds=seconds, versions=versions
    )


if __name__ == "__main__":
    main()

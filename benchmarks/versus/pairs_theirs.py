# pyright: reportMissingImports=false
"""TRL's side of prepare_pairs.py: rows of a file to a prepared dataset, once. Runs in an environment that has TRL."""

import argparse
import json
import resource
import time
from importlib.metadata import version

import datasets
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    """Prepare, and tell the seconds, tokens and memory."""
    parser = argparse.ArgumentParser()
    for name in ("rows", "tokenizer", "cache"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--processes", type=int, required=True)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = DPOConfig(dataset_num_proc=args.processes, output_dir=args.cache, report_to=[], use_cpu=True, bf16=False)
    trainer = DPOTrainer.__new__(DPOTrainer)  # its preparation needs no model
    trainer._tokenizer = tokenizer
    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=args.rows, split="train", cache_dir=args.cache)
    done = trainer._prepare_dataset(rows, tokenizer, config, "train")
    seconds = time.perf_counter() - began
    lists = (done.data.column(f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
    tokens = sum(len(chunk.flatten()) for column in lists for chunk in column.chunks)
    mine, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    gigabytes = (mine + args.processes * child) * 1024 / 1e9
    versions = {f"{name} (TRL)": version(name) for name in ("trl", "datasets", "transformers", "tokenizers")}
    print(json.dumps({"pairs": len(done), "tokens": tokens, "seconds": seconds, "gigabytes": gigabytes, "versions": versions}))


if __name__ == "__main__":
    main()

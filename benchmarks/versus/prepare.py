"""The inputs of both sides: a model folder, pairs as text in two orders, the expected token ids.

    python -m versus.prepare --data <jsonl> --out <folder> --rounds 12 --steps-per-round 2

    <out>/model/          config.json, model.safetensors (random weights), tokenizer files
    <out>/random.jsonl    {prompt, chosen, rejected} as text, in one random order; step k trains on
                          rows 8 (k-1) to 8 k
    <out>/grouped.jsonl   the same rows in batches of similar length
    <out>/plan.json       for both phases the rows of random.jsonl that each step trains on, their
                          token ids, facts. The first step of "random" is what a worker starts with;
                          rounds begin with the second.

Our own parser, chat template and truncation decide what a pair is. Its ids are then decoded to
text, for a trainer that takes text; the few pairs whose text does not give the same ids again (the
truncation went through a word) are filtered.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.preference import Dropped, Preference
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.sources import read_set
from jaxdpo.data.tokenize import Encoder
from jaxdpo.data.tokenizer_json import load_tokenizer
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.load_save import save_params
from jaxdpo.models.params import init_params

END = "<|end|>"
VOCAB = 32_000
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "eos_token_id": 0,
}
MEGABATCH = 50
"""Batches that are sorted by length together, as in transformers' LengthGroupedSampler."""


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, required=True, help="rounds of each phase")
    parser.add_argument("--steps-per-round", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    report, parsed = read_set(args.data, DataSection(), "data.train")
    records = list(parsed)
    num_tokens = make_model(
        args.out / "model", [text for record in records for text in record.texts], args.seed
    )
    rows, pairs, counts = make_rows(records, args.out / "model", args.max_length)
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(len(rows))
    rows, pairs = [rows[i] for i in order], [pairs[i] for i in order]
    longest_sides = np.array(
        [len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    )
    grouped = group_by_length(longest_sides, args.batch_size, rng)
    write_rows(args.out / "random.jsonl", rows)
    write_rows(args.out / "grouped.jsonl", [rows[i] for i in grouped])

    num_steps = args.rounds * args.steps_per_round
    phases = {
        "random": steps_of(np.arange(len(rows)), num_steps + 1, args.batch_size),
        "grouped": steps_of(grouped, num_steps, args.batch_size),
    }
    used = sorted({row for steps in phases.values() for step in steps for row in step})
    plan = {
        "phases": phases,
        "steps_per_round": args.steps_per_round,
        "ids": {
            row: [
                ids.tolist()
                for ids in (pairs[row].prompt_ids, pairs[row].chosen_ids, pairs[row].rejected_ids)
            ]
            for row in used
        },
        "max_length": args.max_length,
        "facts": {
            "rows_read": report.rows_read,
            "parsed": report.parsed,
            **counts,
            "tokenizer_entries": num_tokens,
        },
    }
    (args.out / "plan.json").write_text(json.dumps(plan), encoding="utf-8")


def make_model(folder: Path, texts: list[str], seed: int) -> int:
    """Write a Hugging Face folder with a byte-level BPE of these texts and random weights.

    Returns the size of the tokenizer's vocabulary.
    """
    folder.mkdir(parents=True)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    make_weights(folder, seed)
    return bpe.get_vocab_size()


def make_weights(folder: Path, seed: int) -> None:
    """config.json and random weights of MODEL."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    config = load_model_config(folder)
    params = jax.jit(lambda key: init_params(config, key, "float32"))(jax.random.key(seed))
    save_params(folder, config, params, np.float32)


def make_rows(
    records: list[Preference], folder: Path, max_length: int
) -> tuple[list[dict[str, str]], list[EncodedPair], dict[str, int]]:
    """The pairs as text and as ids, with counts of what was filtered."""
    tokenizer = load_tokenizer(str(folder))
    encoder = Encoder.create(
        tokenizer, DataSection(max_length=max_length, max_prompt_length=max_length // 2)
    )
    encoded = [pair for pair in encoder.encode(records) if not isinstance(pair, Dropped)]
    end = tokenizer.eos_token_id

    def text(ids: np.ndarray) -> str:
        return str(tokenizer.decode(ids[:-1] if ids[-1] == end else ids))

    rows = [
        {
            "prompt": text(p.prompt_ids),
            "chosen": text(p.chosen_ids),
            "rejected": text(p.rejected_ids),
        }
        for p in encoded
    ]
    again = encoder.encode(
        [Preference(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    )
    kept = [
        i
        for i, (pair, other) in enumerate(zip(encoded, again, strict=True))
        if same_ids(pair, other)
    ]
    counts = {
        "encoded": len(encoded),
        "kept": len(kept),
        "cut_prompts": sum(encoded[i].truncated_prompt for i in kept),
        "cut_answers": sum(
            encoded[i].truncated_chosen + encoded[i].truncated_rejected for i in kept
        ),
    }
    return [rows[i] for i in kept], [encoded[i] for i in kept], counts


def same_ids(pair: EncodedPair, other: Any) -> bool:
    """Whether two encodings of a pair agree token by token."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return isinstance(other, EncodedPair) and all(
        np.array_equal(getattr(pair, name), getattr(other, name)) for name in names
    )


def group_by_length(lengths: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """An order in which the items of a batch have similar lengths and the batches are shuffled.

    As in transformers' group_by_length: a random order, cut into megabatches, each sorted. A last
    batch that is not full stays last.
    """
    order = rng.permutation(len(lengths))
    parts = [
        order[first : first + MEGABATCH * batch]
        for first in range(0, len(order), MEGABATCH * batch)
    ]
    order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    full = order[: len(order) // batch * batch].reshape(-1, batch)
    return np.concatenate([rng.permutation(full).reshape(-1), order[full.size :]])


def steps_of(order: np.ndarray, num_steps: int, batch: int) -> list[list[int]]:
    """The first steps of an order, each a list of rows."""
    if num_steps * batch > len(order):
        raise ValueError(
            f"{num_steps} steps of {batch} pairs: there are only {len(order)} pairs. "
            "Measure fewer rounds or steps"
        )
    return order[: num_steps * batch].reshape(num_steps, batch).tolist()


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()

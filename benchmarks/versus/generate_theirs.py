# pyright: reportMissingImports=false
"""The side of transformers in generate.py: a worker that decodes with model.generate().

    python -m versus.generate_theirs --folder <model> --dtype bfloat16 --threads 2

Imports nothing of jaxdpo. A call is timed from prompts on the host to completions on the host. Its
defaults, greedy: attention by PyTorch's scaled dot product, a cache that grows. The model's EOS
token is removed, so that every completion has the full length.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from .protocol import Channel


def main() -> None:
    """Load the model, then answer requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    channel = Channel()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=getattr(torch, args.dtype)
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    channel.send(event="loaded")
    while (request := channel.receive())["do"] != "quit":
        began = time.perf_counter()
        prompts = torch.tensor(request["prompts"])
        with torch.inference_mode():
            rows = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=request["new"],
            )
        answers = rows[:, prompts.shape[1] :].tolist()
        channel.send(event="answered", seconds=time.perf_counter() - began, answers=answers)


if __name__ == "__main__":
    main()

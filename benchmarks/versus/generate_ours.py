"""Our side of generate.py: a worker that decodes with jaxdpo.models.sampling.generate.

    python -m versus.generate_ours --folder <model> --dtype bfloat16

A call is timed from prompts on the host to completions on the host.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.load_save import load_params
from jaxdpo.models.sampling import generate

from .protocol import Channel


def main() -> None:
    """Load the model, then answer requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    args = parser.parse_args()
    channel = Channel()
    model = load_model_config(args.folder)
    params = jax.device_put(load_params(args.folder, model, None, jnp.dtype(args.dtype)))
    channel.send(event="loaded")
    while (request := channel.receive())["do"] != "quit":
        prompts = [np.array(ids, np.int32) for ids in request["prompts"]]
        began = time.perf_counter()
        answers = generate(
            params,
            model,
            prompts,
            max_new_tokens=request["new"],
            options=ForwardOptions(compute_dtype=args.dtype),
        )
        seconds = time.perf_counter() - began
        channel.send(event="answered", seconds=seconds, answers=[ids.tolist() for ids in answers])


if __name__ == "__main__":
    main()

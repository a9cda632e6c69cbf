"""Bytes that a training step sends between eight devices, by mesh, read from the compiled program.

    python benchmarks/collectives.py
    python benchmarks/collectives.py --topology v5e:2x4     (with jax[tpu] installed; needs no TPU)

Nothing is run or timed. A step is 8 packed sequences of 2,048 tokens with a frozen reference, in
one microbatch on every mesh; a mesh whose devices share a sequence has one of 16,384. Weights are
float32; matmuls are float32 on virtual CPU devices and bfloat16 on TPUs. Loops of unknown length
(the LM head's chunks) count once; all that they send is two numbers per token along `tensor`.

Writes benchmarks/results/collectives-<date>[-<topology>].md and .json.
"""

import argparse
import collections
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
from jax.experimental import topologies
from versus.machine import commit, hardware, tell

from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import MeshSection, OptimSection
from jaxdpo.data.packing import Batch, Packer
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.distributed import sharding
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.hf.config_json import from_hf
from jaxdpo.models.params import abstract_params
from jaxdpo.models.shardings import axis_sizes
from jaxdpo.planning.hlo_collectives import Collective, collectives
from jaxdpo.training.completion_logps import StepOptions
from jaxdpo.training.state import FrozenState, init_state
from jaxdpo.training.step import compile_steps
from jaxdpo.training.weights import state_shardings

TOKENS, PAIRS = 16_384, 16
SIZES: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": TOKENS,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": SIZES | {"model_type": "llama", "num_key_value_heads": 2},
    "dense, 8 key-value heads": SIZES | {"model_type": "llama"},
    "8 experts, 2 a token": SIZES
    | {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
    },
}
MESHES: dict[str, list[dict[str, int]]] = {
    "dense": [
        {"data": 8},
        {"fsdp": 8},
        {"data": 2, "fsdp": 4},
        {"fsdp": 4, "tensor": 2},
        {"fsdp": 4, "context": 2},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"fsdp": 2, "context": 4},
        {"context": 8},
    ],
    "dense, 8 key-value heads": [{"fsdp": 4, "context": 2}, {"context": 8}, {"tensor": 8}],
    "8 experts, 2 a token": [
        {"fsdp": 8},
        {"fsdp": 2, "expert": 4},
        {"expert": 8},
        {"expert": 4, "tensor": 2},
    ],
}


def main(argv: list[str]) -> None:
    """Compile every program and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--topology",
        help="a TPU slice of eight chips, e.g. v5e:2x4, instead of eight virtual CPU devices",
    )
    parser.add_argument("--only", choices=MODELS, help="one of the models")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    devices = jax.devices()
    if args.topology:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    found = [
        measured(name, sizes, devices)
        for name in MODELS
        if args.only in (None, name)
        for sizes in MESHES[name]
    ]
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "command": f"python benchmarks/collectives.py {' '.join(argv)}".strip(),
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "jax": jax.__version__,
        "hardware": hardware(os.cpu_count() or 1),
    }
    suffix = f"-{args.topology.replace(':', '-')}" if args.topology else ""
    path = args.out / f"collectives-{about['date']}{suffix}"
    path.with_suffix(".json").write_text(
        json.dumps(about | {"models": MODELS, "found": found}, indent=1) + "\n", encoding="utf-8"
    )
    path.with_suffix(".md").write_text(markdown(about, found), encoding="utf-8")
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def measured(name: str, sizes: dict[str, int], devices: list[Any]) -> dict[str, Any]:
    """What one program sends."""
    model = from_hf(MODELS[name])
    mesh = sharding.make_mesh(MeshSection(**({"data": 1} | sizes)), devices, axis_sizes(model))
    tell(f"{name}, {sizes}")
    step = compiled_step(model, mesh)
    some = collectives(step.as_text(), mesh)
    bytes_by: collections.Counter[str] = collections.Counter()
    for one in some:
        bytes_by[f"{one.kind} over {' and '.join(one.axes)}"] += round(one.sent)
    memory = step.memory_analysis()
    weights = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model, "float32")))
    return {
        "model": name,
        "mesh": sizes,
        "weights": weights,
        "sent": dict(bytes_by.most_common()),
        "temporary_bytes": memory.temp_size_in_bytes,
        "largest": [described(one) for one in sorted(some, key=lambda one: -one.sent)[:8]],
    }


def described(one: Collective) -> str:
    """One collective as a line of the .json file."""
    return (
        f"{one.count} x {one.kind} over {' and '.join(one.axes)}, {one.sent / 2**20:.1f} MiB: "
        f"{one.shapes} {one.op_name[-80:]}"
    )


def compiled_step(model: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """The train step, compiled from shapes alone."""
    dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    forward = ForwardOptions(compute_dtype=dtype, remat="full", mesh=mesh)
    options = StepOptions(
        model=model, loss=LossSection(), optim=OptimSection(), forward=forward, total_steps=10
    )
    where = state_shardings(model, mesh)
    state = jax.eval_shape(
        lambda params: init_state(params, options.optim), abstract_params(model, "float32")
    )
    fixed = FrozenState(reference=abstract_params(model, dtype))
    fixed_where = FrozenState(reference=where.params)
    train_step, _ = compile_steps(options, mesh, where, fixed_where)
    placed = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        (state, fixed),
        (where, fixed_where),
    )
    return train_step.lower(
        *placed, batch(mesh), jax.ShapeDtypeStruct((), np.bool_, sharding=sharding.replicated(mesh))
    ).compile()


def batch(mesh: jax.sharding.Mesh) -> Batch:
    """Shapes of a batch of TOKENS token positions."""
    rows, ids = sharding.num_row_shards(mesh), np.ones(2, np.int32)
    packed = Packer(
        share_prefix=True, num_rows=rows, packed_lengths=(TOKENS // rows,), max_pairs=PAIRS
    )([EncodedPair(ids, ids, ids)])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.rows(mesh, 1)),
        packed,
    )


def markdown(about: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """The tables."""
    head = (
        f"{about['date']}, commit {about['commit']}, jax {about['jax']}, "
        f"compiled for {about['devices']}: `{about['command']}`."
    )
    what = f"MiB that each device sends in a step of {TOKENS:,} tokens, along the axes of the mesh."
    lines = ["# Bytes sent by a training step", "", head, what, ""]
    for name in dict.fromkeys(item["model"] for item in found):
        some = [item for item in found if item["model"] == name]
        lines += [f"## {name}: {some[0]['weights'] / 1e6:.0f} million weights", ""]
        lines += ["| mesh | sent, MiB | by kind | temporaries, MiB |", "|---|---|---|---|"]
        for item in some:
            total = sum(item["sent"].values()) / 2**20
            mebibytes = {key: size / 2**20 for key, size in item["sent"].items()}
            parts = ", ".join(f"{size:,.0f} {key}" for key, size in mebibytes.items() if size >= 1)
            mesh = " x ".join(f"{axis} {size}" for axis, size in item["mesh"].items())
            temporaries = item["temporary_bytes"] / 2**20
            lines.append(f"| {mesh} | {total:,.0f} | {parts} | {temporaries:,.0f} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])

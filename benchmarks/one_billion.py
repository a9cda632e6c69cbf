"""A model of a billion parameters on a small machine: load, train LoRA for a step, export, reload.

    python benchmarks/one_billion.py [--data <folder>]

The checkpoint is random, in the shape of Llama 3.2 1B: 1,235,814,400 weights, bfloat16, in several
safetensors files, with GPT-2's tokenizer. Everything is done in a temporary folder (about 11 GB).
Training and exports are the commands as users run them, each a process of its own; loads and logits
are processes of this file. Reported are the peak memory of each process (ru_maxrss: the memory of
CPU devices is host memory, and mapped pages of files count too) and its seconds.

In the end logits of one prompt are computed in float32 by the base, by the base with the exported
adapter, and by the merged models: the merged float32 model must equal the base with the adapter.
Writes results/one_billion-<date>.json and .md.
"""

import argparse
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from versus.machine import commit, hardware, tell

from jaxdpo.config.schema import MeshSection
from jaxdpo.data.tokenizer_json import load_tokenizer
from jaxdpo.distributed import sharding
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward, logits
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.folder import copy_tokenizer, write_json
from jaxdpo.models.hf.load_save import load_params, save_params
from jaxdpo.models.hf.peft import read_peft
from jaxdpo.models.params import abstract_params, logical_axes

RESULTS = Path(__file__).parent / "results"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "eos_token_id": 50_256,
    "dtype": "bfloat16",
}
SHARD_BYTES = 600_000_000
PROMPT = "Human: Which of these two answers is the better one, and why?"
TRAINING = {
    "lora.rank": 16,
    "model.compute_dtype": "bfloat16",
    "train.steps": 1,
    "train.batch_size": 8,
    "data.max_length": 512,
    "data.eval_fraction": 0,
    "eval.every": 0,
    "optim.learning_rate": 0.01,
    "log.tensorboard": "false",
    "train.compilation_cache": "null",
}
"""The learning rate is far too high, so that one step changes bfloat16 weights."""
FREE_BYTES = 10e9
"""Memory that has to be available: training peaked at 9.15 GiB (results of 2026-11-23)."""


# --- parts, each run in a process of its own ---


class Drawn:
    """A random parameter that is drawn when it is read, one layer at a time; norms are 1."""

    def __init__(self, path: str, shape: tuple[int, ...]):
        """Of this shape."""
        self.shape, self._norm, self._seed = shape, "norm" in path, sum(path.encode())

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """The layer, or all of it."""
        shape = self.shape[len(index) :]
        if self._norm:
            return np.ones(shape, np.float32)
        rng = np.random.default_rng((self._seed, *index))
        return np.float32(0.02) * rng.standard_normal(shape, dtype=np.float32)


def make(folder: Path, tokenizer: Path) -> dict[str, Any]:
    """The checkpoint."""
    folder.mkdir()
    copy_tokenizer(tokenizer, folder)
    write_json(folder / "config.json", MODEL)
    model = load_model_config(folder)
    shapes = abstract_params(model, "float32")
    drawn = jax.tree_util.tree_map_with_path(
        lambda path, leaf: Drawn(jax.tree_util.keystr(path), leaf.shape), shapes
    )
    files = save_params(folder, model, drawn, "bfloat16", SHARD_BYTES)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "files": len(files),
        "bytes": num_bytes(folder),
    }


def load(folder: Path, axis: str, dtype: str) -> dict[str, Any]:
    """Load the checkpoint, sharded over all devices along one axis of the mesh."""
    model = load_model_config(folder)
    mesh = sharding.make_mesh(MeshSection(**{axis: len(jax.devices())}))
    shapes = abstract_params(model, dtype)
    shardings = sharding.param_shardings(mesh, logical_axes(model), shapes)
    began = time.perf_counter()
    params = jax.block_until_ready(load_params(folder, model, shardings, dtype))
    seconds = time.perf_counter() - began
    return {
        "devices": len(jax.devices()),
        "weights_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "load_seconds": seconds,
    }


def answer(folder: Path, adapter: str, out: str) -> dict[str, Any]:
    """Logits of the prompt, in float32, by a model or by one with an adapter."""
    model = load_model_config(folder)
    params, lora_scale = load_params(folder, model, None, "float32"), 1.0
    if adapter:
        found = read_peft(Path(adapter), model)
        params, lora_scale = params | {"lora": found.adapter}, found.lora.scale
    options = ForwardOptions(compute_dtype="float32", lora_scale=lora_scale)
    tokens = jnp.asarray([load_tokenizer(str(folder))(PROMPT)["input_ids"]], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

    def run(params: Any) -> jax.Array:
        # A token sees the keys [0, its own position]: causal attention.
        k_start, k_end = jnp.zeros_like(positions), positions + 1
        hidden = forward(params, model, tokens, positions, k_start, k_end, options)
        return logits(params, model, hidden, options)

    found_logits = np.asarray(jax.jit(run)(params)[0])
    np.save(out, found_logits)
    return {"tokens": int(tokens.shape[1]), "likeliest": found_logits.argmax(-1).tolist()}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "make": lambda folder, tokenizer: make(Path(folder), Path(tokenizer)),
    "load": lambda folder, axis, dtype: load(Path(folder), axis, dtype),
    "answer": lambda folder, adapter, out: answer(Path(folder), adapter, out),
}


def part(name: str, *args: str) -> list[str]:
    """The command that runs a part; it prints what the part returns."""
    return [sys.executable, __file__, "--part", name, *args]


# --- measuring ---


def measured(command: list[str], log: Path, devices: int = 1) -> dict[str, Any]:
    """Run a command; returns its seconds, peak memory, and the JSON object of its last line."""
    tell(" ".join(command[1:]))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "NPROC": "32",
        "HF_HUB_OFFLINE": "1",
    }
    began = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    lines = log.read_text().splitlines()
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit("\n".join([*lines[-30:], f"failed: {' '.join(command)}"]))
    printed = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    tell(f"{seconds:.0f} s, {usage.ru_maxrss / 2**20:.2f} GiB")
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, **printed}


def run_all(data: Path, scratch: Path) -> dict[str, Any]:
    """Everything in order; one process at a time."""
    base, run, log = str(scratch / "base"), scratch / "run", scratch / "log"
    results = {"make": measured(part("make", base, str(data / "tokenizers" / "gpt2")), log)}
    results["load"] = measured(part("load", base, "data", "bfloat16"), log)
    for axis in ("fsdp", "tensor"):
        results[f"load, {axis}=8"] = measured(part("load", base, axis, "bfloat16"), log, devices=8)
    pairs = data / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    options = {"model.path": base, "data.train": f"[{pairs}]", "run_dir": run} | TRAINING
    train = measured(
        [
            sys.executable,
            "-m",
            "jaxdpo.train",
            *(f"{key}={value}" for key, value in options.items()),
        ],
        log,
    )
    (row,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    results["train"] = train | {"metrics": row}
    forms = {
        "adapter": ["form=adapter"],
        "merged": ["form=merged"],
        "merged float32": ["form=merged", "dtype=float32"],
    }
    for name, more in forms.items():
        out = scratch / name.replace(" ", "-")
        results[f"export, {name}"] = measured(
            [sys.executable, "-m", "jaxdpo.export", f"run_dir={run}", f"out={out}", *more], log
        )
        results[f"export, {name}"]["bytes"] = num_bytes(out)
    models = {"base": (base, ""), "adapter": (base, str(scratch / "adapter"))}
    models |= {
        name: (str(scratch / name.replace(" ", "-")), "") for name in ("merged", "merged float32")
    }
    answers = {}
    for name, (folder, adapter) in models.items():
        results[f"logits, {name}"] = measured(
            part("answer", folder, adapter, str(scratch / "logits.npy")), log
        )
        answers[name] = np.load(scratch / "logits.npy")
    results["difference"] = {
        name: float(np.abs(found - answers["adapter"]).max())
        for name, found in answers.items()
        if name != "adapter"
    }
    return results


def num_bytes(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# --- the report ---


def markdown(results: dict[str, Any]) -> str:
    """The table."""
    parts, machine, made = results["parts"], results["hardware"], results["parts"]["make"]
    step = parts["train"]["metrics"]
    load = parts["load"]
    notes = {
        "make": f"{made['parameters']:,} weights, {made['bytes'] / 1e9:.2f} GB "
        f"in {made['files']} files",
        "load": f"{load['load_seconds']:.1f} s of it loading; "
        f"the weights are {gib(load['weights_bytes'])}",
        "train": f"the step {step['step_seconds']:.1f} s, {step['tokens']:,} tokens; "
        "the rest: start, load, compilation, closed form, save",
    }
    rows = []
    for name, item in parts.items():
        if name.startswith("load, "):
            notes[name] = f"{item['load_seconds']:.1f} s of it loading"
        if name.startswith("export"):
            notes[name] = f"{item['bytes'] / 1e9:.3f} GB written"
        if "seconds" in item:
            peak = gib(item["peak_bytes"])
            rows.append(f"| {name} | {item['seconds']:.0f} | {peak} | {notes.get(name, '')} |")
    differences = parts["difference"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    training = " ".join(f"{key}={value}" for key, value in TRAINING.items())
    return "\n".join(
        [
            f"# One billion parameters, {results['date']}",
            "",
            f"{machine['cpu']}, {machine['cores_used']} cores, "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB; {versions}; "
            f"commit {results['commit']}. Command: `{results['command']}`",
            "",
            "A random Llama of the shape of Llama 3.2 1B, bfloat16. Each row is a process; "
            "memory is its peak (ru_maxrss, with the interpreter, libraries and mapped pages of "
            "files).",
            "",
            "| what | seconds | peak memory | |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Training: `{training}`, pairs of hh-rlhf.",
            f"Loss before the update {step['loss']:.6f} (ln 2 is {math.log(2):.6f}), "
            f"gradient norm {step['grad_norm']:.4g}.",
            "",
            "Logits of one prompt in float32, largest difference from the base with the adapter:",
            f"merged, float32 file {differences['merged float32']:.2e}; "
            f"merged, bfloat16 file {differences['merged']:.2e}; "
            f"the base without it {differences['base']:.2e}.",
            "",
        ]
    )


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / 2**30:.2f} GiB"


def main() -> int:
    """Run everything and write the result; 0 when what was exported computes what was trained."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("JAXDPO_DATA"),
        help="folder with hh-rlhf and tokenizers",
    )
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part[0]](*args.part[1:])))
        return 0
    if args.data is None:
        parser.error("name the folder of data: --data, or JAXDPO_DATA")
    available = 1024 * int(
        re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]
    )
    if available < FREE_BYTES:
        raise SystemExit(f"{gib(available)} of memory are free; this needs {gib(FREE_BYTES)}")
    date = datetime.date.today().isoformat()
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy", "orbax-checkpoint")}
    results: dict[str, Any] = {
        "date": date,
        "commit": commit(),
        "command": "python benchmarks/one_billion.py",
        "versions": versions,
    }
    results |= {
        "hardware": hardware(len(os.sched_getaffinity(0))),
        "model": MODEL,
        "training": TRAINING,
    }
    scratch = Path(tempfile.mkdtemp(prefix="one_billion-"))
    try:
        results["parts"] = run_all(Path(args.data).resolve(), scratch)
    finally:
        shutil.rmtree(scratch)
    differences = results["parts"]["difference"]
    results["agrees"] = differences["merged float32"] < 1e-3 * differences["base"]
    path = RESULTS / f"one_billion-{date}"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))
    return 0 if results["agrees"] else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Peak memory of loading and exporting: python -m tests.memory <what> <folder>, a process each.

The devices of a CPU are host memory too, so a load may hold the model once, and an export from
files none of it.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdpo.checkpoints.checkpoint import Checkpoints
from jaxdpo.config import cli
from jaxdpo.config.schema import Config, LoraSection, MeshSection, ModelSection
from jaxdpo.distributed import sharding
from jaxdpo.export import ExportConfig, export_run
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.folder import copy_model_files, write_json
from jaxdpo.models.hf.load_save import load_params, save_params
from jaxdpo.models.hf.lora_targets import lora_of
from jaxdpo.models.hf.weight_files import weights_fingerprint
from jaxdpo.models.lora import adapter_shapes
from jaxdpo.models.params import abstract_params, logical_axes
from tests.tiny import HF

SIZES = {
    "vocab_size": 16_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
MIB = 2**20


class Drawn:
    """A parameter that is drawn when it is asked for, one layer at a time."""

    def __init__(self, shape: tuple[int, ...]):
        """Of this shape."""
        self.shape = shape

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """Random numbers."""
        return np.float32(0.02) * np.random.default_rng(len(index)).standard_normal(
            self.shape[len(index) :], dtype=np.float32
        )


def make(folder: Path) -> None:
    """A model of 159M weights in bfloat16 files, a run that trained them all, and a LoRA run."""
    (folder / "model").mkdir(parents=True)
    write_json(folder / "model" / "config.json", HF | SIZES | {"dtype": "bfloat16"})
    model = load_model_config(folder / "model")
    drawn = jax.tree.map(lambda leaf: Drawn(leaf.shape), abstract_params(model, "float32"))
    save_params(folder / "model", model, drawn, "bfloat16", 100 * MIB)
    lora = LoraSection(rank=16, alpha=16.0)
    adapter = jax.tree.map(
        lambda leaf: jax.numpy.ones(leaf.shape), adapter_shapes(model, lora_of(lora, model))
    )
    save(folder, "lora", Config(lora=lora, model=ModelSection(path=str(folder / "model"))), adapter)
    save(
        folder,
        "full",
        Config(model=ModelSection(path=str(folder / "model"))),
        load_params(folder / "model", model, None, "float32"),
    )


def save(folder: Path, name: str, config: Config, params: Any) -> None:
    """A run's folder."""
    copy_model_files(folder / "model", folder / name / "model")
    (folder / name / "config.yaml").write_text(cli.to_yaml(config))
    with Checkpoints(folder / name) as checkpoints:
        checkpoints.save(
            1, {"params": params}, {"identity": {"weights": weights_fingerprint(folder / "model")}}
        )


def load(folder: Path, axis: str) -> None:
    """Load the model in float32 over all devices."""
    model = load_model_config(folder / "model")
    places = sharding.param_shardings(
        mesh_over(axis), logical_axes(model), abstract_params(model, "float32")
    )
    jax.block_until_ready(load_params(folder / "model", model, places, "float32"))


def mesh_over(axis: str) -> jax.sharding.Mesh:
    """All devices along one axis."""
    return sharding.make_mesh(MeshSection(**{axis: len(jax.devices())}))


def export(folder: Path, run: str, form: str) -> None:
    """Export a run."""
    export_run(ExportConfig(run_dir=str(folder / run), out=str(folder / f"out-{form}"), form=form))  # type: ignore[arg-type]


PARTS: dict[str, Callable[[Path], None]] = {
    "make": make,
    "load fsdp": lambda folder: load(folder, "fsdp"),
    "load tensor": lambda folder: load(folder, "tensor"),
    "export full": lambda folder: export(folder, "full", "full"),
    "export merged": lambda folder: export(folder, "lora", "merged"),
    "export adapter": lambda folder: export(folder, "lora", "adapter"),
}


def main(what: str, folder: Path) -> None:
    """Do it, and print the MiB that it held at most beyond what the process held before."""
    jax.block_until_ready(jax.device_put(np.zeros(8, np.float32)))  # the devices exist
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    PARTS[what](folder)
    print(json.dumps({"before": before, "peak": resident("VmHWM") - before}))


def resident(key: str) -> float:
    """MiB of this process in memory."""
    return int(re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def model_mib(config: ModelConfig) -> float:
    """MiB of a model's weights in float32."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, "float32"))) * 4 / MIB


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

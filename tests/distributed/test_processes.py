"""Exports of weights that are spread over two processes, as over two hosts: all gather, one
writes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.load_save import load_params
from jaxdpo.models.hf.peft import read_peft
from tests.families import tiny
from tests.models.test_lora import LORA, random_adapter
from tests.tiny import params

ROOT = Path(__file__).parents[2]
HOST = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxdpo.config.schema import MeshSection
from jaxdpo.distributed import sharding
from jaxdpo.models.hf.model_card import Card
from jaxdpo.models.hf.save_folder import export_adapter, export_model
from jaxdpo.models.shardings import trained_shardings
from tests.families import tiny
from tests.models.test_lora import LORA, random_adapter
from tests.tiny import params

out, model, card = Path(sys.argv[3]), tiny("llama"), Card(base_model="tiny")
mesh = sharding.make_mesh(MeshSection(fsdp=2, tensor=2))
weights = sharding.put(params(0, model), trained_shardings(model, mesh))
assert not weights["layers"]["attn"]["q"].is_fully_addressable
files = export_model(out / "model", model, weights, card=card, max_shard_bytes=50_000)
complete = len(files) > 4 and all(path.is_file() for path in files)
assert complete, "the folder is complete when any process goes on"
adapter = sharding.put(random_adapter(model, LORA), trained_shardings(model, mesh, LORA))
export_adapter(out / "adapter", model, adapter, LORA, base="base", card=card)
try:
    export_model(out / "model", model, weights, card=card)
except ValueError as error:
    assert "is not empty" in str(error)
    print("done")
"""


@pytest.mark.slow
def test_two_processes_write_one_folder(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(number), str(tmp_path)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [host.communicate(timeout=240) for host in hosts]
    assert [out.split()[-1:] for out, _ in outputs] == [["done"], ["done"]], outputs
    model = tiny("llama")
    assert load_model_config(tmp_path / "model") == model
    same(load_params(tmp_path / "model", model, None, "float32"), params(0, model))
    same(read_peft(tmp_path / "adapter", model).adapter, random_adapter(model, LORA))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}


def same(one: object, other: object) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)

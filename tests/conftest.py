"""What every test runs under: eight CPU devices, strict types and shapes, no network."""

import atexit
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a first call compiles, and machines differ
settings.load_profile("untimed")

# JAX reads these once, when it is first imported. NPROC: XLA's CPU thread pool; with as many
# threads as a small machine has cores, collectives of simulated devices that are queued without
# blocking wait for each other for ever.
os.environ.setdefault("NPROC", "32")
# Programs that compile five times faster and run slower: tests run a program once or twice.
# XLA_FLAGS= tests what users run.
emitters = (
    " --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""
)  # later versions abort on this flag
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0" + emitters)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if (
    "JAXDPO_TEST_HOME" not in os.environ
):  # caches below ~ start empty; processes that tests start share them
    os.environ["JAXDPO_TEST_HOME"] = tempfile.mkdtemp(prefix="jaxdpo-home-")
    atexit.register(shutil.rmtree, os.environ["JAXDPO_TEST_HOME"], ignore_errors=True)
os.environ["HOME"] = os.environ["JAXDPO_TEST_HOME"]

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell's background job ignores Ctrl-C, and so would what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that JAXDPO_DATA names; the test is skipped without it."""
    folder = os.environ.get("JAXDPO_DATA")
    if not folder:
        pytest.skip("JAXDPO_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(name, rows) -> path of a JSON lines file of these rows, or of a file of bytes."""

    def put(name: str, content: list[Any] | bytes) -> str:
        data = (
            content
            if isinstance(content, bytes)
            else b"".join(json.dumps(row).encode() + b"\n" for row in content)
        )
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return put

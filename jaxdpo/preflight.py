"""`python -m jaxdpo.preflight [same options as train]`: is this machine ready for that run? Before steps are paid for.

Looks at versions, devices, memory and disks, and reads the first of what train would read; nothing is trained, and what the hub
gives is fetched. Exit status: 0 all well, 1 some problem on some host, 2 wrong options.
"""

import os
import platform
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax

from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.data.sources import read_set
from jaxdpo.data.tokenize import load_tokenizer
from jaxdpo.distributed import processes
from jaxdpo.models.hf.config_json import load_model_config, read_config_json
from jaxdpo.models.hf.load_save import open_weights
from jaxdpo.training.program import Program
from jaxdpo.training.resolve import resolve, validate
from jaxdpo.training.trainer import model_folder
from jaxdpo.utils import files

MIB, GIB = 1 << 20, 1 << 30
PROBE_BYTES = 64 * MIB
LEAST_MEMORY = 2 * GIB
"""Free memory below which not even a small model compiles."""
LEAST_CACHE = GIB // 4
PLUGINS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")
ACCELERATORS = {
    "/dev/nvidiactl": 'an NVIDIA GPU is here: pip install ".[cuda13]"',
    "/dev/accel0": 'a TPU is here: pip install ".[tpu]"',
}
SEEN_SECONDS = 60.0
"""How long a file that one host made may take to show up on the others: network file systems remember for a while that it was absent."""


class Finding(NamedTuple):
    """One line of the table."""

    about: str
    text: str
    """What is there, or what is wrong and what to do."""
    ok: bool = True


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    config, _ = cli.load(Config, argv, command="preflight", checks=[validate])
    try:
        processes.connect()
        jax.devices()
    except (
        ValueError,
        RuntimeError,
    ) as error:  # the processes did not find each other, or there is no such device
        print(f"jaxdpo.preflight: JAX cannot start here: {error}", file=sys.stderr)
        return 1
    findings = list(preflight(config))
    others = jax.process_count() > 1
    for finding in findings:
        if processes.is_first() or not finding.ok:
            host = f"process {jax.process_index()}: " if others else ""
            print(
                f"{host}{'ok' if finding.ok else 'PROBLEM':8}{finding.about:10}"
                + finding.text.replace("\n", "\n" + " " * 18)
            )
    return int(processes.any_of(not all(finding.ok for finding in findings)))


def preflight(config: Config) -> Iterator[Finding]:
    """Every check; with several processes, all of them must take all."""
    yield _checked("versions", versions)
    yield _checked("devices", devices)
    yield _checked("memory", memory)
    size = None
    try:
        program = open_program(config)
        size = sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(program.abstract_state(bool(config.loss.ref_sync_every)))
        )
        mesh = (
            " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1)
            or "one device"
        )
        yield Finding(
            "model",
            f"{program.model.family}, {program.weights.num_all():,} parameters, {mesh}; {program.folder}",
        )
    except (ValueError, OSError) as error:
        yield Finding("model", str(error), ok=False)
    for option, names in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for name in names:
            yield _checked("data", lambda name=name, option=option: data(config, name, option))
    yield _checked("run_dir", lambda: run_dir(config, size))
    if jax.process_count() > 1:
        yield _checked("shared", lambda: shared(config))
    yield _checked("cache", lambda: cache(config.train.compilation_cache))


def _checked(about: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(about, check())
    except (ValueError, OSError, RuntimeError) as error:  # JAX's own errors are RuntimeErrors
        return Finding(about, str(error), ok=False)


def versions() -> str:
    """Versions of what computes."""
    found = {name: _version(name) for name in ("jaxdpo", "jax", "jaxlib", *PLUGINS)}
    return ", ".join(
        [
            f"Python {platform.python_version()}",
            *(f"{name} {version}" for name, version in found.items() if version),
        ]
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> str:
    """What JAX computes on.

    Raises:
        ValueError: it is the CPU, beside an accelerator that JAX does not see.
    """
    kinds = ", ".join(
        f"{count} x {kind}"
        for kind, count in Counter(device.device_kind for device in jax.devices()).items()
    )
    unused = [remedy for path, remedy in ACCELERATORS.items() if Path(path).exists()]
    if jax.default_backend() == "cpu" and unused and not os.environ.get("JAX_PLATFORMS"):
        raise ValueError(
            f"JAX sees {kinds} alone, but {unused[0]} (or, if the CPU is meant, JAX_PLATFORMS=cpu)"
        )
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    each = f", {limit / GIB:.1f} GiB each" if limit else ""
    several = (
        f", {jax.local_device_count()} of them here, {jax.process_count()} processes"
        if jax.process_count() > 1
        else ""
    )
    return f"{kinds}{each}{several}"


def memory() -> str:
    """Free memory of the host, within the limit of its container.

    Raises:
        ValueError: there is too little for anything.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = total
    meminfo, limit, used = (
        Path("/proc/meminfo"),
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory.current"),
    )
    if meminfo.exists():
        free = (
            int(
                next(
                    line
                    for line in meminfo.read_text().splitlines()
                    if line.startswith("MemAvailable")
                ).split()[1]
            )
            * 1024
        )
    if limit.exists() and limit.read_text().strip().isdecimal():
        total = min(total, int(limit.read_text()))
        free = min(free, total - int(used.read_text()))
    if free < LEAST_MEMORY:
        raise ValueError(
            f"{free / GIB:.1f} GiB of {total / GIB:.1f} are free: end what takes it, or use a larger machine"
        )
    return f"{free / GIB:.1f} GiB of {total / GIB:.1f} free"


def open_program(config: Config) -> Program:
    """Model, tokenizer, headers of the weight files and mesh, as train opens them; without data, so lengths of schedules are not known.

    Raises:
        ValueError: one of them cannot be used.
    """
    folder = model_folder(config)
    model = load_model_config(folder)
    resolved = resolve(config, model, read_config_json(folder))
    load_tokenizer(str(folder))
    if config.model.init == "pretrained":
        open_weights(folder, model)
    return Program.of(resolved, model, folder, total_steps=config.train.steps or 1)


def data(config: Config, name: str, option: str) -> str:
    """One entry of data.train or data.eval, up to its first pair.

    Raises:
        ValueError: it cannot be read.
    """
    report, records = read_set(name, config.data, option)
    if next(records, None) is None:
        raise ValueError(
            f"{option}={name}: has no row that can be used. python -m jaxdpo.data tells why"
        )
    return f"{name}: rows of form {report.format}, the first can be used"


def run_dir(config: Config, size: int | None) -> str:
    """Write to the folder of checkpoints and read back.

    Args:
        size: bytes of one checkpoint, where that is known.

    Raises:
        ValueError: it cannot be written to, or has no room for the checkpoints that are kept.
    """
    folder = Path(config.run_dir).expanduser().resolve() / "checkpoints"
    files.make_writable(folder, config.run_dir)
    more = config.checkpoint.keep + config.checkpoint.keep_best + 1
    if size is not None and (warning := files.check_room(folder, config.run_dir, size, more)):
        raise ValueError(warning)
    started = time.perf_counter()
    files.write_and_read(folder, PROBE_BYTES)
    seconds = time.perf_counter() - started
    taken = (
        ""
        if size is None
        else f"; a checkpoint takes up to {size / MIB:,.1f} MiB, about {seconds * size / PROBE_BYTES:.0f} s"
    )
    free = shutil.disk_usage(folder).free
    return f"{free / GIB:.0f} GiB free; {PROBE_BYTES // MIB} MiB written and read back in {seconds:.2f} s{taken}"


def shared(config: Config) -> str:
    """Whether all processes mean the same folder by run_dir.

    Raises:
        ValueError: this one does not see what the first wrote there.
    """
    folder = Path(config.run_dir).expanduser().resolve()
    path = folder / processes.from_first(f".preflight-{secrets.token_hex(4)}")
    if processes.is_first() and folder.is_dir():
        path.touch()
    processes.any_of(False)  # nobody looks before it is there
    until = time.monotonic() + SEEN_SECONDS
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(0.5)
    processes.any_of(False)  # and it stays until all have looked
    if processes.is_first():
        path.unlink(missing_ok=True)
    if not seen:
        raise ValueError(
            f"run_dir={config.run_dir}: is not the folder that the first process writes to. Name one that all hosts share"
        )
    return "run_dir is the same folder for all processes"


def cache(name: str | None) -> str:
    """Write to the folder of compiled programs.

    Raises:
        ValueError: it cannot be written to, or its disk is full.
    """
    if name is None:
        return "compiled programs are not kept"
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_and_read(folder, 1)
    except OSError as error:
        raise ValueError(
            f"train.compilation_cache={name}: cannot write there ({error.strerror}). Name another folder, or null"
        ) from None
    free = shutil.disk_usage(folder).free
    if free < LEAST_CACHE:
        raise ValueError(
            f"train.compilation_cache={name}: its disk has {free:,} bytes free. Free some space, name another folder, or null"
        )
    return f"{folder}, {free / GIB:.0f} GiB free"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

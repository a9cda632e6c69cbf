"""`python -m jaxdpo.preflight [same options as train]`: is this machine ready for that run?

Looks at versions, devices, memory and disks, and reads the first of what train would read, before
steps are paid for. Nothing is trained; models and data on the hub are downloaded. Exit codes:
0 ready, 1 some problem on some host, 2 wrong options.
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
from typing import Any, NamedTuple

import jax

from jaxdpo.checkpoints.run_lock import RunLock
from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.data.prepare import NO_VALIDATION
from jaxdpo.data.sources import read_set
from jaxdpo.data.tokenizer_json import load_tokenizer
from jaxdpo.distributed import processes
from jaxdpo.models.hf.config_json import load_model_config, read_config_json
from jaxdpo.models.hf.load_save import open_weights
from jaxdpo.training.program import Program
from jaxdpo.training.resolve import resolve, validate
from jaxdpo.training.trainer import model_folder
from jaxdpo.utils import files

MIB, GIB = 1 << 20, 1 << 30
PROBE_BYTES = 64 * MIB
"""Written and read back to time the disk: latency does not dominate, and it takes seconds only."""
MIN_MEMORY = 2 * GIB
"""Free memory below which not even a small model compiles."""
MIN_CACHE = GIB // 4
"""Free disk below which the programs of one large run may not fit."""
PLUGINS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")
ACCELERATORS = {
    "/dev/nvidiactl": 'an NVIDIA GPU is here: pip install ".[cuda13]"',
    "/dev/accel0": 'a TPU is here: pip install ".[tpu]"',
}
"""Device files of accelerators, and what to do if JAX does not see one."""
VISIBLE_SECONDS = 60.0
"""How long a new file of one host may take to be visible on the others: network file systems cache
for up to a minute that it was absent (NFS's acdirmax)."""


class Finding(NamedTuple):
    """One line of the table."""

    about: str
    text: str
    """What was found, or what is wrong and what to do."""
    ok: bool = True


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    config, _ = cli.load(Config, argv, command="preflight", checks=[validate])
    try:
        processes.connect()
        jax.devices()
    except (ValueError, RuntimeError) as error:
        # The processes did not find each other, or there is no such device.
        print(f"jaxdpo.preflight: JAX cannot start here: {error}", file=sys.stderr)
        return 1
    findings = list(preflight(config))
    for finding in findings:
        if processes.is_first() or not finding.ok:
            _print(finding)
    return int(processes.any_of(not all(finding.ok for finding in findings)))


def _print(finding: Finding) -> None:
    host = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    verdict = "ok" if finding.ok else "PROBLEM"
    text = finding.text.replace("\n", "\n" + " " * 18)
    print(f"{host}{verdict:8}{finding.about:10}{text}")


def preflight(config: Config) -> Iterator[Finding]:
    """Every check; with several processes, all of them must take all."""
    yield _checked("versions", versions)
    yield _checked("devices", devices)
    yield _checked("memory", memory)
    size = None
    try:
        program = open_program(config)
        size = checkpoint_bytes(config, program)
        yield Finding("model", describe_program(program))
    except (ValueError, OSError) as error:
        yield Finding("model", str(error), ok=False)
    for option, names in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for name in names:
            yield _checked("data", data, config, name, option)
    if config.data.train and not config.data.eval and config.data.eval_fraction:
        yield from validation(config)
    yield _checked("run_dir", run_dir, config, size)
    if jax.process_count() > 1:
        yield _checked("shared", shared, config)
    yield _checked("cache", cache, config.train.compilation_cache)


def _checked(about: str, check: Callable[..., str], *arguments: Any) -> Finding:
    try:
        return Finding(about, check(*arguments))
    except (ValueError, OSError, RuntimeError) as error:  # JAX's own errors are RuntimeErrors
        return Finding(about, str(error), ok=False)


# --- the machine ---


def versions() -> str:
    """Versions of Python, JAX and its plugins."""
    found = [f"Python {platform.python_version()}"]
    for name in ("jaxdpo", "jax", "jaxlib", *PLUGINS):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def devices() -> str:
    """The devices that JAX computes on.

    Raises:
        ValueError: it is the CPU, beside an accelerator that JAX does not see.
    """
    counts = Counter(device.device_kind for device in jax.devices())
    found = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
    unused = [remedy for path, remedy in ACCELERATORS.items() if Path(path).exists()]
    if jax.default_backend() == "cpu" and unused and not os.environ.get("JAX_PLATFORMS"):
        raise ValueError(
            f"JAX sees {found} alone, but {unused[0]} (or, if the CPU is meant, JAX_PLATFORMS=cpu)"
        )
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        found += f", {limit / GIB:.1f} GiB each"
    if jax.process_count() > 1:
        found += f", {jax.local_device_count()} of them here, {jax.process_count()} processes"
    return found


def memory() -> str:
    """Free memory of the host, within the limit of its container (cgroup v2).

    Raises:
        ValueError: there is too little for anything.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = total
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024  # the file counts in KiB
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdecimal():  # else it is "max": no limit
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total = min(total, int(limit.read_text()))
        free = min(free, total - used)
    if free < MIN_MEMORY:
        raise ValueError(
            f"{free / GIB:.1f} GiB of {total / GIB:.1f} are free: end what takes it, "
            "or use a larger machine"
        )
    return f"{free / GIB:.1f} GiB of {total / GIB:.1f} free"


# --- model and data ---


def open_program(config: Config) -> Program:
    """Model, tokenizer, headers of the weight files and mesh, as train opens them.

    The data are not read, so the number of steps, and with it the learning-rate schedule, is not
    known.

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


def describe_program(program: Program) -> str:
    """Family, size and mesh of the model, on one line."""
    axes = [f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1]
    mesh = " x ".join(axes) or "one device"
    family, count = program.model.family, program.weights.num_all()
    return f"{family}, {count:,} parameters, {mesh}; {program.folder}"


def checkpoint_bytes(config: Config, program: Program) -> int:
    """Bytes of one checkpoint."""
    state = program.abstract_state(bool(config.loss.ref_sync_every))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def data(config: Config, name: str, option: str) -> str:
    """One entry of data.train or data.eval, read up to its first pair.

    Raises:
        ValueError: it cannot be read, or has no valid row.
    """
    report, records = read_set(name, config.data, option)
    if next(records, None) is None:
        raise ValueError(
            f"{option}={name}: has no row that can be used. python -m jaxdpo.data tells why"
        )
    return f"{name}: rows of format {report.format}, the first can be used"


def validation(config: Config) -> Iterator[Finding]:
    """What to know where all rows of data.train have one prompt, so that none is held out."""
    prompts = set()
    try:
        for name in config.data.train:
            for record in read_set(name, config.data, "data.train")[1]:
                prompts.add(record.prompt)
                if len(prompts) > 1:
                    return
    except (ValueError, OSError):
        return  # `data` says what is wrong
    if not prompts:
        return
    told = f"{NO_VALIDATION}: all rows of data.train have the same prompt"
    if config.eval.every:
        told = f"eval.every={config.eval.every}: {told}. Set data.eval, or eval.every=0"
        yield Finding("split", told, ok=False)
    else:
        yield Finding("split", f"{told}. Set data.eval, or the run is not evaluated")


# --- folders ---


def run_dir(config: Config, size: int | None) -> str:
    """Write to the folder of checkpoints and read back, while no run uses it.

    Args:
        config: the options of the run.
        size: bytes of one checkpoint, where that is known.

    Raises:
        ValueError: it cannot be written to, has no room for the checkpoints that are kept, or a
            run is using it.
    """
    with RunLock(config.run_dir, cli.to_dict(config), command="preflight"):
        return _try_folder(config, size)


def _try_folder(config: Config, size: int | None) -> str:
    folder = Path(config.run_dir).expanduser().resolve() / "checkpoints"
    files.make_writable(folder, config.run_dir)
    if size is not None:
        # One more than is kept: the newest is written before the oldest is deleted.
        count = config.checkpoint.keep + config.checkpoint.keep_best + 1
        warning = files.check_room(folder, config.run_dir, size, count)
        if warning:
            raise ValueError(warning)
    started = time.perf_counter()
    files.write_and_read(folder, PROBE_BYTES)
    seconds = time.perf_counter() - started
    free = shutil.disk_usage(folder).free
    found = (
        f"{free / GIB:.0f} GiB free; "
        f"{PROBE_BYTES // MIB} MiB written and read back in {seconds:.2f} s"
    )
    if size is not None:
        expected = seconds * size / PROBE_BYTES
        found += f"; a checkpoint takes up to {size / MIB:,.1f} MiB, about {expected:.0f} s"
    return found


def shared(config: Config) -> str:
    """Check that run_dir is the same folder for all processes.

    Raises:
        ValueError: this process does not see the file that the first one wrote there.
    """
    folder = Path(config.run_dir).expanduser().resolve()
    path = folder / processes.from_first(f".preflight-{secrets.token_hex(4)}")
    if processes.is_first() and folder.is_dir():
        path.touch()
    processes.any_of(False)  # a barrier: no process looks before the file is written
    until = time.monotonic() + VISIBLE_SECONDS
    seen = path.exists()
    while not seen and time.monotonic() < until:
        time.sleep(0.5)
        seen = path.exists()
    processes.any_of(False)  # a barrier: the file is not deleted before all have looked
    if processes.is_first():
        path.unlink(missing_ok=True)
    if not seen:
        raise ValueError(
            f"run_dir={config.run_dir}: is not the folder that the first process writes to. "
            "Name one that all hosts share"
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
            f"train.compilation_cache={name}: cannot write there ({error.strerror}). "
            "Name another folder, or null"
        ) from None
    free = shutil.disk_usage(folder).free
    if free < MIN_CACHE:
        raise ValueError(
            f"train.compilation_cache={name}: its disk has {free:,} bytes free. "
            "Free some space, name another folder, or null"
        )
    return f"{folder}, {free / GIB:.0f} GiB free"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

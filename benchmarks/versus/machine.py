"""Machine and commit for a result file, and progress on stderr."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ISA = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)


def git(*command: str) -> str:
    """The output of a git command; empty without git."""
    return subprocess.run(
        ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()


def commit() -> str:
    """The measured commit, marked where the package has uncommitted changes."""
    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", ":/jaxdpo")
    return f"{head}+changes" if changed else head


def hardware(cores: int) -> dict[str, Any]:
    """CPU, cores used, memory."""
    lines = [
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    ]
    cpu = {key.strip(): value.strip() for key, value in lines}
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "isa": [flag for flag in ISA if flag in flags],
        "cores_used": cores,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
    }


def tell(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)

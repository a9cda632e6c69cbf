"""What a result file tells of the machine and the code, and progress on stderr."""

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
    """What git says; empty without git."""
    return subprocess.run(
        ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()


def commit() -> str:
    """The commit that is measured, marked when the package differs from it."""
    return git("rev-parse", "--short=12", "HEAD") + (
        "+changes" if git("status", "--porcelain", "--", ":/jaxdpo") else ""
    )


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

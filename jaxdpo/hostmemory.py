"""Host memory on a CPU run: keep what a step has used for the next one."""

import ctypes
import importlib.util
import os
import sys

ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # names and numbers of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Make the C library keep freed memory instead of giving it back to the system.

    XLA's CPU client allocates a step's temporary memory anew at every step. When that goes back to the system, the next step
    pays for every page again: a tenth of its time. Does nothing where an accelerator's plugin is installed or the C library is
    not glibc. Call it before JAX starts its threads.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, ACCELERATORS))
    if not (on_cpu and sys.platform == "linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            library.mallopt(option, value)

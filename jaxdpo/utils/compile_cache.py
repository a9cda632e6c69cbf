"""JAX's persistent compilation cache (train.compilation_cache)."""

from pathlib import Path

import jax

MIN_COMPILE_SECONDS = 0.5
"""Programs that compile faster are not stored. JAX's default is 1 s, which leaves out the small
programs of a start."""


def keep_compiled_programs(folder: str | None) -> None:
    """Store compiled programs in a folder, so that the next start reads them. None: no cache."""
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)

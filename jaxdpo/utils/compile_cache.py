"""Compiled programs on disk, so that the next start finds them."""

from pathlib import Path

import jax


def keep_compiled_programs(folder: str | None) -> None:
    """Keep compiled programs on disk, so that the next start finds them."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

"""Reading the parameters of a finished or running run, without touching it."""

from pathlib import Path

from jaxdpo.checkpoints.arrays import Tree, open_arrays, read_arrays
from jaxdpo.checkpoints.layout import complete_steps, read_meta
from jaxdpo.utils.manifest import find_damage


def restore_params(run_dir: str | Path, step: int | None = None) -> tuple[int, Tree, Tree]:
    """Read the policy of a run into host memory, without its optimizer state.

    Args:
        run_dir: the run's folder.
        step: which checkpoint. Default: the newest that is undamaged.

    Returns:
        (step, params as nested dict of numpy arrays, meta).

    Raises:
        ValueError: there is no such checkpoint, or the one asked for is damaged.
    """
    step, folder, meta = _find(run_dir, step)
    return step, read_arrays(folder, "params"), meta


def open_params(run_dir: str | Path, step: int | None = None) -> tuple[int, Tree, Tree]:
    """As restore_params, but arrays stay on disk until they are indexed.

    `np.asarray(array[3])` reads one layer, so a model larger than host memory can be exported.

    Returns:
        (step, params as nested dict of arrays on disk, with shape and dtype, meta).
    """
    step, folder, meta = _find(run_dir, step)
    return step, open_arrays(folder, "params"), meta


def _find(run_dir: str | Path, step: int | None) -> tuple[int, Path, Tree]:
    """Step, folder and meta of the checkpoint asked for, or of the newest that is undamaged."""
    folder = Path(run_dir).expanduser().resolve() / "checkpoints"
    steps = complete_steps(folder)
    candidates = reversed(steps)
    if step is not None:
        if step not in steps:
            raise ValueError(
                f"step={step}: there is no such checkpoint in {folder}. Choose from {steps}"
            )
        candidates = [step]
    reasons = []
    for candidate in candidates:
        damage = find_damage(folder / str(candidate))
        if damage is None:
            return candidate, folder / str(candidate), read_meta(folder, candidate)
        reasons.append(f"step {candidate} is damaged ({damage})")
    raise ValueError(
        f"run_dir={run_dir}: no intact checkpoint in {folder}: "
        f"{'; '.join(reasons) or 'none was saved'}"
    )

"""`python -m jaxdpo.train [--config file.yaml] [section.field=value ...]`: preference training, from a model and pairs to checkpoints.

Without any argument it runs the demo. Running the same command again resumes. Exit status: 0 done, 1 fault, 2 wrong options,
70 ended by the watchdog, 75 stopped by a signal and saved, or left alone by another process (docs/faults.md).

The same command on several machines, or several times on one, is one run: hosts.py says how processes find each other.
"""

import os
import sys
from collections.abc import Callable, Sequence

import jax

from jaxdpo import demo
from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.distributed import processes
from jaxdpo.training.dry_run import dry_run
from jaxdpo.training.loop import train
from jaxdpo.training.preemption import REQUEUE
from jaxdpo.training.resolve import validate
from jaxdpo.training.startup_checks import Fault
from jaxdpo.training.trainer import Trainer

DONE, FAULT = 0, 1


def main(argv: Sequence[str], leave: Callable[[int], object] | None = None) -> int:
    """The command; returns its exit status.

    Args:
        leave: see runner.train.
    """
    flags = {
        "--dry-run": "Show the first pairs as the model will see them, sizes, memory and time, and stop before the first step."
    }
    try:
        processes.connect()
        if not argv:
            return demo.main()
        config, given = cli.load(Config, argv, command="train", checks=[validate], flags=flags)
        if "--dry-run" in given:
            dry_run(Trainer.open(config))
            return DONE
        return DONE if train(config, leave) else REQUEUE
    except (ValueError, OSError, Fault) as error:
        print(
            "\n".join([f"jaxdpo.train: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr
        )
        return processes.end(FAULT)
    except jax.errors.JaxRuntimeError as error:
        if not processes.is_lost(error):
            raise
        print(
            f"jaxdpo.train: another process of this run is gone; the same command resumes from the newest checkpoint. {error}",
            file=sys.stderr,
        )
        return processes.end(REQUEUE)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], leave=os._exit))

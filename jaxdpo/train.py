"""`python -m jaxdpo.train [--config file.yaml] [section.field=value ...]`: preference training.

From a model and pairs to checkpoints. Without any argument it runs the demo. Running the same
command again resumes. Exit codes: 0 done, 1 fault, 2 wrong options, 70 ended by the watchdog,
75 stopped by SIGTERM or SIGINT and saved, or another process of the run was lost (docs/faults.md).

The same command on several machines, or several times on one, is one run:
distributed/processes.py says how the processes find each other.
"""

import os
import sys
from collections.abc import Callable, Sequence

from jaxdpo.utils.early_signals import REQUEUE, exit_on_signals

if __name__ == "__main__":
    # Before the imports below, which take seconds.
    exit_on_signals()

import jax

from jaxdpo import demo
from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.distributed import processes
from jaxdpo.training.dry_run import dry_run
from jaxdpo.training.loop import train
from jaxdpo.training.resolve import validate
from jaxdpo.training.startup_checks import Fault
from jaxdpo.training.trainer import Trainer

DONE, FAULT = 0, 1
FLAGS = {
    "--dry-run": "Show the first pairs as the model will see them, sizes, memory and time, "
    "and stop before the first step."
}


def main(argv: Sequence[str], leave: Callable[[int], object] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: the arguments after the command's name.
        leave: how a thread may end the process (see training.loop.train).
    """
    try:
        # First of all: JAX must know the other processes before anything touches a device.
        processes.connect()
        if leave is not None:
            exit_on_signals()  # again: JAX has installed handlers of its own for several processes
        if not argv:
            return demo.main([])
        config, given = cli.load(Config, argv, command="train", checks=[validate], flags=FLAGS)
        if "--dry-run" in given:
            dry_run(Trainer.open(config))
            return DONE
        return DONE if train(config, leave) else REQUEUE
    except (ValueError, OSError, Fault) as error:
        notes = getattr(error, "__notes__", [])
        print("\n".join([f"jaxdpo.train: {error}", *notes]), file=sys.stderr)
        return processes.end(FAULT)
    except jax.errors.JaxRuntimeError as error:
        if not processes.is_lost(error):
            raise
        print(
            "jaxdpo.train: another process of this run is gone; the same command resumes "
            f"from the newest checkpoint. {error}",
            file=sys.stderr,
        )
        return processes.end(REQUEUE)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], leave=os._exit))

"""`python -m jaxdpo.train [--config file.yaml] [section.field=value ...]`: preference training, from a model and pairs to checkpoints.

Without any argument it runs the demo. Running the same command again resumes. Exit status: 0 done, 1 fault, 2 wrong options,
75 stopped by a signal and saved.
"""

import sys
from collections.abc import Sequence

from jaxdpo import losses, options
from jaxdpo.checks import cross_check
from jaxdpo.config import Config
from jaxdpo.demo import demo
from jaxdpo.dryrun import dry_run
from jaxdpo.runner import Fault, train
from jaxdpo.session import Session

DONE, FAULT, REQUEUE = 0, 1, 75


def check_loss(config: Config) -> list[str]:
    """Problems of the loss options, as messages."""
    return losses.check(config.loss, config.reference)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    flags = {"--dry-run": "Show the first pairs as the model will see them, sizes, memory and time, and stop before the first step."}
    try:
        if not argv:
            return DONE if demo() else REQUEUE
        config, given = options.load(Config, argv, command="train", checks=[cross_check, check_loss], flags=flags)
        if "--dry-run" in given:
            dry_run(Session.open(config))
            return DONE
        return DONE if train(config) else REQUEUE
    except (ValueError, OSError, Fault) as error:
        print(f"jaxdpo.train: {error}", file=sys.stderr)
        return FAULT


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

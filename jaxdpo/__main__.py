"""The console script: `jaxdpo train ...` is `python -m jaxdpo.train ...`, and so on.

Only the chosen command is imported: `jaxdpo --help` starts without JAX.
"""

import difflib
import runpy
import sys
from collections.abc import Sequence

from jaxdpo import __version__

COMMANDS = {
    "train": "Preference training, from a model and pairs to checkpoints; run again, it resumes.",
    "data": "Look at preference data: counts, lengths, near-duplicates; convert it to JSON lines.",
    "generate": "Answer prompts with one or several models, or chat with them in the terminal.",
    "export": "Write a run's policy as a Hugging Face folder: full, merged, or as a PEFT adapter.",
    "plan": "Memory, time and price of a run on a machine, before the machine is rented.",
    "preflight": "Check that this machine is ready for a run: devices, memory, disks, model, data.",
    "demo": "Two small runs, SFT then DPO, on generated pairs: two minutes on a CPU, no network.",
}
"""Each command with what it does, in the order of --help."""

DONE, USAGE = 0, 2


def help_text() -> str:
    """The text of `jaxdpo --help`."""
    lines = ["jaxdpo COMMAND [--config FILE.yaml] [section.field=value ...]", ""]
    lines += [f"  {name:10} {summary}" for name, summary in COMMANDS.items()]
    lines += ["", "`jaxdpo COMMAND --help` lists the options of a command."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns the exit code.

    Args:
        argv: the arguments after `jaxdpo`. Default: those of the process, as the console script
            calls it.

    Raises:
        SystemExit: with the exit code of the command.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments:
        print(help_text(), file=sys.stderr)
        return USAGE
    name, *rest = arguments
    if name == "--help":
        print(help_text())
        return DONE
    if name == "--version":
        print(f"jaxdpo {__version__}")
        return DONE
    if name not in COMMANDS:
        print(f"jaxdpo: {unknown_command(name)}", file=sys.stderr)
        return USAGE
    sys.argv[1:] = rest
    # Not `import_module(...).main(rest)`: run as `__main__`, a command does exactly what
    # `python -m` does, and its own last lines stay the only place that says how it is called.
    runpy.run_module(f"jaxdpo.{name}", run_name="__main__", alter_sys=True)
    return DONE


def unknown_command(name: str) -> str:
    """What is wrong with a first argument that names no command."""
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    if near:
        return f"{name}: there is no such command. Did you mean {near[0]}?"
    return f"{name}: there is no such command. Commands: {', '.join(COMMANDS)}"


if __name__ == "__main__":
    raise SystemExit(main())

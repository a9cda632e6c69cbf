"""`python -m jaxdpo.generate model.path=<model> [prompts=<file>] [out=<file>]`: answers of models.

One model, or several side by side: "model.path=[a,b]". Without prompts, in a terminal, it is a
chat. Exit codes: 0 done, 1 fault, 2 wrong options, 130 interrupted.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdpo.config import cli
from jaxdpo.inference.batch import answer_all, load, show, to_row
from jaxdpo.inference.chat import chat
from jaxdpo.inference.options import GenerateConfig, check
from jaxdpo.inference.prompts import read_prompts
from jaxdpo.utils.compile_cache import keep_compiled_programs
from jaxdpo.utils.files import atomic_write

DONE, FAULT, INTERRUPTED = 0, 1, 130


def generate(config: GenerateConfig) -> None:
    """Answer the prompts, or chat.

    Raises:
        ValueError: a model or a prompt cannot be used.
        OSError: `out` cannot be written.
    """
    if config.prompts is None:
        models = {name: load(config, source) for name, source in config.sources.items()}
        chat(models, seed=config.seed)
        return
    prompts = read_prompts(config.prompts)
    if config.out is None:
        for prompt, answers in answer_all(config, prompts):
            show(prompt, answers)
        return
    # Opened before any model is loaded: a folder that cannot be written to is an error at once.
    with atomic_write(Path(config.out).expanduser()) as file:
        for prompt, answers in answer_all(config, prompts):
            file.write(json.dumps(to_row(prompt, answers), ensure_ascii=False) + "\n")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    config, _ = cli.load(GenerateConfig, argv, command="generate", checks=[check])
    keep_compiled_programs(config.compilation_cache)
    try:
        generate(config)
    except (ValueError, OSError) as error:
        print(f"jaxdpo.generate: {error}", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        print("\njaxdpo.generate: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""`python -m jaxdpo.generate model.path=<model> [prompts=<file>] [out=<file>]`: answers of one model, or of several side by side.

Without prompts, in a terminal, it is a conversation. Exit status: 0 done, 1 fault, 2 wrong options, 130 interrupted.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxdpo.config import cli
from jaxdpo.config.schema import MeshSection
from jaxdpo.config.sections import STRICT_KEYS, require
from jaxdpo.data.formats.preference import strings
from jaxdpo.distributed import sharding
from jaxdpo.inference.chat import converse
from jaxdpo.inference.model import Answer, LoadedModel, Sampling, Source
from jaxdpo.inference.prompts import Prompt, read_prompts
from jaxdpo.utils.compile_cache import keep_compiled_programs
from jaxdpo.utils.files import whole_file
from jaxdpo.utils.text import clean

DONE, FAULT, INTERRUPTED = 0, 1, 130
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateModelSection:
    """What answers."""

    __pydantic_config__ = STRICT_KEYS

    path: str | list[str] = dataclasses.field(default_factory=list)
    """Hugging Face folder, hub id, run folder or folder of a PEFT adapter; or a list of them, [a,b], which answer side by side."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit. Default: the hub's main branch."""
    base: str | None = None
    """Where the model under an adapter (of a run, or PEFT's) is now, or its name on the hub. Default: as the run or adapter says."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and matrix-product inputs; sums are float32 always. auto: float32 on CPU, bfloat16 on GPU and TPU."""

    @property
    def paths(self) -> list[str]:
        """The models as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Answer prompts with one model, or with several side by side. Without prompts, in a terminal, hold a conversation."""

    __pydantic_config__ = STRICT_KEYS

    model: GenerateModelSection = GenerateModelSection()
    prompts: str | list[str] | None = None
    """A file (.jsonl, .json, .parquet: rows with a column prompt, a string or messages; .txt: lines), or a list of prompts."""
    out: str | None = None
    """File to write, one JSON object a prompt. It must not exist. Default: show prompts and answers."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0: always the likeliest token. Above it: draw from the softmax of logits / temperature."""
    top_k: int = 0
    """Draw among the k likeliest tokens. 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability. 1: among all."""
    seed: int = 0
    """Seed of the draws. An answer depends on it, its prompt and the prompt's place among the prompts, on nothing else."""
    batch_size: int = 16
    """Prompts that are answered at a time."""
    max_prompt_length: int = 0
    """Longest prompt, in tokens; a longer one keeps its end. 0: what max_new_tokens leaves of the model's positions, at least half."""
    strings: Literal["message", "verbatim"] = "message"
    """What a prompt that is a string is to a model with a chat template. message: what a user says. verbatim: text to continue,
    as in training on pairs of strings."""
    chat_template: str | None = None
    """Path of a Jinja chat template. Default: that of the run, or of the tokenizer."""
    step: int | None = None
    """Which checkpoint of a run. Default: the newest that is undamaged."""
    compilation_cache: str | None = "~/.cache/jaxdpo"
    """Folder that keeps compiled programs, so that the next start is quicker. null: keep none."""
    mesh: MeshSection = dataclasses.field(default_factory=MeshSection)

    def __post_init__(self) -> None:
        drawn = self.temperature > 0
        require(
            (self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens}: must be at least 1"),
            (
                self.temperature >= 0,
                f"temperature={self.temperature}: must be 0 (the likeliest token) or positive",
            ),
            (self.top_k >= 0, f"top_k={self.top_k}: must be 0 (all tokens) or at least 1"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1"),
            (
                drawn or self.top_k <= 0,
                f"top_k={self.top_k}: does nothing while temperature=0. Set temperature",
            ),
            (
                drawn or self.top_p >= 1 or self.top_p <= 0,
                f"top_p={self.top_p}: does nothing while temperature=0. Set temperature",
            ),
            (0 <= self.seed < 1 << 32, f"seed={self.seed}: must lie between 0 and {(1 << 32) - 1}"),
            (self.batch_size >= 1, f"batch_size={self.batch_size}: must be at least 1"),
            (
                self.max_prompt_length >= 0,
                f"max_prompt_length={self.max_prompt_length}: must be 0 (automatic) or at least 1",
            ),
            (self.step is None or self.step >= 0, f"step={self.step}: must not be negative"),
        )

    @property
    def sources(self) -> dict[str, Source]:
        """The models by name: the last part of the path, or all of it where two would have one name."""
        short = [Path(path).name for path in self.model.paths]
        return {
            name if name and short.count(name) == 1 else path: Source(
                path=path,
                revision=self.model.revision,
                base=self.model.base,
                step=self.step,
                chat_template=self.chat_template,
                max_prompt_length=self.max_prompt_length,
                strings_are_messages=self.strings == "message",
            )
            for name, path in zip(short, self.model.paths, strict=True)
        }

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        return Sampling(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}
        )


def check(config: GenerateConfig) -> list[str]:
    """What is wrong with the options, as far as it shows before a model is loaded."""
    paths, out = config.model.paths, None if config.out is None else Path(config.out).expanduser()
    kinds = {source.kind for source in config.sources.values()}
    checks = [
        (bool(paths), "model.path=[]: name at least one model"),
        (len(set(paths)) == len(paths), f"model.path={paths}: names a model twice"),
        (
            config.step is None or "run" in kinds,
            f"step={config.step}: model.path names no run. Leave it out",
        ),
        (
            config.model.base is None or bool(kinds & {"run", "adapter"}),
            f"model.base={config.model.base}: model.path names no adapter and no run that trained one. Leave it out",
        ),
        (
            config.prompts is not None or sys.stdin.isatty(),
            "prompts=null: there is nothing to answer. Name a file or a list of prompts, or talk to the model in a terminal",
        ),
        (
            config.prompts is not None or out is None,
            f"out={out}: a conversation goes to no file. Name prompts",
        ),
        (out is None or not out.exists(), f"out={out}: exists already. Name a new file"),
    ]
    problems = [problem for path in paths for problem in _check_path(path)] + [
        message for ok, message in checks if not ok
    ]
    try:
        if config.prompts is not None:
            read_prompts(config.prompts)
    except ValueError as error:
        problems += str(error).split("\n")
    return problems


def _check_path(name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        known = any(
            (path / file).is_file()
            for file in ("config.json", "config.yaml", "adapter_config.json")
        )
        why = "has neither config.json (a model), nor config.yaml (a run), nor adapter_config.json (an adapter)"
        return [] if known else [f"model.path={name}: {why}. Name the folder of one"]
    if path.exists():
        return [f"model.path={name}: is a file. Name the folder that it is in"]
    return (
        []
        if HUB_ID.fullmatch(name)
        else [f"model.path={name}: no such folder, and no hub id (owner/name) either"]
    )


def load(config: GenerateConfig, source: Source) -> LoadedModel:
    """Load one of the models.

    Raises:
        ValueError: it cannot be used.
    """
    mesh, dtype = sharding.make_mesh(config.mesh), config.model.compute_dtype
    if dtype == "auto":
        dtype = sharding.default_dtype(mesh)
    return LoadedModel.open(source, config.sampling, mesh, dtype)


def answer_all(
    config: GenerateConfig, prompts: Sequence[Prompt]
) -> Iterator[tuple[Prompt, dict[str, Answer]]]:
    """Each prompt with the models' answers; one model is in memory at a time.

    Raises:
        ValueError: a model or a prompt cannot be used.
    """

    def answers(name: str, source: Source) -> list[Answer]:
        def report(done: int) -> None:
            print(f"{clean(name)}: {done} of {len(prompts)} prompts answered", file=sys.stderr)

        found = load(config, source).answer(prompts, report=report)
        if cut := sum(answer.prompt_truncated for answer in found):
            print(
                f"{clean(name)}: {cut} prompts lost their beginning (max_prompt_length)",
                file=sys.stderr,
            )
        return found

    by_model = {name: answers(name, source) for name, source in config.sources.items()}
    for number, prompt in enumerate(prompts):
        yield prompt, {name: found[number] for name, found in by_model.items()}


def row(prompt: Prompt, answers: Mapping[str, Answer]) -> dict[str, Any]:
    """A line of the file: of one model each value as it is, of several an object with a value by model."""
    text = (
        prompt.text
        if isinstance(prompt.text, str)
        else [dataclasses.asdict(turn) for turn in prompt.text]
    )
    by_key = {
        key: {name: getattr(answer, key) for name, answer in answers.items()}
        for key in Answer._fields
    }
    return {"prompt": text} | {
        key: values if len(values) > 1 else next(iter(values.values()))
        for key, values in by_key.items()
    }


def show(prompt: Prompt, answers: Mapping[str, Answer]) -> None:
    """A prompt and its answers for the terminal."""
    print(
        clean("\n".join(f"> {line}" for text in strings(prompt.text) for line in text.split("\n")))
    )
    for name, answer in answers.items():
        print(clean((f"[{name}] " if len(answers) > 1 else "") + answer.text.strip()) + "\n")


def run(config: GenerateConfig) -> None:
    """Answer the prompts, or talk.

    Raises:
        ValueError: a model or a prompt cannot be used.
        OSError: `out` cannot be written.
    """
    if config.prompts is None:
        converse(
            {name: load(config, source) for name, source in config.sources.items()},
            seed=config.seed,
        )
        return
    prompts = read_prompts(config.prompts)
    if config.out is None:
        for item in answer_all(config, prompts):
            show(*item)
        return
    with whole_file(
        Path(config.out).expanduser()
    ) as file:  # opened first, so that a place that cannot be written to is known at once
        for item in answer_all(config, prompts):
            file.write(json.dumps(row(*item), ensure_ascii=False) + "\n")


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    config, _ = cli.load(GenerateConfig, argv, command="generate", checks=[check])
    keep_compiled_programs(config.compilation_cache)
    try:
        run(config)
    except (ValueError, OSError) as error:
        print(f"jaxdpo.generate: {error}", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        print("\njaxdpo.generate: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""The options of `python -m jaxdpo.generate`."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, Literal

from jaxdpo.config.data_options import invalid_kwargs
from jaxdpo.config.schema import MeshSection
from jaxdpo.config.sections import MAX_SEED, require, section
from jaxdpo.inference.model import Sampling, Source
from jaxdpo.inference.prompts import read_prompts

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
MODEL_FILES = ("config.json", "config.yaml", "adapter_config.json")
"""The files by which the folders of a model, a run and an adapter are known."""


@section
class GenerateModelSection:
    """The models that answer."""

    path: str | list[str] = dataclasses.field(default_factory=list)
    """Hugging Face folder, hub id, run folder or folder of a PEFT adapter; or a list of them,
    "[a,b]", which answer side by side."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit. Default: the hub's main branch."""
    base: str | None = None
    """Where the base model of an adapter (of a run, or PEFT's) is now, or its name on the hub.
    Default: as the run or adapter says."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and of the inputs of matrix multiplications; sums are float32 always. auto:
    float32 on CPU, bfloat16 on GPU and TPU."""

    @property
    def paths(self) -> list[str]:
        """The models as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


@section
class GenerateConfig:
    """Answer prompts with one model, or with several side by side. Without prompts, in a terminal,
    chat."""

    model: GenerateModelSection = GenerateModelSection()
    prompts: str | list[str] | None = None
    """A file (.jsonl, .json, .csv, .parquet: rows with a column prompt, a string or messages; .txt:
    lines), or a list of prompts."""
    out: str | None = None
    """File to write, one JSON object a prompt. It must not exist. Default: print prompts and
    answers."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0: greedy, always the likeliest token. Above it: sample from the softmax of logits /
    temperature."""
    top_k: int = 0
    """Sample among the k likeliest tokens. 0: among all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability. 1: among all."""
    seed: int = 0
    """Seed of the sampling. An answer depends on it, its prompt and the prompt's number among the
    prompts, on nothing else."""
    batch_size: int = 16
    """Prompts that are answered at a time."""
    max_prompt_length: int = 0
    """Longest prompt, in tokens; a longer one keeps its end. 0: what max_new_tokens leaves of the
    model's positions, at least half."""
    strings: Literal["message", "verbatim", "templated"] | None = None
    """What a prompt that is a string means to a model with a chat template. message: a user's
    message. verbatim: text to continue, as in training on pairs of strings. templated: what a chat
    template wrote, in which special tokens are read as such. Default: the run's data.strings, else
    message."""
    chat_template: str | None = None
    """Path of a Jinja chat template, or the name of one of the tokenizer's. Default: that of the
    run, or of the tokenizer."""
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Values of variables that the chat template reads, e.g. {enable_thinking: false}. Default:
    those of the run."""
    thinking: bool | None = None
    """Where an answer begins if the chat template knows thoughts. true: behind its generation
    prompt, with thoughts; false: behind what it writes before an answer without any (Qwen3: an
    empty think block). Default: as most pairs of the run were trained; else by
    chat_template_kwargs, else false where that only adds to the generation prompt."""
    step: int | None = None
    """Which checkpoint of a run. Default: the newest that is undamaged."""
    compilation_cache: str | None = "~/.cache/jaxdpo"
    """Folder of compiled programs, with which the next start is faster. null: none."""
    mesh: MeshSection = dataclasses.field(default_factory=MeshSection)

    def __post_init__(self) -> None:
        greedy = self.temperature <= 0
        require(
            (self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens}: must be at least 1"),
            (
                self.temperature >= 0,
                f"temperature={self.temperature}: must be 0 (the likeliest token) or positive",
            ),
            (self.top_k >= 0, f"top_k={self.top_k}: must be 0 (all tokens) or at least 1"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1"),
            (
                not (greedy and self.top_k > 0),
                f"top_k={self.top_k}: does nothing while temperature=0. Set temperature",
            ),
            (
                not (greedy and 0 < self.top_p < 1),
                f"top_p={self.top_p}: does nothing while temperature=0. Set temperature",
            ),
            (0 <= self.seed <= MAX_SEED, f"seed={self.seed}: must lie between 0 and {MAX_SEED}"),
            (self.batch_size >= 1, f"batch_size={self.batch_size}: must be at least 1"),
            (
                self.max_prompt_length >= 0,
                f"max_prompt_length={self.max_prompt_length}: must be 0 (automatic) or at least 1",
            ),
            (self.step is None or self.step >= 0, f"step={self.step}: must not be negative"),
        )

    @property
    def sources(self) -> dict[str, Source]:
        """The models by name: the last part of the path, or all of it where two share that."""
        last_parts = [Path(path).name for path in self.model.paths]
        found = {}
        for path, last_part in zip(self.model.paths, last_parts, strict=True):
            unique = last_part and last_parts.count(last_part) == 1
            found[last_part if unique else path] = Source(
                path=path,
                revision=self.model.revision,
                base=self.model.base,
                step=self.step,
                chat_template=self.chat_template,
                max_prompt_length=self.max_prompt_length,
                strings=self.strings,
                chat_template_kwargs=self.chat_template_kwargs,
                thinking=self.thinking,
            )
        return found

    @property
    def sampling(self) -> Sampling:
        """How answers are sampled."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            batch_size=self.batch_size,
        )


def check(config: GenerateConfig) -> list[str]:
    """Problems that show before a model is loaded, as messages."""
    problems = _check_models(config)
    problems += invalid_kwargs("chat_template_kwargs", config.chat_template_kwargs)
    out = None if config.out is None else Path(config.out).expanduser()
    if config.prompts is None and not sys.stdin.isatty():
        problems.append(
            "prompts=null: there is nothing to answer. Name a file or a list of prompts, "
            "or chat with the model in a terminal"
        )
    if config.prompts is None and out is not None:
        problems.append(f"out={out}: a chat is not written to a file. Name prompts")
    if out is not None and out.exists():
        problems.append(f"out={out}: exists already. Name a new file")
    if config.prompts is not None:
        try:
            read_prompts(config.prompts)
        except ValueError as error:
            problems += str(error).split("\n")
    return problems


def _check_models(config: GenerateConfig) -> list[str]:
    paths = config.model.paths
    kinds = {source.kind for source in config.sources.values()}
    problems = []
    for path in paths:
        problem = _check_path(path)
        if problem is not None:
            problems.append(problem)
    if not paths:
        problems.append("model.path=[]: name at least one model")
    if len(set(paths)) < len(paths):
        problems.append(f"model.path={paths}: names a model twice")
    if config.step is not None and "run" not in kinds:
        problems.append(f"step={config.step}: model.path names no run. Leave it out")
    if config.model.base is not None and not kinds & {"run", "adapter"}:
        problems.append(
            f"model.base={config.model.base}: model.path names no adapter and no run that "
            "trained one. Leave it out"
        )
    return problems


def _check_path(name: str) -> str | None:
    """Why this can be no model; None if it may be one."""
    path = Path(name).expanduser()
    if path.is_dir():
        if any((path / file).is_file() for file in MODEL_FILES):
            return None
        return (
            f"model.path={name}: has neither config.json (a model), nor config.yaml (a run), "
            "nor adapter_config.json (an adapter). Name the folder of one"
        )
    if path.exists():
        return f"model.path={name}: is a file. Name the folder that it is in"
    if not HUB_ID.fullmatch(name):
        return f"model.path={name}: no such folder, and no hub id (owner/name) either"
    return None

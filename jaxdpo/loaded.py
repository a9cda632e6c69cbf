"""A model that is ready to answer: from a Hugging Face folder, from the hub, or from a run."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdpo import sharding
from jaxdpo.checkpoint import restore_params
from jaxdpo.data.chat import EncodedPrompt, Encoder, decode_answer, load_tokenizer, read_template
from jaxdpo.data.prompts import Prompt
from jaxdpo.data.records import Dropped, Message
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions, Params, abstract_params, logical_axes
from jaxdpo.models.hf_folder import fetch_model, generation_config
from jaxdpo.models.hfconfig import from_hf, read_config_json
from jaxdpo.models.weights import load_params
from jaxdpo.runfolder import model_files, read_run_config
from jaxdpo.sampling import generate


class Answer(NamedTuple):
    """What a model says."""

    text: str
    """Without the token that ends it, and without special tokens."""
    tokens: int
    """Its length, a token that ends it included."""
    finish: str
    """stop: the model ended it. length: it was cut."""
    prompt_tokens: int
    """Length of the prompt."""
    prompt_truncated: bool
    """Whether the prompt lost its beginning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn, as sampling.generate takes it."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model is and how its prompts are read; nothing of it loaded."""

    path: str
    """Hugging Face folder, hub id or run folder."""
    revision: str | None = None
    """Of a hub model."""
    step: int | None = None
    """Which checkpoint of a run. Default: the newest that is undamaged."""
    chat_template: str | None = None
    """File with a chat template. Default: that of the run, or of the tokenizer."""
    max_prompt_length: int = 0
    """Longest prompt; a longer one keeps its end. 0: what max_new_tokens leaves of the model's positions, half of them at least."""
    strings_are_messages: bool = True
    """Whether a prompt string is what a user says, where there is a chat template; else it is text to continue."""

    @property
    def run_dir(self) -> Path | None:
        """The run folder, if it is one."""
        folder = Path(self.path).expanduser()
        return folder if (folder / "config.yaml").is_file() else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Weights on the devices, and what turns prompts into tokens and tokens into answers."""

    model: ModelConfig
    params: Params
    options: ForwardOptions
    encoder: Encoder
    stop_ids: tuple[int, ...]
    source: Source
    sampling: Sampling

    @classmethod
    def open(cls, source: Source, sampling: Sampling, mesh: Mesh, compute_dtype: str) -> "LoadedModel":
        """Load a model.

        Args:
            source: where it is.
            sampling: how it is to answer.
            mesh: over which weights and rows are spread as in training.
            compute_dtype: type of the products' inputs, in which the weights are held too.

        Raises:
            ValueError: the folder, its weights or its tokenizer cannot be used.
        """
        folder, template = _files(source)
        raw = read_config_json(folder)
        model = from_hf(raw)
        tokenizer = load_tokenizer(str(folder))
        room = max(model.max_positions - sampling.max_new_tokens, model.max_positions // 2)
        longest = min(source.max_prompt_length or room, model.max_positions)
        encoder = Encoder(tokenizer, read_template(tokenizer, template), model.max_positions, longest)
        ends = generation_config(folder, raw).get("eos_token_id") or []
        return cls(
            model=model,
            params=_load(source, folder, model, mesh, jnp.dtype(compute_dtype)),
            options=ForwardOptions(compute_dtype=compute_dtype, mesh=mesh),
            encoder=encoder,
            stop_ids=tuple(dict.fromkeys([*encoder.stop_ids, *([ends] if isinstance(ends, int) else ends)])),
            source=source,
            sampling=sampling,
        )

    def answer(self, prompts: Sequence[Prompt], seed: int | None = None, report: Callable[[int], None] | None = None) -> list[Answer]:
        """Answer each prompt.

        Args:
            prompts: at least one.
            seed: in place of the sampling's own.
            report: told after each batch how many prompts are answered.

        Raises:
            ValueError: naming each prompt that the tokenizer or the template does not take.
        """
        encoded = self._encode(prompts)
        answers = generate(
            self.params,
            self.model,
            [prompt.ids for prompt in encoded],
            options=self.options,
            stop_ids=self.stop_ids,
            num_tokens=min(len(self.encoder.tokenizer), self.model.vocab_size),
            report=report,
            **dataclasses.asdict(self.sampling) | ({} if seed is None else {"seed": seed}),
        )
        return [self._read(prompt, ids) for prompt, ids in zip(encoded, answers, strict=True)]

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        as_message = self.source.strings_are_messages and self.encoder.template is not None
        texts = [(Message("user", p.text),) if as_message and isinstance(p.text, str) else p.text for p in prompts]
        found = [self.encoder.encode_prompt(text) for text in texts]
        if problems := [f"{p.place}: {item.reason}" for p, item in zip(prompts, found, strict=True) if isinstance(item, Dropped)]:
            raise ValueError("\n".join(problems))
        return [item for item in found if isinstance(item, EncodedPrompt)]

    def _read(self, prompt: EncodedPrompt, ids: np.ndarray) -> Answer:
        stopped = ids.size > 0 and int(ids[-1]) in self.stop_ids
        text = decode_answer(self.encoder.tokenizer, prompt.ids, ids[:-1] if stopped else ids, skip_special=True)
        return Answer(text, len(ids), "stop" if stopped else "length", len(prompt.ids), prompt.truncated)


def _files(source: Source) -> tuple[Path, str | None]:
    """The folder with config.json and tokenizer, and the file with the chat template, if it is not the tokenizer's."""
    folder, run_dir = Path(source.path).expanduser(), source.run_dir
    if run_dir is None:
        return folder if folder.is_dir() else fetch_model(source.path, source.revision), source.chat_template
    config = read_run_config(run_dir)
    folder = model_files(run_dir, config)
    own_template = folder == run_dir / "model"  # the run's copy of the tokenizer has the template that it was trained with
    return folder, source.chat_template or (None if own_template else config.data.chat_template)


def _load(source: Source, folder: Path, model: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> Params:
    """The weights, each device's share on it."""
    shardings = sharding.param_shardings(mesh, logical_axes(model), abstract_params(model, dtype.name))
    if source.run_dir is None:
        return load_params(folder, model, shardings, dtype)
    _, params, _ = restore_params(source.run_dir, source.step)
    return sharding.put(jax.tree.map(lambda leaf: leaf.astype(dtype), params), shardings)

"""A model that is ready to answer: from a Hugging Face folder, from the hub, from a run, or from an adapter and its base."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdpo.checkpoints.restore import restore_params
from jaxdpo.checkpoints.run_dir import (
    check_base,
    find_base,
    lora_of_run,
    model_files,
    read_run_config,
)
from jaxdpo.data.chat_template import read_template
from jaxdpo.data.detokenize import decode_answer
from jaxdpo.data.formats.preference import Dropped, Message
from jaxdpo.data.tokenize import EncodedPrompt, Encoder, load_tokenizer
from jaxdpo.distributed import sharding
from jaxdpo.inference.prompts import Prompt
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.hf.config_json import from_hf, read_config_json
from jaxdpo.models.hf.folder import end_ids, read_json
from jaxdpo.models.hf.hub import fetch_model
from jaxdpo.models.hf.load_weights import load_weights
from jaxdpo.models.hf.peft import CONFIG as ADAPTER_CONFIG
from jaxdpo.models.hf.peft import read_peft
from jaxdpo.models.kv_cache import for_decoding
from jaxdpo.models.params import Params
from jaxdpo.models.sampling import generate
from jaxdpo.models.shardings import trained_shardings


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
    """Hugging Face folder, hub id, run folder, or the folder of a PEFT adapter."""
    revision: str | None = None
    """Of a hub model."""
    base: str | None = None
    """Folder or hub id of the model under an adapter. Default: the one that the run or the adapter names."""
    step: int | None = None
    """Which checkpoint of a run. Default: the newest that is undamaged."""
    chat_template: str | None = None
    """File with a chat template. Default: that of the run, or of the tokenizer."""
    max_prompt_length: int = 0
    """Longest prompt; a longer one keeps its end. 0: what max_new_tokens leaves of the model's positions, half of them at least."""
    strings_are_messages: bool = True
    """Whether a prompt string is what a user says, where there is a chat template; else it is text to continue."""

    @property
    def folder(self) -> Path:
        """The path as one, which a hub id is not."""
        return Path(self.path).expanduser()

    @property
    def kind(self) -> str:
        """run, adapter (a PEFT folder) or model (a Hugging Face folder or a hub id)."""
        marks = {"run": "config.yaml", "adapter": ADAPTER_CONFIG}
        return next(
            (kind for kind, file in marks.items() if (self.folder / file).is_file()), "model"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Weights on the devices, in the form for decoding, and what turns prompts into tokens and tokens into answers."""

    model: ModelConfig
    params: Params
    options: ForwardOptions
    encoder: Encoder
    stop_ids: tuple[int, ...]
    source: Source
    sampling: Sampling

    @classmethod
    def open(
        cls, source: Source, sampling: Sampling, mesh: Mesh, compute_dtype: str
    ) -> "LoadedModel":
        """Load a model.

        Args:
            source: where it is.
            sampling: how it is to answer.
            mesh: over which weights and rows are spread as in training.
            compute_dtype: type of the products' inputs, in which the weights are held too.

        Raises:
            ValueError: the folder, its weights or its tokenizer cannot be used.
        """
        files = _files(source)
        raw = read_config_json(files.model)
        model = from_hf(raw)
        tokenizer = load_tokenizer(str(files.tokenizer))
        room = max(model.max_positions - sampling.max_new_tokens, model.max_positions // 2)
        longest = min(source.max_prompt_length or room, model.max_positions)
        encoder = Encoder(
            tokenizer, read_template(tokenizer, files.template), model.max_positions, longest
        )
        params, scale = _load(source, files, model, mesh, compute_dtype)
        options = ForwardOptions(compute_dtype=compute_dtype, lora_scale=scale, mesh=mesh)
        return cls(
            model=model,
            params=jax.jit(lambda params: for_decoding(params, model, options))(params),
            options=options,
            encoder=encoder,
            stop_ids=tuple({*encoder.stop_ids, *end_ids(files.model, raw)}),
            source=source,
            sampling=sampling,
        )

    def answer(
        self,
        prompts: Sequence[Prompt],
        seed: int | None = None,
        report: Callable[[int], None] | None = None,
    ) -> list[Answer]:
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
        texts = [
            (Message("user", p.text),) if as_message and isinstance(p.text, str) else p.text
            for p in prompts
        ]
        found = [self.encoder.encode_prompt(text) for text in texts]
        if problems := [
            f"{p.place}: {item.reason}"
            for p, item in zip(prompts, found, strict=True)
            if isinstance(item, Dropped)
        ]:
            raise ValueError("\n".join(problems))
        return [item for item in found if isinstance(item, EncodedPrompt)]

    def _read(self, prompt: EncodedPrompt, ids: np.ndarray) -> Answer:
        stopped = ids.size > 0 and int(ids[-1]) in self.stop_ids
        text = decode_answer(
            self.encoder.tokenizer, prompt.ids, ids[:-1] if stopped else ids, skip_special=True
        )
        return Answer(
            text, len(ids), "stop" if stopped else "length", len(prompt.ids), prompt.truncated
        )


class _Files(NamedTuple):
    """Where a model's parts lie."""

    model: Path
    """Folder with config.json."""
    tokenizer: Path
    template: str | None
    """File with the chat template, if it is not the tokenizer's."""


def _files(source: Source) -> _Files:
    folder = source.folder
    if source.kind == "run":
        config = read_run_config(folder)
        model = model_files(folder, config)
        own_template = (
            model == folder / "model"
        )  # the run's copy of the tokenizer has the template that it was trained with
        return _Files(
            model,
            model,
            source.chat_template or (None if own_template else config.data.chat_template),
        )
    if source.kind == "adapter":
        base = _adapter_base(source)
        own_tokenizer = (folder / "tokenizer_config.json").is_file()
        return _Files(base, folder if own_tokenizer else base, source.chat_template)
    model = folder if folder.is_dir() else fetch_model(source.path, source.revision)
    return _Files(model, model, source.chat_template)


def _adapter_base(source: Source) -> Path:
    name = source.base or str(
        read_json(source.folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    )
    folder = Path(name).expanduser()
    return folder if name and folder.is_dir() else fetch_model(name, source.revision)


def _load(
    source: Source, files: _Files, model: ModelConfig, mesh: Mesh, dtype: str
) -> tuple[Params, float]:
    """The weights, each device's share on it, and the factor of the adapter among them."""
    if source.kind == "run":
        return _load_run(source, model, mesh, dtype)
    params = load_weights(files.model, model, mesh, dtype)
    if source.kind == "model":
        return params, 1.0
    found = read_peft(source.folder, model)
    return params | {
        "lora": sharding.put(found.adapter, trained_shardings(model, mesh, found.lora))
    }, found.lora.scale


def _load_run(source: Source, model: ModelConfig, mesh: Mesh, dtype: str) -> tuple[Params, float]:
    config = read_run_config(source.folder)
    _, saved, meta = restore_params(source.folder, source.step)
    if not config.lora.enabled:
        saved = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), saved)
        return sharding.put(saved, trained_shardings(model, mesh)), 1.0
    lora, folder = lora_of_run(config, model, saved), find_base(config, source.base)
    check_base(config, meta, folder)
    base = load_weights(folder, model, mesh, dtype, config.model.quantize)
    adapter = sharding.put(saved, trained_shardings(model, mesh, lora))
    return base | {"lora": adapter}, lora.scale

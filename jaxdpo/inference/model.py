"""A model ready to answer: from a Hugging Face folder, the hub, a run, or an adapter and its base.

An answer is what TRL calls a completion.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from jaxdpo.data.detokenize import decode_answer
from jaxdpo.data.formats.preference import Dropped
from jaxdpo.data.template_source import check_kwargs, find_template
from jaxdpo.data.tokenize import EncodedPrompt, Encoder, check_vocabulary
from jaxdpo.data.tokenizer_json import load_tokenizer
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
from jaxdpo.models.hf.weight_files import refuse_two_models
from jaxdpo.models.kv_cache import for_decoding
from jaxdpo.models.params import Params
from jaxdpo.models.sampling import generate
from jaxdpo.models.shardings import trained_shardings


class Answer(NamedTuple):
    """A generated answer."""

    text: str
    """Without eos and other special tokens."""
    tokens: int
    """Its length in tokens, eos included."""
    finish: str
    """stop: ended by eos (or another stop token). length: ended by a limit."""
    prompt_tokens: int
    """Length of the prompt in tokens."""
    prompt_truncated: bool
    """Whether the prompt lost its beginning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are sampled: arguments of models.sampling.generate."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model is and how its prompts are read; nothing is loaded."""

    path: str
    """Hugging Face folder, hub id, run folder, or the folder of a PEFT adapter."""
    revision: str | None = None
    """Revision of a hub model."""
    base: str | None = None
    """Folder or hub id of the base model of an adapter. Default: as the run or adapter says."""
    step: int | None = None
    """Which checkpoint of a run. Default: the newest that is undamaged."""
    chat_template: str | None = None
    """File with a chat template. Default: that of the run, or of the tokenizer."""
    max_prompt_length: int = 0
    """Longest prompt, tokens; a longer one keeps its end. 0: what max_new_tokens leaves of the
    model's positions, at least half of them."""
    strings: str | None = None
    """What a string is: message (of the user, where there is a chat template; else it is
    continued), verbatim or templated. None: as the run's data.strings says, else a message."""

    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of the template's own variables. Empty: those of the run."""
    thinking: bool | None = None
    """Whether answers begin with thoughts (Encoder.encode_prompt). None: as the run's did."""

    @property
    def folder(self) -> Path:
        """The path as a folder; there is none for a hub id."""
        return Path(self.path).expanduser()

    @property
    def kind(self) -> str:
        """run, adapter (a PEFT folder) or model (a Hugging Face folder or a hub id)."""
        if (self.folder / "config.yaml").is_file():
            return "run"
        if (self.folder / ADAPTER_CONFIG).is_file():
            return "adapter"
        return "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Weights on the devices, laid out for decoding, with tokenizer and sampling options."""

    model: ModelConfig
    params: Params
    options: ForwardOptions
    encoder: Encoder
    thinking: bool | None
    """Whether answers begin with thoughts."""
    stop_ids: tuple[int, ...]
    """Token ids that end an answer: eos, and what else the model's files name."""
    source: Source
    sampling: Sampling

    @classmethod
    def open(
        cls, source: Source, sampling: Sampling, mesh: Mesh, compute_dtype: str
    ) -> "LoadedModel":
        """Load a model.

        Args:
            source: where it is.
            sampling: how answers are sampled.
            mesh: devices over which weights and sequences are sharded, as in training.
            compute_dtype: dtype of the weights and of the inputs of matrix multiplications.

        Raises:
            ValueError: the folder, its weights or its tokenizer cannot be used.
        """
        files = _find_files(source)
        raw = read_config_json(files.model)
        model = from_hf(raw)
        tokenizer = load_tokenizer(str(files.tokenizer))
        template = find_template(tokenizer, files.template, "chat_template")
        # Long answers may not take more than half of the positions from the prompt.
        room = max(model.max_positions - sampling.max_new_tokens, model.max_positions // 2)
        longest = min(source.max_prompt_length or room, model.max_positions)
        strings = source.strings or files.strings or "message"
        if strings == "message" and template.text is None:
            strings = None
        kwargs = source.chat_template_kwargs or files.chat_template_kwargs
        check_kwargs("chat_template_kwargs", kwargs, template)
        encoder = Encoder(
            tokenizer,
            template.text,
            model.max_positions,
            longest,
            strings=strings,
            kwargs=kwargs,
            for_tools=template.for_tools,
            template_note=template.note,
        )
        params, scale = _load_weights(source, files, model, mesh, compute_dtype)
        options = ForwardOptions(compute_dtype=compute_dtype, lora_scale=scale, mesh=mesh)
        return cls(
            model=model,
            params=jax.jit(lambda params: for_decoding(params, model, options))(params),
            options=options,
            encoder=encoder,
            thinking=_thinking(source, files),
            stop_ids=tuple({*encoder.stop_ids, *end_ids(files.model, raw)}),
            source=source,
            sampling=sampling,
        )

    @property
    def start_note(self) -> str | None:
        """What to say about where answers begin, if the chat template knows thoughts."""
        starts = self.encoder.starts()
        if starts is None:
            return None
        thinking = self.thinking
        if thinking is None:
            thinking = not starts[1].startswith(starts[0])
        used, other = starts if thinking else starts[::-1]
        return (
            f"answers begin behind {used!r} (thinking={str(thinking).lower()}; "
            f"thinking={str(not thinking).lower()} begins them behind {other!r})"
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
            seed: instead of the sampling options' seed.
            report: called after each batch with the number of prompts answered so far.

        Raises:
            ValueError: some prompts are refused by the tokenizer or the template, or have tokens
                that the model has no embedding for; names each.
        """
        encoded = self._encode(prompts)
        sampling: dict[str, Any] = dataclasses.asdict(self.sampling)
        if seed is not None:
            sampling["seed"] = seed
        answers = generate(
            self.params,
            self.model,
            [prompt.ids for prompt in encoded],
            options=self.options,
            stop_ids=self.stop_ids,
            # A vocabulary may be padded beyond the tokenizer's tokens: those ids have no text.
            num_tokens=min(len(self.encoder.tokenizer), self.model.vocab_size),
            report=report,
            **sampling,
        )
        return [self._decode(prompt, ids) for prompt, ids in zip(encoded, answers, strict=True)]

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        encoded, problems = [], []
        for prompt in prompts:
            found = self.encoder.encode_prompt(prompt.text, prompt.tools, self.thinking)
            if isinstance(found, Dropped):
                problems.append(f"{prompt.place}: {found.reason}")
                continue
            try:
                largest = int(found.ids.max())
                check_vocabulary(largest, self.encoder.tokenizer, self.model.vocab_size)
            except ValueError as error:
                problems.append(f"{prompt.place}: {error}")
                continue
            encoded.append(found)
        if problems:
            raise ValueError("\n".join(problems))
        return encoded

    def _decode(self, prompt: EncodedPrompt, ids: np.ndarray) -> Answer:
        stopped = ids.size > 0 and int(ids[-1]) in self.stop_ids
        shown = ids[:-1] if stopped else ids
        return Answer(
            text=decode_answer(self.encoder.tokenizer, prompt.ids, shown, skip_special=True),
            tokens=len(ids),
            finish="stop" if stopped else "length",
            prompt_tokens=len(prompt.ids),
            prompt_truncated=prompt.truncated,
        )


# --- files ---


class _Files(NamedTuple):
    """Where the parts of a model are."""

    model: Path
    """Folder with config.json and weights."""
    tokenizer: Path
    template: str | None
    """File with the chat template, if it is not the tokenizer's."""
    strings: str | None = None
    """The run's data.strings."""
    chat_template_kwargs: Mapping[str, Any] = {}
    """The run's data.chat_template_kwargs."""
    thinking: bool | None = None
    """Whether the answers that most pairs of the run have begin with thoughts."""


def _find_files(source: Source) -> _Files:
    folder = source.folder
    if source.kind == "run":
        return _run_files(source)
    if source.kind == "adapter":
        refuse_two_models(folder)
        base = _adapter_base(source)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        return _Files(base, folder if has_tokenizer else base, source.chat_template)
    model = folder if folder.is_dir() else fetch_model(source.path, source.revision)
    return _Files(model, model, source.chat_template)


def _run_files(source: Source) -> _Files:
    config = read_run_config(source.folder)
    model = model_files(source.folder, config)
    template = source.chat_template
    # The tokenizer that a run copied into its folder has the chat template of the training.
    if not template and model != source.folder / "model":
        template = config.data.chat_template
    data = config.data
    thinking = _trained_thinking(source.folder)
    return _Files(model, model, template, data.strings, data.chat_template_kwargs, thinking)


def _trained_thinking(run_dir: Path) -> bool | None:
    """Whether most pairs of a run have answers that begin with thoughts; None if unknown."""
    file = run_dir / "data_report.json"
    if not file.is_file():
        return None
    kept = thinking = 0
    for item in read_json(file).get("sets", {}).get("train", []):
        kept += item.get("kept", 0)
        thinking += item.get("thinking", 0)
    return 2 * thinking > kept if kept else None


def _thinking(source: Source, files: _Files) -> bool | None:
    """The option, else what the template makes of the kwargs given, else as the run was trained."""
    if source.thinking is not None:
        return source.thinking
    if source.chat_template_kwargs:
        return True  # the generation prompt, as these values make it
    return files.thinking


def _adapter_base(source: Source) -> Path:
    name = source.base
    if not name:
        config = read_json(source.folder / ADAPTER_CONFIG)
        name = str(config.get("base_model_name_or_path") or "")
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not source.base and "/" not in name:
        # An export writes the name of a local base without its path. It may be another model's
        # name on the hub.
        raise ValueError(
            f"model.path={source.path}: its {ADAPTER_CONFIG} names the base {name!r}, which is no "
            "folder here. Say where it is: model.base=<folder or hub id>"
        )
    return fetch_model(name, source.revision)


# --- weights ---


def _load_weights(
    source: Source, files: _Files, model: ModelConfig, mesh: Mesh, dtype: str
) -> tuple[Params, float]:
    """The weights, sharded over the mesh, and the scale of the LoRA adapter among them (or 1)."""
    if source.kind == "run":
        return _load_run(source, model, mesh, dtype)
    params = load_weights(files.model, model, mesh, dtype)
    if source.kind == "model":
        return params, 1.0
    found = read_peft(source.folder, model)
    adapter = sharding.put(found.adapter, trained_shardings(model, mesh, found.lora))
    return {**params, "lora": adapter}, found.lora.scale


def _load_run(source: Source, model: ModelConfig, mesh: Mesh, dtype: str) -> tuple[Params, float]:
    config = read_run_config(source.folder)
    _, saved, meta = restore_params(source.folder, source.step)
    if not config.lora.enabled:
        saved = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), saved)
        return sharding.put(saved, trained_shardings(model, mesh)), 1.0
    lora = lora_of_run(config, model, saved)
    folder = find_base(config, source.base)
    check_base(config, meta, folder)
    base = load_weights(folder, model, mesh, dtype, config.model.quantize)
    adapter = sharding.put(saved, trained_shardings(model, mesh, lora))
    return {**base, "lora": adapter}, lora.scale

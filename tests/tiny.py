"""Tiny things that the tests share: a model, pairs, meshes, steps, model folders and configs."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdpo.config import cli
from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import Config, MeshSection, OptimSection
from jaxdpo.data.packing import Batch, Packer
from jaxdpo.data.pair_table import EncodedPair, PairTable, to_columns
from jaxdpo.distributed import offload, sharding
from jaxdpo.losses import registry
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.hf.config_json import from_hf
from jaxdpo.models.hf.load_save import save_params
from jaxdpo.models.params import Params, abstract_params
from jaxdpo.training import step
from jaxdpo.training.completion_logps import StepOptions
from jaxdpo.training.state import FrozenState, init_state
from jaxdpo.training.weights import state_shardings

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "eos_token_id": 0,
}
"""config.json of the tiny model; weights are five times larger than usual: every part matters."""


def model(**changes: Any) -> ModelConfig:
    """The tiny model's config, with changes to HF."""
    return from_hf(HF | changes)


@functools.cache
def params(seed: int = 0, config: ModelConfig | None = None) -> Params:
    """Random weights as numpy arrays (safe from donation): norms near 1, the rest wide."""
    config = config or model()
    rng, one = np.random.default_rng(seed), np.float32(config.norm != "rms_offset")

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        return (
            one + np.float32(0.1) * noise
            if "norm" in jax.tree_util.keystr(path)
            else np.float32(config.initializer_range) * noise
        )

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config, "float32"))


def pair(
    prompt: int,
    chosen: int,
    rejected: int,
    *,
    rng: np.random.Generator | None = None,
    vocab: int = 64,
    **more: Any,
) -> EncodedPair:
    """A pair of these lengths with random ids."""
    rng = np.random.default_rng(0) if rng is None else rng
    prompt_ids, chosen_ids, rejected_ids = (
        rng.integers(1, vocab, size).astype(np.int32) for size in (prompt, chosen, rejected)
    )
    return EncodedPair(prompt_ids, chosen_ids, rejected_ids, **more)


def pairs(
    count: int, *, seed: int = 0, low: int = 3, high: int = 40, vocab: int = 64
) -> list[EncodedPair]:
    """Random pairs whose prompts and answers have low to high - 1 tokens."""
    rng = np.random.default_rng(seed)
    return [
        pair(*rng.integers(low, high, 3).tolist(), rng=rng, vocab=vocab, id=str(i))
        for i in range(count)
    ]


def table(some: Iterable[EncodedPair]) -> PairTable:
    """A table of the pairs in memory."""
    return PairTable.from_columns(to_columns(some))


def mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1, expert: int = 1
) -> jax.sharding.Mesh:
    """A mesh over the first devices."""
    section = MeshSection(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
    return sharding.make_mesh(section, jax.devices()[: data * fsdp * expert * context * tensor])


def pack(
    some: Sequence[EncodedPair],
    *,
    share_prefix: bool = True,
    num_rows: int = 1,
    size: int = 1024,
    places: int = 0,
) -> Batch:
    """The pairs in rows of one length."""
    return Packer(
        share_prefix=share_prefix,
        num_rows=num_rows,
        packed_lengths=(size,),
        max_pairs=places or len(some),
    )(some)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """How a few steps are computed; only loss and optim may change the result."""

    loss: LossSection = dataclasses.field(default_factory=LossSection)
    optim: OptimSection = dataclasses.field(
        default_factory=lambda: OptimSection(learning_rate=1e-3)
    )
    config: ModelConfig = dataclasses.field(default_factory=model)
    share_prefix: bool = True
    size: int = 1024
    mesh: tuple[int, ...] = (1, 1, 1)
    """data, fsdp, tensor and perhaps context and expert."""
    attention: str = "blocks"
    compute_dtype: str = "float32"
    remat: str = "none"
    chunk: int | None = None
    total_steps: int = 10
    offload: tuple[str, ...] = ()

    def options(self) -> StepOptions:
        """The step's options."""
        forward = ForwardOptions(
            compute_dtype=self.compute_dtype,
            attention=self.attention,
            remat=self.remat,
            mesh=mesh(*self.mesh),
        )
        return StepOptions(
            model=self.config,
            loss=self.loss,
            optim=self.optim,
            forward=forward,
            total_steps=self.total_steps,
            chunk=self.chunk,
        )


class Stepper:
    """A state on its devices, and the compiled steps."""

    def __init__(self, setup: Setup, policy: Params | None = None, reference: Params | None = None):
        """Put policy and reference (default: random, and not equal) on the setup's mesh."""
        self.setup, self.mesh = setup, mesh(*setup.mesh)
        self._policy = params(0, setup.config) if policy is None else policy
        self._shardings = state_shardings(
            setup.config, self.mesh, offload_moments="moments" in setup.offload
        )
        reference = params(1, setup.config) if reference is None else reference
        place = (
            offload.on_host(self._shardings.params)
            if "reference" in setup.offload
            else self._shardings.params
        )
        self.reference = (
            sharding.put(reference, place) if registry.needs_reference(setup.loss) else None
        )
        where = FrozenState(reference=None if self.reference is None else place)
        self.train_step, self.eval_step = step.compile_steps(
            setup.options(), self.mesh, self._shardings, where
        )
        self.reset()

    def reset(self, policy: Params | None = None) -> None:
        """Begin again, with the first weights or with others."""
        state = init_state(self._policy if policy is None else policy, self.setup.optim)
        self.state = sharding.put(jax.tree.map(np.asarray, state), self._shardings)

    @property
    def frozen(self) -> FrozenState:
        """The reference as the steps take it."""
        return FrozenState(reference=self.reference)

    def put(self, batch: Batch) -> Batch:
        """The batch on the devices."""
        return sharding.put(batch, jax.tree.map(lambda _: sharding.rows(self.mesh, 1), batch))

    def pack(self, some: Sequence[EncodedPair]) -> Batch:
        """The pairs packed as the setup says, on the devices."""
        return self.put(
            pack(
                some,
                share_prefix=self.setup.share_prefix,
                num_rows=sharding.num_row_shards(self.mesh),
                size=self.setup.size,
            )
        )

    def train(self, batch: Batch, apply: bool = True) -> dict[str, float]:
        """One step; its metrics."""
        self.state, metrics = self.train_step(self.state, self.frozen, batch, np.asarray(apply))
        return host(metrics)

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """The evaluation's means."""
        return host(step.averages(self.eval_step(self.state.params, self.frozen, batch)))


def host(metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Scalars as Python numbers; arrays are left out."""
    return {key: value.item() for key, value in jax.device_get(metrics).items() if not value.ndim}


def write_model(folder: Path, seed: int | None = 0, **changes: Any) -> ModelConfig:
    """A Hugging Face folder with the tokens w1 to w63; without weights where seed is None."""
    config = model(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<|end|>": 0} | {f"w{i}": i for i in range(1, config.vocab_size)}
    end = {
        "id": 0,
        "content": "<|end|>",
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|end|>"},
    }
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    for name, content in {
        "config": HF | changes,
        "tokenizer": tokenizer,
        "tokenizer_config": special,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if seed is not None:
        save_params(folder, config, params(seed, config), "float32")
    return config


def rows(count: int, seed: int = 0, low: int = 2, high: int = 9) -> list[dict[str, Any]]:
    """Preference rows of words."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(f"w{i}" for i in rng.integers(1, 64, rng.integers(low, high)))

    return [
        {"prompt": text(), "chosen": " " + text(), "rejected": " " + text()} for _ in range(count)
    ]


def write_rows(path: Path, some: Sequence[dict[str, Any]]) -> str:
    """A JSON lines file of the rows; its path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


def config(folder: Path, **changes: Any) -> Config:
    """A short run in `folder` on its model/ and rows.jsonl, one device.

    Args:
        changes: section__field=value.
    """
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "data": {
            "train": [str(folder / "rows.jsonl")],
            "max_length": 32,
            "packed_length": 64,
            "num_packed_lengths": 1,
            "eval_fraction": 0.2,
        },
        "optim": {"learning_rate": 1e-3},
        "train": {"batch_size": 2, "steps": 4, "compilation_cache": None},
        "eval": {"every": 0},
        "mesh": {"fsdp": 1},
        "log": {"tensorboard": False},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            values.setdefault(section, {})[field] = value
        else:
            values[section] = value
    made, problems = cli.validate(Config, values)
    assert made is not None and not problems, problems
    return made

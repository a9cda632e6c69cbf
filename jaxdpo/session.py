"""From a config to everything that a run needs: devices, model, data, state, compiled steps."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdpo import losses, optim, sharding
from jaxdpo.config import Config
from jaxdpo.data.chat import Tokenizer, load_tokenizer
from jaxdpo.data.loader import Loader
from jaxdpo.data.packing import Batch
from jaxdpo.data.prepare import Prepared, prepare
from jaxdpo.flops import peak_flops, step_flops
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.decoder import ForwardOptions, Params, abstract_params, init_params, logical_axes
from jaxdpo.models.hf_folder import fetch_model
from jaxdpo.models.hfconfig import load_model_config
from jaxdpo.models.weightfiles import weights_fingerprint
from jaxdpo.models.weights import load_params
from jaxdpo.sampling import generate
from jaxdpo.step import StepOptions, TrainState, averages, compile_steps, init_state, needs_reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A run that is ready to start, but for its weights (`start`)."""

    config: Config
    mesh: Mesh
    model: ModelConfig
    folder: Path
    """The model's Hugging Face folder."""
    tokenizer: Tokenizer
    data: Prepared
    loader: Loader
    total_steps: int
    options: StepOptions
    shardings: Any
    """A TrainState of NamedShardings, leaf for leaf."""
    train_step: Callable
    eval_step: Callable

    @classmethod
    def open(cls, config: Config) -> "Session":
        """Read the config, tokenizer and data; nothing is loaded onto a device yet.

        Raises:
            ValueError: model, data or mesh cannot be used as the config says.
        """
        mesh = sharding.make_mesh(config.mesh)
        folder = model_folder(config)
        model = load_model_config(folder)
        tokenizer = load_tokenizer(str(folder))
        config = settle_lengths(settle_dtype(config, mesh), model)
        _check_lengths(config, model)
        data = prepare(config.data, tokenizer, model.vocab_size)
        _check_weights(config, data)
        pairs_per_step = config.train.pairs_per_step
        loader = Loader.create(
            data.train, config.data, pairs_per_step=pairs_per_step, num_rows=sharding.num_row_shards(mesh), seed=config.seed
        )
        total_steps = config.train.steps or (config.train.epochs or 1) * loader.steps_per_epoch
        options = StepOptions(model=model, loss=config.loss, optim=config.optim, forward=_forward(config, mesh), total_steps=total_steps)
        shardings = state_shardings(model, mesh)
        train_step, eval_step = compile_steps(options, mesh, shardings)
        return cls(
            config=config,
            mesh=mesh,
            model=model,
            folder=folder,
            tokenizer=tokenizer,
            data=data,
            loader=loader,
            total_steps=total_steps,
            options=options,
            shardings=shardings,
            train_step=train_step,
            eval_step=eval_step,
        )

    def start(self) -> tuple[TrainState, Params | None]:
        """The state before the first step and the reference, on the devices.

        Raises:
            ValueError: the weights cannot be used.
        """
        params = self._initial_params()
        opt = jax.jit(lambda: optim.init(self._abstract_params(), self.config.optim), out_shardings=self.shardings.opt)()
        state = TrainState(params, opt, self.put_scalar(0, np.int32), self.put_scalar(0, np.int32))
        return state, self._copy_as_reference(params) if needs_reference(self.config.loss) else None

    def starting_reference(self) -> Params | None:
        """The reference alone, as `start` gives it: for a resume, which has its policy from a checkpoint."""
        if not needs_reference(self.config.loss):
            return None
        params = self._initial_params()
        return params if self.config.model.param_dtype == self.reference_dtype else self._copy_as_reference(params)

    def abstract_state(self, with_reference: bool) -> dict[str, Any]:
        """Shapes, types and shardings of what a checkpoint holds."""
        shapes = jax.eval_shape(lambda params: init_state(params, self.config.optim), self._abstract_params())
        tree = checkpoint_tree(shapes, shapes.params if with_reference else None)
        shardings = checkpoint_tree(self.shardings, self.shardings.params if with_reference else None)
        return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings)

    def put_batch(self, batch: Batch) -> Batch:
        """A packed batch on the devices, rows spread over those that see different rows."""
        where = sharding.rows(self.mesh, 1)
        return sharding.put(batch, jax.tree.map(lambda _: where, batch))

    def put_scalar(self, value: float | bool, dtype: Any) -> jax.Array:
        """A number on every device."""
        return sharding.put(np.asarray(value, dtype), sharding.replicated(self.mesh))

    def evaluate(self, params: Params, reference: Params | None) -> dict[str, float]:
        """Means over all validation pairs: loss, rewards, accuracies, exact KL per token, lengths."""
        table, size = self.data.eval, self.config.train.pairs_per_step
        groups = [range(first, min(first + size, len(table))) for first in range(0, len(table), size)]
        batches = (self.put_batch(self.loader.packer([table[i] for i in group])) for group in groups)
        sums = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), (self.eval_step(params, reference, batch) for batch in batches))
        means: dict[str, float] = {key: value.item() for key, value in jax.device_get(jax.jit(averages)(sums)).items()}
        return means | {"pairs": len(table)}

    def samples(self, params: Params, reference: Params | None) -> list[dict[str, str]]:
        """Greedy answers to the first eval.samples validation prompts: {"id", "prompt", "policy"} and, where there is one, "reference"."""
        section, table = self.config.eval, self.data.eval
        pairs = [table[i] for i in range(min(section.samples, len(table)))]
        if not pairs:
            return []
        models = {"policy": params} | ({} if reference is None else {"reference": reference})
        texts = {name: self._answers(weights, [pair.prompt_ids for pair in pairs]) for name, weights in models.items()}
        prompts = self.tokenizer.batch_decode([pair.prompt_ids for pair in pairs])
        return [
            {"id": pair.id, "prompt": prompts[i]} | {name: answers[i] for name, answers in texts.items()} for i, pair in enumerate(pairs)
        ]

    def _answers(self, params: Params, prompts: list[np.ndarray]) -> list[str]:
        num_rows = sharding.num_row_shards(self.mesh)
        padded = prompts + prompts[:1] * (-len(prompts) % num_rows)  # every device that sees rows of its own gets as many
        stop: Any = self.tokenizer.eos_token_id
        ids = generate(
            params,
            self.model,
            padded,
            max_new_tokens=self.config.eval.sample_tokens,
            options=self.options.forward,
            stop_ids=() if stop is None else (stop,),
            num_tokens=min(len(self.tokenizer), self.model.vocab_size),
        )
        return self.tokenizer.batch_decode(ids[: len(prompts)], skip_special_tokens=True)

    def mfu(self, step: int, seconds: float) -> float | None:
        """Useful FLOPs of a step, as a share of what the devices could do in that time; None where their peak is not known."""
        peak = peak_flops(self.mesh.devices)
        if peak is None:
            return None
        lengths = self.data.train.lengths[self.loader.pairs_of(step)]
        return step_flops(self.model, lengths, needs_reference(self.config.loss)) / (seconds * peak)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What the run stands on besides its config: weights, tokenizer, template and training pairs, each as a hash."""
        weights = (
            weights_fingerprint(self.folder) if self.config.model.init == "pretrained" else f"random weights of seed {self.config.seed}"
        )
        tokenizer = hashlib.sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()
        return {"weights": weights, "tokenizer": tokenizer, "chat_template": template, "pairs": self.data.train.fingerprint()}

    @property
    def reference_dtype(self) -> str:
        """Type of the reference's weights: what products take anyway, but for a reference that moves by small amounts (TR-DPO)."""
        return self.config.model.param_dtype if self.config.loss.tr_every else self.options.forward.compute_dtype

    def num_params(self) -> int:
        """Number of weights of the policy."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._abstract_params()))

    def _initial_params(self) -> Params:
        dtype = self.config.model.param_dtype
        if self.config.model.init == "random":
            draw = jax.jit(lambda key: init_params(self.model, key, dtype), out_shardings=self.shardings.params)
            return draw(jax.random.key(self.config.seed))
        return load_params(self.folder, self.model, self.shardings.params, jnp.dtype(dtype))

    def _copy_as_reference(self, params: Params) -> Params:
        dtype = self.reference_dtype
        copy = jax.jit(lambda tree: jax.tree.map(lambda w: jnp.array(w, dtype, copy=True), tree), out_shardings=self.shardings.params)
        return copy(params)

    def _abstract_params(self) -> Params:
        return abstract_params(self.model, self.config.model.param_dtype)


def state_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    """Where each part of the state lives; moments with their weights.

    Raises:
        ValueError: the mesh does not divide the weights.
    """
    params = sharding.param_shardings(mesh, logical_axes(model), abstract_params(model, "float32"))
    everywhere = sharding.replicated(mesh)
    leaves: Any = (params, {"count": everywhere, "mu": params, "nu": params}, everywhere, everywhere)
    return TrainState(*leaves)


def checkpoint_tree(state: TrainState, moving_reference: Params | None) -> dict[str, Any]:
    """The state as nested dict; the reference is part of it only where it moves (TR-DPO)."""
    return state._asdict() | ({} if moving_reference is None else {"reference": moving_reference})


def model_folder(config: Config) -> Path:
    """The local folder of model.path; a hub id is fetched first.

    Raises:
        ValueError: there is no such folder and no such model on the hub.
    """
    path = Path(config.model.path or "").expanduser()
    if path.is_dir():
        return path
    return fetch_model(config.model.path or "", config.model.revision)


def settle_dtype(config: Config, mesh: Mesh) -> Config:
    """The config with the platform's type in place of an automatic one, so that a resume elsewhere cannot change it unseen."""
    if config.model.compute_dtype != "auto":
        return config
    dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))


def settle_lengths(config: Config, model: ModelConfig) -> Config:
    """The config with numbers in place of automatic lengths."""
    data = config.data
    max_length = data.max_length or min(1024, model.max_positions)
    max_prompt_length = data.max_prompt_length or max_length // 2
    return dataclasses.replace(config, data=dataclasses.replace(data, max_length=max_length, max_prompt_length=max_prompt_length))


def _forward(config: Config, mesh: Mesh) -> ForwardOptions:
    """The forward options, with each `auto` settled for this platform."""
    section = config.model
    return ForwardOptions(
        compute_dtype=section.compute_dtype,
        attention="blocks" if section.attention == "auto" else section.attention,
        remat="full" if section.remat == "auto" else section.remat,
        mesh=mesh,
    )


def _check_weights(config: Config, data: Prepared) -> None:
    """A coupled loss compares every pair with every other: which of them a pair's weight should count for is not defined."""
    weighted = [name for name, table in (("data.train", data.train), ("data.eval", data.eval)) if np.unique(table.weights).size > 1]
    if weighted and losses.coupled(config.loss):
        raise ValueError(
            f"loss.name={config.loss.name}: mixes the pairs of a step, so it cannot weigh them, and the rows of {weighted[0]} differ in "
            "their column 'weight'. Remove that column, or use another loss"
        )


def _check_lengths(config: Config, model: ModelConfig) -> None:
    longest = config.data.max_length
    if longest > model.max_positions:
        raise ValueError(
            f"data.max_length={longest}: the model knows {model.max_positions} positions. Use data.max_length={model.max_positions} or less"
        )
    if model.sliding_window is not None and model.sliding_window < longest and config.data.layout == "shared":
        raise ValueError(
            f"data.layout=shared: the model's sliding window of {model.sliding_window} tokens is shorter than data.max_length={longest} "
            "and would cut a shared prompt. Use data.layout=separate, or a smaller data.max_length"
        )

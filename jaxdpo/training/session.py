"""From a config to everything that a run needs: devices, model, data, state, compiled steps."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.config.schema import Config
from jaxdpo.data.loader import Loader
from jaxdpo.data.packing import Batch
from jaxdpo.data.pair_table import PairTable
from jaxdpo.data.prepare import Prepared, prepare
from jaxdpo.data.tokenize import Encoder, Tokenizer, decode_answer, load_tokenizer
from jaxdpo.distributed import sharding
from jaxdpo.losses import registry
from jaxdpo.models.flops import peak_flops, step_flops
from jaxdpo.models.hf.config_json import load_model_config, read_config_json
from jaxdpo.models.hf.folder import end_ids
from jaxdpo.models.hf.hub import fetch_model
from jaxdpo.models.hf.peft import PeftAdapter, adapter_fingerprint
from jaxdpo.models.hf.weight_files import weights_fingerprint
from jaxdpo.models.params import Params
from jaxdpo.models.sampling import generate
from jaxdpo.training import optim
from jaxdpo.training.completion_logps import reference_logps
from jaxdpo.training.program import Program
from jaxdpo.training.reference_cache import CachedLogps, cached_logps
from jaxdpo.training.resolve import settle_for
from jaxdpo.training.step import FrozenState, TrainState, averages
from jaxdpo.training.weights import PolicyWeights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session(Program):
    """A run that is ready to start, but for its weights (`start`)."""

    tokenizer: Tokenizer
    data: Prepared
    loader: Loader
    total_steps: int
    notes: tuple[str, ...]
    """What the user should know before the run."""
    warnings: tuple[str, ...]
    """What may be a mistake."""

    @classmethod
    def open(cls, config: Config) -> "Session":
        """Read the config, tokenizer and data; nothing is loaded onto a device yet.

        Raises:
            ValueError: model, data or mesh cannot be used as the config says.
        """
        folder = model_folder(config)
        model = load_model_config(folder)
        settled = settle_for(config, model, read_config_json(folder))
        config, mesh = settled.config, settled.mesh
        tokenizer = load_tokenizer(str(folder))
        data = prepare(config.data, tokenizer, model.vocab_size)
        _check_weights(config, data)
        _check_margins(config, data)
        num_rows, batch_size = sharding.num_row_shards(mesh), config.train.batch_size
        loader = Loader.create(
            data.train,
            config.data,
            batch_size=batch_size,
            num_rows=num_rows,
            seed=config.seed,
            mine=sharding.rows_here(mesh),
        )
        total_steps = config.train.steps or (config.train.epochs or 1) * loader.steps_per_epoch
        program = Program.of(settled, model, folder, total_steps=total_steps)
        return cls(
            **vars(program),
            tokenizer=tokenizer,
            data=data,
            loader=loader,
            total_steps=total_steps,
            notes=tuple(_notes(config, program.weights)),
            warnings=tuple(_warnings(config, settled.found)),
        )

    def start(self, params: Params, base: Params | None) -> tuple[TrainState, FrozenState]:
        """The state before the first step, and what stays as it is beside it.

        Args:
            params, base: as `weights` loads them; they become part of the result.
        """
        state = TrainState(
            params,
            self._first_moments(),
            self.put_scalar(0, np.int32),
            self.put_scalar(0, np.int32),
        )
        return state, FrozenState(base, self.weights.reference(params, base, shared=True))

    def _first_moments(self) -> dict[str, Any]:
        init, places = (
            functools.partial(optim.init, self.weights.trained, self.config.optim),
            self.shardings.opt,
        )
        if "moments" not in self.config.train.offload:
            return jax.jit(init, out_shardings=places)()
        return sharding.put(
            jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init)),
            places,
        )

    def reference_again(self, base: Params | None) -> Params | None:
        """FrozenState.reference as `start` gives it: for a resume, which has its policy from a checkpoint."""
        kind = self.weights.reference_kind
        params = self.weights.initial() if kind == "frozen" and base is None else {}
        return self.weights.reference(params, base, shared=False)

    def cache_reference(
        self, view: Callable[[], Params], tell: Callable[[str], None], stopping: Callable[[], bool]
    ) -> CachedLogps:
        """The reference's log-probs of all pairs that the run meets, from the run folder or computed.

        Args:
            view: loads the reference; called when something is to be computed.
            tell, stopping: see cached_logps.

        Raises:
            Interrupted: `stopping` said so.
        """
        view = functools.cache(view)
        run = jax.jit(
            lambda params, batch: reference_logps(params, batch, self.options),
            out_shardings=sharding.replicated(self.mesh),
        )
        fill = functools.partial(
            cached_logps, Path(self.config.run_dir).expanduser(), tell=tell, stopping=stopping
        )

        def logps_of(table: PairTable, places: np.ndarray) -> np.ndarray:
            batch = self.loader.pack(table, places)
            found = jax.device_get(run(view(), self.put_batch(batch)))
            logps = np.empty((len(places), 2), np.float32)
            logps[batch.index_MBP[batch.index_MBP >= 0]] = found[batch.index_MBP >= 0]
            return logps

        def whole(name: str, table: PairTable, batches: Sequence[np.ndarray]) -> np.ndarray:
            identity = self.reference_identity | {"pairs": table.fingerprint()}
            return fill(name, identity, len(table), batches, functools.partial(logps_of, table))

        steps = range(1, min(self.total_steps, self.loader.steps_per_epoch) + 1)
        groups = self._eval_groups() if self.config.eval.every else []
        train = whole("train", self.data.train, [self.loader.pairs_of(step) for step in steps])
        return CachedLogps(train, whole("eval", self.data.eval, groups))

    def with_logps(self, fixed: FrozenState, logps: np.ndarray | None, batch: Batch) -> FrozenState:
        """`fixed` for a batch: with the reference's log-probs of its pairs, if there are some."""
        if logps is None:
            return fixed
        return fixed._replace(
            ref_logps=sharding.put(
                CachedLogps.laid_out(logps, batch.index_MBP), sharding.rows(self.mesh, 1)
            )
        )

    def put_batch(self, batch: Batch) -> Batch:
        """A packed batch on the devices, rows spread over those that see different rows."""
        where = sharding.rows(self.mesh, 1)
        return sharding.put(batch, jax.tree.map(lambda _: where, batch))

    def put_scalar(self, value: float | bool, dtype: Any) -> jax.Array:
        """A number on every device."""
        return sharding.put(np.asarray(value, dtype), sharding.replicated(self.mesh))

    def evaluate(
        self,
        params: Params,
        fixed: FrozenState,
        cached: CachedLogps | None,
        poll: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Means over all validation pairs: loss, rewards, accuracies, lengths and, where the reference runs, exact KL per token.

        Args:
            poll: called before each batch; what it raises ends the evaluation.
        """
        table = self.data.eval
        sums = None
        for group in self._eval_groups():
            poll()
            batch = self.loader.pack(table, group)
            beside = self.with_logps(fixed, None if cached is None else cached.eval[group], batch)
            more = self.eval_step(params, beside, self.put_batch(batch))
            sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
        means: dict[str, float] = {
            key: value.item() for key, value in jax.device_get(jax.jit(averages)(sums)).items()
        }
        return means | {"pairs": len(table)}

    def _eval_groups(self) -> list[np.ndarray]:
        """Places of the validation pairs that are measured at once."""
        count, size = len(self.data.eval), self.config.train.batch_size
        return [np.arange(first, min(first + size, count)) for first in range(0, count, size)]

    def samples(
        self, params: Params, fixed: FrozenState, poll: Callable[[], None] = lambda: None
    ) -> list[dict[str, str]]:
        """Greedy answers to the first eval.samples validation prompts: {"id", "prompt", "policy"} and, where one runs, "reference".

        Args:
            poll: called before each model answers; what it raises ends the sampling.
        """
        section, table = self.config.eval, self.data.eval
        pairs = [table[i] for i in range(min(section.samples, len(table)))]
        if not pairs:
            return []
        reference = fixed.reference_view()
        models = {"policy": fixed.policy_view(params)} | (
            {} if reference is None else {"reference": reference}
        )
        texts: dict[str, list[str]] = {}
        for name, weights in models.items():
            poll()
            texts[name] = self._answers(weights, [pair.prompt_ids for pair in pairs])
        prompts = self.tokenizer.batch_decode([pair.prompt_ids for pair in pairs])
        return [
            {"id": pair.id, "prompt": prompts[i]}
            | {name: answers[i] for name, answers in texts.items()}
            for i, pair in enumerate(pairs)
        ]

    def _answers(self, params: Params, prompts: list[np.ndarray]) -> list[str]:
        answers = generate(
            params,
            self.model,
            prompts,
            max_new_tokens=self.config.eval.sample_tokens,
            options=self.options.forward,
            stop_ids=self._stop_ids,
            num_tokens=min(len(self.tokenizer), self.model.vocab_size),
        )
        return [
            decode_answer(self.tokenizer, prompt, ids, skip_special=True)
            for prompt, ids in zip(prompts, answers, strict=True)
        ]

    @functools.cached_property
    def _stop_ids(self) -> tuple[int, ...]:
        encoder = Encoder.create(self.tokenizer, self.config.data)
        return tuple({*encoder.stop_ids, *end_ids(self.folder, read_config_json(self.folder))})

    def mfu(self, step: int, seconds: float) -> float | None:
        """Useful FLOPs of a step, as a share of what the devices could do in that time; None where their peak is not known."""
        peak = peak_flops(self.mesh.devices)
        if peak is None:
            return None
        lengths = self.data.train.lengths[self.loader.pairs_of(step)]
        runs = self.weights.reference_kind in ("frozen", "adapter_off")
        return step_flops(
            self.model, lengths, live_reference=runs, full=self.weights.lora is None
        ) / (seconds * peak)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What the run stands on besides its config: weights, tokenizer, template and training pairs, each as a hash."""
        weights = (
            weights_fingerprint(self.folder)
            if self.config.model.init == "pretrained"
            else f"random weights of seed {self.config.seed}"
        )
        tokenizer = hashlib.sha256(
            json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        ).hexdigest()
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()
        found = {
            "weights": weights,
            "tokenizer": tokenizer,
            "chat_template": template,
            "pairs": self.data.train.fingerprint(),
        }
        path = self.config.lora.path
        return (
            found
            if path is None
            else found | {"adapter": adapter_fingerprint(Path(path).expanduser())}
        )

    @property
    def reference_identity(self) -> dict[str, str]:
        """What the reference's log-probs depend on, the pairs aside."""
        section, data = self.config.model, self.config.data
        computed = f"{section.compute_dtype}, base {section.quantize}, loss.ld_alpha {self.config.loss.ld_alpha}"
        cut = f"max_length {data.max_length}, max_prompt_length {data.max_prompt_length}"
        known = {key: value for key, value in self.identity.items() if key != "pairs"}
        return known | {"computed": computed, "truncation": cut}


def model_folder(config: Config) -> Path:
    """The local folder of model.path; a hub id is fetched first.

    Raises:
        ValueError: there is no such folder and no such model on the hub.
    """
    path = Path(config.model.path or "").expanduser()
    if path.is_dir():
        return path
    return fetch_model(config.model.path or "", config.model.revision)


def _notes(config: Config, weights: PolicyWeights) -> Iterator[str]:
    if weights.lora is not None:
        names, scale = ", ".join(weights.lora.names), weights.lora.scale
        held = (
            config.model.compute_dtype if config.model.quantize == "none" else config.model.quantize
        )
        frozen = f"{weights.num_all():,} frozen in {held}"
        yield f"lora: {weights.num_trained():,} weights trained (rank {weights.lora.rank}, scale {scale:.4g}, on {names}), {frozen}"
    if weights.start is not None:
        yield f"the policy starts from the adapter in {config.lora.path}, and the reference is that adapter, frozen"
    if weights.reference_kind == "cached":
        yield "reference=cached: the exact KL (eval/kl/token_exact) and the reference's samples need the reference itself and are left out"


def _warnings(config: Config, found: PeftAdapter | None) -> Iterator[str]:
    base = "" if found is None else Path(found.base).name
    if base and base.lower() != Path(config.model.path or "").name.lower():
        yield f"lora.path={config.lora.path}: this adapter says that it was trained on {base}, not on model.path={config.model.path}"


def _check_weights(config: Config, data: Prepared) -> None:
    """A coupled loss compares every pair with every other: which of them a pair's weight should count for is not defined."""
    weighted = [
        name
        for name, table in (("data.train", data.train), ("data.eval", data.eval))
        if np.unique(table.weights).size > 1
    ]
    if weighted and registry.coupled(config.loss):
        raise ValueError(
            f"loss.name={config.loss.name}: mixes the pairs of a step, so it cannot weigh them, and the rows of {weighted[0]} differ in "
            "their column 'weight'. Remove that column, or use another loss"
        )


def _check_margins(config: Config, data: Prepared) -> None:
    """A margin is taken from the logit, which not every loss has."""
    with_margins = [
        name
        for name, table in (("data.train", data.train), ("data.eval", data.eval))
        if table.margins.any()
    ]
    if with_margins and not registry.takes_margins(config.loss):
        taking = ", ".join(
            name for name, row in registry.LOSSES.items() if "length_penalty" in row.options
        )
        raise ValueError(
            f"loss.name={config.loss.name}: has no logit to take a margin from, and rows of {with_margins[0]} have one in their column "
            f"'margin'. Remove that column, or use one of {taking}"
        )

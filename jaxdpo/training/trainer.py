"""The trainer: from a config to devices, model, data, state and compiled steps."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdpo.config.schema import Config
from jaxdpo.data.loader import Loader
from jaxdpo.data.packing import Batch
from jaxdpo.data.pair_table import PairTable
from jaxdpo.data.prepare import Prepared, prepare
from jaxdpo.data.tokenize import Encoder
from jaxdpo.data.tokenizer_json import Tokenizer, load_tokenizer
from jaxdpo.distributed import sharding
from jaxdpo.models.flops import peak_flops, step_flops
from jaxdpo.models.hf.config_json import load_model_config, read_config_json
from jaxdpo.models.hf.folder import end_ids
from jaxdpo.models.hf.hub import fetch_model
from jaxdpo.models.hf.peft import PeftAdapter
from jaxdpo.models.hf.weight_files import refuse_two_models
from jaxdpo.models.params import Params
from jaxdpo.training import optim
from jaxdpo.training.completion_logps import reference_logps
from jaxdpo.training.identity import reference_identity, run_identity
from jaxdpo.training.program import Program
from jaxdpo.training.reference_cache import CachedLogps, cached_logps, check_finite
from jaxdpo.training.resolve import check, num_steps, resolve, without_evaluation
from jaxdpo.training.state import FrozenState, TrainState
from jaxdpo.training.weights import PolicyWeights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer(Program):
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
    def open(cls, config: Config) -> "Trainer":
        """Read the config, tokenizer and data; nothing is loaded onto a device yet.

        Raises:
            ValueError: model, data or mesh cannot be used as the config says.
        """
        folder = model_folder(config)
        model = load_model_config(folder)
        given_every = config.eval.every
        resolved = resolve(config, model, read_config_json(folder))
        config, mesh = resolved.config, resolved.mesh
        tokenizer = load_tokenizer(str(folder))
        data = prepare(config.data, tokenizer, model.vocab_size)
        config = without_evaluation(config, given_every, data)
        resolved = resolved._replace(config=config)
        check(config, data)
        num_rows, batch_size = sharding.num_row_shards(mesh), config.train.batch_size
        loader = Loader.create(
            data.train,
            config.data,
            batch_size=batch_size,
            num_rows=num_rows,
            seed=config.seed,
            mine=sharding.local_rows(mesh),
        )
        total_steps = num_steps(config, loader.steps_per_epoch)
        program = Program.of(resolved, model, folder, total_steps=total_steps)
        return cls(
            **vars(program),
            tokenizer=tokenizer,
            data=data,
            loader=loader,
            total_steps=total_steps,
            notes=tuple(_notes(config, program.weights)),
            warnings=tuple(_warnings(config, resolved.found)),
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
        """AdamW's moments before the first step: zeros."""
        init = functools.partial(optim.init, self.weights.trained, self.config.optim)
        if "moments" not in self.config.train.offload:
            return jax.jit(init, out_shardings=self.shardings.opt)()
        # Offloaded moments are made on the host: the devices may have no room for all of them at
        # once.
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init))
        return sharding.put(zeros, self.shardings.opt)

    def reference_again(self, base: Params | None) -> Params | None:
        """FrozenState.reference for a resume, which has its policy from a checkpoint."""
        kind = self.weights.reference_kind
        params = self.weights.initial() if kind == "frozen" and base is None else {}
        return self.weights.reference(params, base, shared=False)

    def cache_reference(
        self,
        load_reference: Callable[[], Params],
        tell: Callable[[str], None],
        stopping: Callable[[], bool],
    ) -> CachedLogps:
        """The reference's log-probs of all pairs that the run visits, from the run folder or
        computed.

        Args:
            load_reference: loads its weights; called once, and only when something has to be
                computed.
            tell, stopping: see cached_logps.

        Raises:
            Interrupted: `stopping` said so.
        """
        load_reference = functools.cache(load_reference)
        run_dir = Path(self.config.run_dir).expanduser()
        run_reference = jax.jit(
            lambda params, batch: reference_logps(params, batch, self.options),
            out_shardings=sharding.replicated(self.mesh),
        )

        def compute(table: PairTable, indices: np.ndarray) -> np.ndarray:
            """[pairs, 2]: log-probs of these pairs of a table."""
            batch = self.loader.pack(table, indices)
            on_device = run_reference(load_reference(), self.put_batch(batch))
            is_pair = batch.index_MBP >= 0
            logps = np.empty((len(indices), 2), np.float32)
            logps[batch.index_MBP[is_pair]] = jax.device_get(on_device)[is_pair]
            check_finite(logps, [table.ids[i] for i in indices.tolist()])
            return logps

        def cache(name: str, table: PairTable, batches: Sequence[np.ndarray]) -> np.ndarray:
            identity = reference_identity(self.config, self.identity)
            return cached_logps(
                run_dir,
                name,
                identity | {"pairs": table.fingerprint()},
                len(table),
                batches,
                functools.partial(compute, table),
                log=tell,
                stopping=stopping,
            )

        train_batches = self.loader.visited(self.total_steps)
        eval_batches = self.eval_batches() if self.config.eval.every else []
        return CachedLogps(
            train=cache("train", self.data.train, train_batches),
            eval=cache("eval", self.data.eval, eval_batches),
        )

    def eval_batches(self) -> list[np.ndarray]:
        """Indices of the validation pairs of each evaluation batch."""
        count, size = len(self.data.eval), self.config.train.batch_size
        return [np.arange(first, min(first + size, count)) for first in range(0, count, size)]

    def with_logps(self, fixed: FrozenState, logps: np.ndarray | None, batch: Batch) -> FrozenState:
        """`fixed` for a batch: with the reference's log-probs of its pairs, if there are some."""
        if logps is None:
            return fixed
        assert np.isfinite(logps).all(), "a pair whose reference log-probs were never computed"
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

    def mfu(self, step: int, seconds: float) -> float | None:
        """Useful FLOPs of a step, as a share of what the devices could do in that time; None where
        their peak is not known."""
        peak = peak_flops(self.mesh.devices)
        if peak is None:
            return None
        lengths = self.data.train.lengths[self.loader.pairs_of(step)]
        runs = self.weights.reference_kind in ("frozen", "adapter_off")
        return step_flops(
            self.model, lengths, live_reference=runs, full=self.weights.lora is None
        ) / (seconds * peak)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer (eos): of the training data and of the model's files."""
        named = end_ids(self.folder, read_config_json(self.folder))
        return tuple({*self._encoder.stop_ids, *named})

    @property
    def end_token(self) -> str | None:
        """What ends an answer of the chat template, where that is not the tokenizer's eos token."""
        ends = self._encoder.stop_ids
        if not ends or ends[-1] == self.tokenizer.eos_token_id:
            return None
        return str(self.tokenizer.convert_ids_to_tokens(ends[-1]))

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder.create(self.tokenizer, self.config.data)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What the run's numbers depend on besides its options, each part as a hash."""
        return run_identity(
            self.config, self.folder, self.model, self.tokenizer, self.loader, self.data.eval
        )


def model_folder(config: Config) -> Path:
    """The local folder of model.path; a hub id is fetched first.

    Raises:
        ValueError: there is no such folder and no such model on the hub, or it is two models.
    """
    folder = Path(config.model.path or "").expanduser()
    if not folder.is_dir():
        folder = fetch_model(config.model.path or "", config.model.revision)
    refuse_two_models(folder)
    return folder


def _notes(config: Config, weights: PolicyWeights) -> Iterator[str]:
    """What the user should know before the run."""
    if weights.lora is not None:
        dtype = config.model.compute_dtype
        if config.model.quantize != "none":
            dtype = config.model.quantize
        names, scale = ", ".join(weights.lora.names), weights.lora.scale
        yield (
            f"lora: {weights.num_trained():,} weights trained (rank {weights.lora.rank}, "
            f"scale {scale:.4g}, on {names}), {weights.num_all():,} frozen in {dtype}"
        )
    if weights.start is not None:
        yield (
            f"the policy starts from the adapter in {config.lora.path}, "
            "and the reference is that adapter, frozen"
        )
    if weights.reference_kind == "cached":
        yield (
            "reference=cached: the exact KL (eval/kl/token_exact) and the reference's samples "
            "need the reference itself and are left out"
        )


def _warnings(config: Config, found: PeftAdapter | None) -> Iterator[str]:
    """What may be a mistake."""
    base = "" if found is None else Path(found.base).name
    if base and base.lower() != Path(config.model.path or "").name.lower():
        yield (
            f"lora.path={config.lora.path}: this adapter says that it was trained on {base}, "
            f"not on model.path={config.model.path}"
        )

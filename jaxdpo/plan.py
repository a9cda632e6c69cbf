"""`python -m jaxdpo.plan --config file.yaml topology=v5e-16`: memory, time and price of a run, before a machine is rented.

Nothing is loaded but config.json; no TPU or GPU is needed. Exit status: 0 it fits, 1 it does not or cannot be planned, 2 wrong options.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.config.sections import require, section
from jaxdpo.data.loader import Loader
from jaxdpo.data.prepare import prepare
from jaxdpo.data.tokenize import load_tokenizer
from jaxdpo.distributed.sharding import num_row_shards
from jaxdpo.models.hf.config_json import read_config_json
from jaxdpo.models.hf.folder import read_json
from jaxdpo.models.hf.hub import fetch_config
from jaxdpo.planning.aot_compile import Unavailable, compile_step, compiler_devices
from jaxdpo.planning.batch_shapes import Rows
from jaxdpo.planning.describe import describe, describe_compiled, describe_remedy, describe_search
from jaxdpo.planning.machines import Topology, topology
from jaxdpo.planning.search import Choice, search
from jaxdpo.planning.target import Target
from jaxdpo.training.resolve import validate
from jaxdpo.training.trainer import model_folder

FITS, FAULT = 0, 1
UNNEEDED = ("data.train=", "eval.every=", "model.path=null")
"""Problems of a training run that do not matter to a plan."""


@section
class PlanConfig(Config):
    """Memory, time and price of a training run on a machine, before it is rented. Takes every option of jaxdpo.train, and these."""

    topology: str | None = None
    """The machine, which has to be named: v5e-8, v5e-16, v5p-128, v6e-8, v4-8, h100-8, h200-1, a100-8, l4-1, cpu-8 ..."""
    model_config: str | None = None
    """The model's config.json, or the folder that holds it, instead of model.path."""
    read_data: bool = False
    """Read data.train for the true lengths; needs the tokenizer. false: all pairs have pair_tokens."""
    pair_tokens: list[int] | None = None
    """Tokens of a usual pair: [prompt, chosen, rejected]. Default: half of what data.max_length and data.max_prompt_length allow."""
    pairs: int = 10_000
    """Pairs of an epoch, where the data are not read."""
    price: float | None = None
    """Dollars for one chip and hour, for the price of an epoch."""
    efficiency: float = 0.5
    """Share of the roofline's speed that time and price count with. An assumption: measure one step and set it."""
    compile: bool = True
    """Compile the step ahead of time where the platform's compiler is installed. false: estimate only."""
    search: bool = True
    """Look for the fastest mesh, remat policy and row length that fit."""

    def __post_init__(self) -> None:
        tokens = self.pair_tokens
        require(
            (
                tokens is None or (len(tokens) == 3 and min(tokens) >= 1),
                f"pair_tokens={tokens}: must be three numbers of at least 1",
            ),
            (self.pairs >= 1, f"pairs={self.pairs}: must be at least 1"),
            (self.price is None or self.price > 0, f"price={self.price}: must be above 0"),
            (
                0 < self.efficiency <= 1,
                f"efficiency={self.efficiency}: must be above 0 and at most 1",
            ),
        )


def check(config: PlanConfig) -> list[str]:
    """Problems that involve more than one option, as messages."""
    problems = [problem for problem in validate(config) if not problem.startswith(UNNEEDED)]
    if config.topology is None:
        problems.append("topology=null: name a machine, e.g. topology=v5e-16")
    if config.model.path is None and (config.model_config is None or config.read_data):
        problems.append(
            "model.path=null: name a Hugging Face folder or hub id, or model_config=<config.json>"
        )
    if config.read_data and not config.data.train:
        problems.append("read_data=true: there is nothing to read. Set data.train")
    return problems


def read_model(config: PlanConfig) -> dict[str, Any]:
    """The parsed config.json.

    Raises:
        ValueError: there is none.
    """
    name = config.model_config or config.model.path or ""
    path = Path(name).expanduser()
    if path.is_file():
        return read_json(path)
    if path.is_dir() or config.model_config is not None:
        return read_config_json(path)
    return fetch_config(name, config.model.revision)


def usual_pair(config: Config, longest: int) -> tuple[int, int, int]:
    """Prompt, chosen and rejected tokens of a pair that is half as long as it may be."""
    whole, _ = config.data.lengths_for(longest)
    prompt = config.data.max_prompt_length or whole // 2
    return max(prompt // 2, 1), max((whole - prompt) // 2, 1), max((whole - prompt) // 2, 1)


def choose(config: PlanConfig, target: Target) -> Choice:
    """The plan of the config as it is.

    Raises:
        ValueError: it does not fit the machine or the model.
    """
    if not config.read_data:
        return Choice.of(target, config, pair_of(config, target))
    program, folder = target.program(config), model_folder(config)
    data = prepare(program.config.data, load_tokenizer(str(folder)), target.model.vocab_size)
    pairs, num_rows = config.train.batch_size, num_row_shards(program.mesh)
    loader = Loader.create(
        data.train, program.config.data, batch_size=pairs, num_rows=num_rows, seed=config.seed
    )
    return Choice.with_rows(target, config, program, Rows.of(loader))


def pair_of(config: PlanConfig, target: Target) -> tuple[int, int, int]:
    """Tokens of a usual pair."""
    if config.pair_tokens is None:
        return usual_pair(config, target.model.max_positions)
    prompt, chosen, rejected = config.pair_tokens
    return prompt, chosen, rejected


def plan(config: PlanConfig) -> int:
    """Print the plan; returns the exit status.

    Raises:
        ValueError: it cannot be made.
    """
    machine = topology(config.topology or "")
    use_host(machine)
    target = Target.of(machine, read_model(config))
    choice = choose(config, target)
    print(
        "\n".join(
            describe(
                choice,
                machine,
                pairs=config.pairs,
                price=config.price,
                efficiency=config.efficiency,
            )
        )
    )
    fits = choice.fits
    if config.compile:
        try:
            program = target.program(
                config, compiler_devices(machine, offload=bool(config.train.offload))
            )
        except Unavailable as reason:
            print(f"not compiled: {reason}; all of the above is an estimate")
        else:
            compiled = compile_step(program, choice.rows)
            fits = compiled.fits and compiled.peak <= machine.chip.memory
            print("\n".join(describe_compiled(compiled, choice, machine)))
    pair = pair_of(config, target)
    found = search(target, config, pair) if config.search or not fits else []
    if config.search or found:
        print("\n".join(describe_search(found, machine)))
    if not fits and not found:
        print("\n".join(describe_remedy(target, config, pair)))
    return FITS if fits else FAULT


def use_host(machine: Topology) -> None:
    """Keep to this machine's CPU, with as many devices as are planned for where that is the platform."""
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        jax.config.update("jax_platforms", "cpu")
    if machine.chip.platform == "cpu" and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", machine.num_chips)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    config, _ = cli.load(PlanConfig, argv, command="plan", checks=[check])
    try:
        return plan(config)
    except (ValueError, OSError) as error:
        print(f"jaxdpo.plan: {error}", file=sys.stderr)
        return FAULT


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

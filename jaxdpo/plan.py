"""`python -m jaxdpo.plan --config file.yaml topology=v5e-16`: memory, time and price of a run.

Reads config.json of the model alone and needs no TPU or GPU. Exit status: 0 it fits, 1 it does not
or cannot be planned, 2 wrong options.
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
from jaxdpo.data.tokenizer_json import load_tokenizer
from jaxdpo.distributed.sharding import num_row_shards
from jaxdpo.models.hf.config_json import read_config_json
from jaxdpo.models.hf.folder import read_json
from jaxdpo.models.hf.hub import fetch_config
from jaxdpo.planning.aot_compile import CompilerUnavailable, compile_step, compiler_devices
from jaxdpo.planning.batch_shapes import BatchShapes
from jaxdpo.planning.describe import describe, describe_compiled, describe_remedy, describe_search
from jaxdpo.planning.machines import Topology, topology
from jaxdpo.planning.search import PairTokens, Plan, search
from jaxdpo.planning.target import Target
from jaxdpo.training.resolve import validate
from jaxdpo.training.trainer import model_folder

FITS, FAULT = 0, 1
UNNEEDED = ("data.train=", "eval.every=", "model.path=null")
"""Problems of a training run that do not matter to a plan, by the start of their message."""


@section
class PlanConfig(Config):
    """Memory, time and price of a training run on a machine, before the machine is rented.

    Takes every option of jaxdpo.train, and these.
    """

    topology: str | None = None
    """The machine (required): v5e-8, v5e-16, v5p-128, v6e-8, v4-8, h100-8, a100-8, l4-1 ..."""
    model_config: str | None = None
    """The model's config.json, or its folder, instead of model.path."""
    read_data: bool = False
    """Read data.train for true lengths (needs the tokenizer); else all pairs have pair_tokens."""
    pair_tokens: list[int] | None = None
    """Tokens of a typical pair: [prompt, chosen, rejected]. Default: half of what data.max_length
    and data.max_prompt_length allow."""
    pairs: int = 10_000
    """Pairs of an epoch, for its time and price."""
    price: float | None = None
    """Dollars per chip and hour, for the price of an epoch."""
    efficiency: float = 0.5
    """Share of the roofline's speed that time and price assume. Measure one step and set it."""
    compile: bool = True
    """Compile the step ahead of time where the platform's compiler is installed; else estimate."""
    search: bool = True
    """Search for the fastest mesh, remat policy and packed length that fit."""

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
    problems = []
    for problem in validate(config):
        if not problem.startswith(UNNEEDED):
            problems.append(problem)
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
    """The model's parsed config.json, from a file, a folder or the hub.

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


def typical_pair(config: PlanConfig, target: Target) -> PairTokens:
    """pair_tokens, or a pair half as long as the maximal one."""
    if config.pair_tokens is not None:
        prompt, chosen, rejected = config.pair_tokens
        return prompt, chosen, rejected
    max_length = config.data.max_length_for(target.model.max_positions)
    max_prompt = config.data.max_prompt_length or max_length // 2
    completion = max((max_length - max_prompt) // 2, 1)
    return max(max_prompt // 2, 1), completion, completion


def plan_of(config: PlanConfig, target: Target) -> Plan:
    """The plan of the config as it is, without a search.

    Raises:
        ValueError: the config does not fit the machine or the model.
    """
    if not config.read_data:
        return Plan.of(target, config, typical_pair(config, target))
    program = target.program(config)
    section = program.config.data
    tokenizer = load_tokenizer(str(model_folder(config)))
    data = prepare(section, tokenizer, target.model.vocab_size)
    loader = Loader.create(
        data.train,
        section,
        batch_size=config.train.batch_size,
        num_rows=num_row_shards(program.mesh),
        seed=config.seed,
    )
    return Plan.with_shapes(target, config, program, BatchShapes.from_loader(loader))


def plan(config: PlanConfig) -> int:
    """Print the plan; returns the exit status.

    Raises:
        ValueError: there is nothing to plan: an option is wrong, or the model is not supported.
    """
    machine = topology(config.topology or "")
    use_cpu(machine)
    target = Target.of(machine, read_model(config))
    chosen = plan_of(config, target)
    lines = describe(
        chosen,
        machine,
        pairs=config.pairs,
        price=config.price,
        efficiency=config.efficiency,
    )
    print(*lines, sep="\n")
    fits = chosen.fits
    if config.compile:
        fits = compile_and_compare(config, target, chosen)
    pair = typical_pair(config, target)
    found = search(target, config, pair) if config.search or not fits else []
    if config.search or found:
        print(*describe_search(found, machine), sep="\n")
    if not fits and not found:
        print(*describe_remedy(target, config, pair), sep="\n")
    return FITS if fits else FAULT


def compile_and_compare(config: PlanConfig, target: Target, chosen: Plan) -> bool:
    """Compile the step and print the compiler's figures; whether it fits by these.

    By the estimate where the platform's compiler is not installed.
    """
    machine = target.topology
    try:
        devices = compiler_devices(machine, offload=bool(config.train.offload))
    except CompilerUnavailable as reason:
        print(f"not compiled: {reason}; all of the above is an estimate")
        return chosen.fits
    compiled = compile_step(target.program(config, devices), chosen.shapes)
    print(*describe_compiled(compiled, chosen, machine), sep="\n")
    return compiled.fits and compiled.peak <= machine.chip.memory


def use_cpu(machine: Topology) -> None:
    """Keep JAX to this machine's CPU, with as many devices as are planned for on cpu-N."""
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

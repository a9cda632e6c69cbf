"""A plan in words and tables, as lines of text."""

from collections.abc import Iterator, Sequence

from jaxdpo.config.schema import Config
from jaxdpo.planning.aot_compile import CompiledStep
from jaxdpo.planning.machines import GIB, Topology
from jaxdpo.planning.search import PairTokens, Plan, remedy
from jaxdpo.planning.target import Target

SHOWN = 5
"""Settings of a search that are printed."""


def describe(
    plan: Plan, machine: Topology, *, pairs: int, price: float | None, efficiency: float
) -> Iterator[str]:
    """The machine, model and batch of a plan, its memory by part, and its time.

    Args:
        pairs: pairs of an epoch.
        price: dollars per chip and hour.
        efficiency: share of the roofline's speed to expect.
    """
    yield from _describe_run(plan, machine)
    yield ""
    yield from _describe_memory(plan, machine)
    yield ""
    yield from _describe_time(plan)
    seconds = plan.time.seconds / efficiency
    pairs_per_second = len(plan.shapes.lengths) / seconds
    hours = seconds * pairs / len(plan.shapes.lengths) / 3600
    yield (
        f"at {efficiency:.0%} of that: {seconds:.3g} s a step, {pairs_per_second:.3g} pairs/s, "
        f"{hours:.3g} h for {pairs} pairs"
    )
    if price is not None:
        dollars = hours * machine.num_chips * price
        yield f"at ${price:g} a chip and hour: ${dollars:.2f} for {pairs} pairs"


def _describe_run(plan: Plan, machine: Topology) -> Iterator[str]:
    program, chip, shapes = plan.program, machine.chip, plan.shapes
    hosts = _count(machine.num_hosts, "host")
    if machine.num_slices > 1:
        hosts = f"{machine.num_slices} slices, {hosts}"
    yield f"{machine.name}: {machine.num_chips} x {chip.kind} with {_gib(chip.memory)}, {hosts}"
    num_trained, num_all = program.weights.num_trained(), program.weights.num_all()
    trained = "all trained"
    if num_trained != num_all:
        trained = f"{num_trained / 1e6:.1f}M trained in adapters"
    yield (
        f"{program.model.family} of {num_all / 1e9:.2f}B weights, {trained}; "
        f"reference {program.weights.reference_kind}; {plan.options}"
    )
    microbatches = _count(shapes.microbatches, "microbatch", "microbatches")
    sequences = _count(shapes.rows, "packed sequence")
    yield (
        f"a step: {len(shapes.lengths)} pairs in {microbatches} of {sequences} "
        f"of {shapes.typical} tokens, at most {shapes.longest}"
    )


def _describe_memory(plan: Plan, machine: Topology) -> Iterator[str]:
    memory = plan.memory
    yield "memory of a device, estimated:"
    for name, size in memory.parts.items():
        yield f"  {name:26}{_gib(size):>12}"
    for name, size in memory.offloaded.items():
        yield f"  {name + ' (host)':26}{_gib(size):>12}"
    peak = f"at most ({memory.worst})"
    yield f"  {peak:26}{_gib(memory.peak):>12}  {_verdict(plan.fits, machine)}"


def _describe_time(plan: Plan) -> Iterator[str]:
    time = plan.time
    yield f"model FLOPs of a step: {time.useful / 1e12:.3g} TFLOP"
    yield f"sent by a device: {_gigabytes(time.sent) or 'nothing'}"
    if time.fetched:
        seconds = sum(time.fetching.values())
        yield f"fetched from the host by a device: {_gigabytes(time.fetched)}, in {seconds:.3g} s"
    yield (
        f"roofline: matmul {time.matmul:.3g} s, memory {time.memory:.3g} s, "
        f"communication {time.communication:.3g} s ({time.exposed:.3g} s exposed); "
        f"at best {time.seconds:.3g} s a step, MFU {time.mfu:.0%}"
    )


def describe_compiled(compiled: CompiledStep, plan: Plan, machine: Topology) -> Iterator[str]:
    """The compiler's figures beside the estimate."""
    yield ""
    limit = machine.chip.memory
    if not compiled.fits:
        yield (
            f"compiled ahead of time: refused, it needs at least {_gib(compiled.peak)} "
            f"of {_gib(limit)}"
        )
        return
    error = plan.memory.peak / compiled.peak - 1
    yield (
        f"compiled ahead of time: {_gib(compiled.peak)} of a device at most, "
        f"{_verdict(compiled.peak <= limit, machine)} (the estimate is {error:+.0%} off)"
    )
    yield f"  state, reference and batch: {_gib(compiled.arguments)}"
    if machine.chip.platform == "tpu":
        # The TPU compiler turns collectives into parts of loops, whose counts its text lacks.
        return
    for kind in sorted({one.kind for one in compiled.collectives}):
        of_kind = [one for one in compiled.collectives if one.kind == kind]
        count = sum(one.count for one in of_kind)
        gigabytes = sum(one.sent for one in of_kind) / 1e9
        yield f"  {kind}: {count} times, {gigabytes:.3g} GB sent by a device"


def describe_search(found: Sequence[Plan], machine: Topology) -> Iterator[str]:
    """The fastest settings that fit."""
    yield ""
    if not found:
        memory = _gib(machine.chip.memory)
        yield f"search: no mesh, remat policy or packed length fits into {memory}"
        return
    yield f"search: {len(found)} settings fit; the fastest by the roofline:"
    for plan in found[:SHOWN]:
        yield f"  {plan.time.seconds:8.3g} s  {_gib(plan.memory.peak):>10}  {plan.options}"
    yield f"recommended: {found[0].options}"


def describe_remedy(target: Target, config: Config, pair_tokens: PairTokens) -> Iterator[str]:
    """Options that save memory, where no setting fits without them."""
    found = remedy(target, config, pair_tokens)
    if found is None:
        yield "nothing that was tried makes it fit: take a larger machine or a smaller model"
    else:
        name, plan = found
        yield f"this fits: {name} {plan.options} ({_gib(plan.memory.peak)} of a device)"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _gigabytes(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in sizes.items())


def _count(number: int, one: str, several: str | None = None) -> str:
    if number == 1:
        return f"1 {one}"
    return f"{number} {several or one + 's'}"


def _verdict(fits: bool, machine: Topology) -> str:
    verdict = "fits" if fits else "does NOT fit"
    return f"{verdict} into {_gib(machine.chip.memory)}"

"""A plan in words and tables, as lines of text."""

from collections.abc import Iterator, Sequence

from jaxdpo.config.schema import Config
from jaxdpo.planning.aot_compile import Compiled, gib
from jaxdpo.planning.machines import Topology
from jaxdpo.planning.search import Choice, remedy
from jaxdpo.planning.target import Target

SHOWN = 5


def describe(
    choice: Choice, machine: Topology, *, pairs: int, price: float | None, efficiency: float
) -> Iterator[str]:
    """What is planned, its memory by part, and its speed."""
    program, chip = choice.program, machine.chip
    trained, every = program.weights.num_trained(), program.weights.num_all()
    what = "all trained" if trained == every else f"{trained / 1e6:.1f}M trained in adapters"
    slices = f"{machine.num_slices} slices, " if machine.num_slices > 1 else ""
    hosts = f"{slices}{machine.num_hosts} host{'s' * (machine.num_hosts > 1)}"
    yield f"{machine.name}: {machine.num_chips} x {chip.kind} with {gib(chip.memory)}, {hosts}"
    yield f"{program.model.family} of {every / 1e9:.2f}B weights, {what}; reference {program.weights.reference_kind}; {choice.options}"
    rows = choice.rows
    shape = f"{rows.microbatches} microbatch{'es' * (rows.microbatches > 1)} of {rows.rows} rows"
    yield f"a step: {len(rows.lengths)} pairs in {shape} of {rows.slots} slots, at most {rows.longest}"
    yield ""
    yield "memory of a device, estimated:"
    for name, size in choice.memory.parts.items():
        yield f"  {name:26}{gib(size):>12}"
    verdict = "fits" if choice.fits else "does NOT fit"
    yield from (
        f"  {name + ' (host)':26}{gib(size):>12}" for name, size in choice.memory.waiting.items()
    )
    yield f"  {'at most (' + choice.memory.worst + ')':26}{gib(choice.memory.peak):>12}  {verdict} into {gib(chip.memory)}"
    yield ""
    yield from _speed(choice, machine, pairs, price, efficiency)


def _speed(
    choice: Choice, machine: Topology, pairs: int, price: float | None, efficiency: float
) -> Iterator[str]:
    speed, count = choice.speed, len(choice.rows.lengths)
    yield f"useful work of a step: {speed.useful / 1e12:.3g} TFLOP"
    sent = (
        ", ".join(f"{axis} {size / 1e9:.3g} GB" for axis, size in speed.sent.items()) or "nothing"
    )
    yield f"sent by a device: {sent}"
    if speed.waited:
        parts = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in speed.waited.items())
        yield f"brought from the host to a device: {parts}, in {sum(speed.bringing.values()):.3g} s"
    times = f"matrix products {speed.products:.3g} s, memory {speed.memory:.3g} s, links {speed.links:.3g} s"
    yield f"roofline: {times} of which {speed.exposed:.3g} s nothing hides; at best {speed.seconds:.3g} s a step, MFU {speed.mfu:.0%}"
    seconds = speed.seconds / efficiency
    hours = seconds * pairs / count / 3600
    yield f"at {efficiency:.0%} of that: {seconds:.3g} s a step, {count / seconds:.3g} pairs/s, {hours:.3g} h for {pairs} pairs"
    if price is not None:
        yield f"at ${price:g} a chip and hour: ${hours * machine.num_chips * price:.2f} for {pairs} pairs"


def describe_compiled(compiled: Compiled, choice: Choice, machine: Topology) -> Iterator[str]:
    """What the compiler says, beside the estimate."""
    yield ""
    limit = gib(machine.chip.memory)
    if not compiled.fits:
        yield f"compiled ahead of time: refused, it needs at least {gib(compiled.peak)} of {limit}"
        return
    verdict = "fits" if compiled.peak <= machine.chip.memory else "does NOT fit"
    off = choice.memory.peak / compiled.peak - 1
    yield f"compiled ahead of time: {gib(compiled.peak)} of a device at most, {verdict} into {limit} (the estimate is {off:+.0%} off)"
    yield f"  state, reference and batch: {gib(compiled.arguments)}"
    if (
        machine.chip.platform == "tpu"
    ):  # whose compiler turns collectives into parts of loops, and tells no counts of those
        return
    for kind in sorted({one.kind for one in compiled.collectives}):
        mine = [one for one in compiled.collectives if one.kind == kind]
        yield f"  {kind}: {sum(one.times for one in mine)} times, {sum(one.sent for one in mine) / 1e9:.3g} GB sent by a device"


def describe_search(found: Sequence[Choice], machine: Topology) -> Iterator[str]:
    """The fastest settings that fit."""
    yield ""
    if not found:
        yield f"search: no mesh, remat policy or row length fits into {gib(machine.chip.memory)}"
        return
    yield f"search: {len(found)} settings fit; the fastest by the roofline:"
    for choice in found[:SHOWN]:
        yield f"  {choice.speed.seconds:8.3g} s  {gib(choice.memory.peak):>10}  {choice.options}"
    yield f"recommended: {found[0].options}"


def describe_remedy(
    target: Target, config: Config, pair_tokens: tuple[int, int, int]
) -> Iterator[str]:
    """What would fit where no setting does."""
    found = remedy(target, config, pair_tokens)
    if found is None:
        yield "nothing that was tried makes it fit: take a larger machine or a smaller model"
    else:
        name, choice = found
        yield f"this fits: {name} {choice.options} ({gib(choice.memory.peak)} of a device)"

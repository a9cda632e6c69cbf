"""The roofline."""

import dataclasses

import numpy as np
import pytest

from jaxdpo.config.data_options import DataSection
from jaxdpo.planning.aot_compile import compile_step, compiler_devices
from jaxdpo.planning.batch_shapes import Rows
from jaxdpo.planning.machines import topology
from jaxdpo.planning.roofline import roofline
from tests.planning.llama import config, planned, target

BIG = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def test_useful_work_is_that_of_the_weights() -> None:
    """8 FLOPs for each weight and token (FIELD: 8N), the embedding aside, and a little attention."""
    choice = planned(target("h100-1", **BIG), 16)
    layers = 32 * (2 * 4096 * (32 + 8) * 128 + 3 * 4096 * 14336)
    tokens, answers = 16 * 768, 16 * 512
    assert choice.speed.useful == pytest.approx(
        8 * (layers * tokens + 8000 * 4096 * answers), rel=0.02
    )
    assert (
        choice.speed.products > choice.speed.useful / choice.speed.peak
    )  # the layers are computed twice
    assert 0.6 < choice.speed.mfu < 0.85


def test_what_is_not_computed_takes_no_time() -> None:
    some = target("h100-1", **BIG)
    plain, cached, kept = (
        planned(some, 16, **change).speed
        for change in ({}, {"reference": "cached"}, {"model": {"remat": "none"}})
    )
    assert cached.products < plain.products and kept.products < plain.products
    assert kept.useful == plain.useful > cached.useful


def test_twice_the_chips_take_half_the_time() -> None:
    one, two = (
        planned(target(f"v5p-{cores}", **BIG), 64, mesh={"fsdp": cores // 2}).speed
        for cores in (8, 16)
    )
    assert two.products == pytest.approx(one.products / 2, rel=0.05)
    assert two.useful == one.useful


def test_activations_of_a_shared_product_are_waited_for() -> None:
    some = target("v5p-8", **BIG)
    tensor, fsdp = (planned(some, 64, mesh=mesh).speed for mesh in ({"tensor": 4}, {"fsdp": 4}))
    assert tensor.exposed > 0 == fsdp.exposed
    assert tensor.seconds == pytest.approx(tensor.products + tensor.exposed)
    assert set(tensor.sent) == {"tensor"} and set(fsdp.sent) == {"fsdp"}


def test_a_slower_network_is_seen() -> None:
    choice = planned(target("h100-16", **BIG), 16, mesh={"fsdp": 16})
    slow = dataclasses.replace(
        topology("h100-16"), chip=dataclasses.replace(topology("h100-16").chip, network=5e9)
    )
    slower = roofline(choice.program, choice.rows, slow)
    assert (
        slower.sent == choice.speed.sent and slower.sending["fsdp"] == choice.speed.sending["fsdp"]
    )
    assert slower.sending["slices"] == pytest.approx(10 * choice.speed.sending["slices"])
    assert "slices" not in planned(target("h100-8", **BIG), 16, mesh={"fsdp": 8}).speed.sent


def test_slices_send_each_other_the_sums_of_their_gradients() -> None:
    one, two = (
        planned(target(name, **BIG), 64, mesh={"fsdp": 16}).speed for name in ("v5e-16", "2xv5e-16")
    )
    assert set(one.sent) == {"fsdp"} and set(two.sent) == {"fsdp", "slices"}
    choice = planned(target("2xv5e-16", **BIG), 64, mesh={"fsdp": 16})
    weights = choice.program.weights.num_trained()
    assert two.sent["slices"] == pytest.approx(
        choice.rows.microbatches * 4 * weights / 16
    )  # 2 * (2 - 1) / 2 of a device's share
    assert two.sending["slices"] / two.sent["slices"] > 10 * two.sending["fsdp"] / two.sent["fsdp"]
    near = planned(target("2xv5e-16", **BIG), 64, mesh={"fsdp": 8}).speed
    assert (
        near.sent["data"] == near.sent["slices"] * 2
    )  # to the sister in the slice, then half of it to the other slice
    across = planned(target("2xv5e-16", **BIG), 64, mesh={"fsdp": 32}).speed
    weights_sent = (
        two.sent["fsdp"] * 16 / 15
    )  # of all weights, of which a slice lacks half and each of its 16 chips fetches a share
    assert across.sent["slices"] == pytest.approx(weights_sent / 2 / 16)


def test_what_waits_is_brought_over() -> None:
    some = target("v5e-8", **BIG)
    plain, apart = (
        planned(some, 64, mesh={"fsdp": 8}, train={"offload": what, "batch_size": 64})
        for what in ([], ["reference", "moments"])
    )
    assert plain.speed.waited == {} and plain.memory.waiting == {}
    assert apart.speed.waited["optimizer moments"] == apart.memory.waiting["optimizer moments"]
    several, once = (
        apart.rows.microbatches * apart.memory.waiting["reference"],
        apart.memory.waiting["reference"],
    )
    assert (
        once < 0.95 * several < apart.speed.waited["reference"] < several
    )  # embedding and LM head come once
    assert sum(apart.speed.bringing.values()) == pytest.approx(
        sum(apart.speed.waited.values()) / 15e9
    )
    assert apart.speed.seconds == pytest.approx(
        plain.speed.seconds + apart.speed.bringing["optimizer moments"]
    )
    moved = sum(apart.memory.waiting.values())
    assert apart.memory.peak < plain.memory.peak - 0.9 * moved
    assert apart.memory.held["optimizer moments"] < 100


@pytest.mark.slow
def test_what_is_sent_is_what_the_compiled_program_sends() -> None:
    """Sharded weights: within a third, as the compiler gathers some twice and sends float32 on a CPU."""
    some = target("cpu-8", num_hidden_layers=4)
    choice = planned(some, 32, mesh={"fsdp": 8})
    compiled = compile_step(
        some.program(config(32, mesh={"fsdp": 8}), compiler_devices(some.topology)), choice.rows
    )
    assert sum(one.sent for one in compiled.collectives) == pytest.approx(
        choice.speed.sent["fsdp"], rel=0.35
    )


def test_rows_are_filled_with_pairs_of_one_length() -> None:
    section = DataSection(packed_length=4096, max_length=1024)
    rows = Rows.filled(section, (256, 256, 256), 64, 8)
    assert (rows.microbatches, rows.rows, rows.slots, rows.longest) == (2, 8, 3072, 4096)
    assert rows.lengths.sum() == 64 * 768 and rows.batch.tokens_MBT.shape == (2, 8, 4096)
    one = Rows.filled(section, (256, 256, 256), 8, 8)
    assert (one.microbatches, one.slots) == (1, 768)
    separate = Rows.filled(dataclasses.replace(section, share_prefix=False), (256, 256, 256), 64, 8)
    assert separate.microbatches == 2 and separate.slots == 4096
    assert np.all(separate.lengths == 256)

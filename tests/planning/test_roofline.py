"""The roofline."""

import dataclasses

import numpy as np
import pytest

from jaxdpo.config.data_options import DataSection
from jaxdpo.planning.aot_compile import compile_step, compiler_devices
from jaxdpo.planning.batch_shapes import BatchShapes
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
    """8 FLOPs per weight and token without the embedding (2 forward, 4 backward, 2 of the
    reference), and a little attention."""
    plan = planned(target("h100-1", **BIG), 16)
    layers = 32 * (2 * 4096 * (32 + 8) * 128 + 3 * 4096 * 14336)
    tokens, loss_tokens = 16 * 768, 16 * 512
    assert plan.time.useful == pytest.approx(
        8 * (layers * tokens + 8000 * 4096 * loss_tokens), rel=0.02
    )
    # remat computes the layers twice.
    assert plan.time.matmul > plan.time.useful / plan.time.peak
    assert 0.6 < plan.time.mfu < 0.85


def test_what_is_not_computed_takes_no_time() -> None:
    some = target("h100-1", **BIG)
    plain = planned(some, 16).time
    cached = planned(some, 16, reference="cached").time
    kept = planned(some, 16, model={"remat": "none"}).time
    assert cached.matmul < plain.matmul and kept.matmul < plain.matmul
    assert kept.useful == plain.useful > cached.useful


def test_twice_the_chips_take_half_the_time() -> None:
    one = planned(target("v5p-8", **BIG), 64, mesh={"fsdp": 4}).time
    two = planned(target("v5p-16", **BIG), 64, mesh={"fsdp": 8}).time
    assert two.matmul == pytest.approx(one.matmul / 2, rel=0.05)
    assert two.useful == one.useful


def test_all_reduces_of_tensor_parallelism_are_exposed() -> None:
    some = target("v5p-8", **BIG)
    tensor = planned(some, 64, mesh={"tensor": 4}).time
    fsdp = planned(some, 64, mesh={"fsdp": 4}).time
    assert tensor.exposed > 0 == fsdp.exposed
    assert tensor.seconds == pytest.approx(tensor.matmul + tensor.exposed)
    assert set(tensor.sent) == {"tensor"} and set(fsdp.sent) == {"fsdp"}


def test_a_slower_network_is_seen() -> None:
    plan = planned(target("h100-16", **BIG), 16, mesh={"fsdp": 16})
    slow = dataclasses.replace(
        topology("h100-16"), chip=dataclasses.replace(topology("h100-16").chip, network=5e9)
    )
    slower = roofline(plan.program, plan.shapes, slow)
    assert slower.sent == plan.time.sent and slower.sending["fsdp"] == plan.time.sending["fsdp"]
    assert slower.sending["slices"] == pytest.approx(10 * plan.time.sending["slices"])
    assert "slices" not in planned(target("h100-8", **BIG), 16, mesh={"fsdp": 8}).time.sent


def test_slices_send_each_other_the_sums_of_their_gradients() -> None:
    one = planned(target("v5e-16", **BIG), 64, mesh={"fsdp": 16}).time
    plan = planned(target("2xv5e-16", **BIG), 64, mesh={"fsdp": 16})
    two = plan.time
    assert set(one.sent) == {"fsdp"} and set(two.sent) == {"fsdp", "slices"}
    # An all-reduce among 2 slices: 2 * (2 - 1) / 2 of a device's share.
    weights = plan.program.weights.num_trained()
    assert two.sent["slices"] == pytest.approx(plan.shapes.microbatches * 4 * weights / 16)
    assert two.sending["slices"] / two.sent["slices"] > 10 * two.sending["fsdp"] / two.sent["fsdp"]
    near = planned(target("2xv5e-16", **BIG), 64, mesh={"fsdp": 8}).time
    # To the other replica in the slice, then half of it to the other slice.
    assert near.sent["data"] == near.sent["slices"] * 2
    across = planned(target("2xv5e-16", **BIG), 64, mesh={"fsdp": 32}).time
    # A slice has half of the weights, and each of its 16 chips fetches a share of the other half.
    weights_sent = two.sent["fsdp"] * 16 / 15
    assert across.sent["slices"] == pytest.approx(weights_sent / 2 / 16)


def test_offloaded_state_is_fetched_from_the_host() -> None:
    some = target("v5e-8", **BIG)
    plain = planned(some, 64, mesh={"fsdp": 8})
    train = {"offload": ["reference", "moments"], "batch_size": 64}
    offloaded = planned(some, 64, mesh={"fsdp": 8}, train=train)
    assert plain.time.fetched == {} and plain.memory.offloaded == {}
    assert (
        offloaded.time.fetched["optimizer moments"]
        == offloaded.memory.offloaded["optimizer moments"]
    )
    once = offloaded.memory.offloaded["reference"]
    several = offloaded.shapes.microbatches * once
    # Embedding and LM head are fetched once, the layers once per microbatch.
    assert once < 0.95 * several < offloaded.time.fetched["reference"] < several
    assert sum(offloaded.time.fetching.values()) == pytest.approx(
        sum(offloaded.time.fetched.values()) / 15e9
    )
    assert offloaded.time.seconds == pytest.approx(
        plain.time.seconds + offloaded.time.fetching["optimizer moments"]
    )
    moved = sum(offloaded.memory.offloaded.values())
    assert offloaded.memory.peak < plain.memory.peak - 0.9 * moved
    assert offloaded.memory.persistent["optimizer moments"] < 100


@pytest.mark.slow
def test_what_is_sent_is_what_the_compiled_program_sends() -> None:
    """fsdp: within a third, as the compiler gathers some weights twice and in float32 on a CPU."""
    some = target("cpu-8", num_hidden_layers=4)
    plan = planned(some, 32, mesh={"fsdp": 8})
    compiled = compile_step(
        some.program(config(32, mesh={"fsdp": 8}), compiler_devices(some.topology)), plan.shapes
    )
    assert sum(one.sent for one in compiled.collectives) == pytest.approx(
        plan.time.sent["fsdp"], rel=0.35
    )


def test_packed_sequences_are_filled_with_pairs_of_one_length() -> None:
    section = DataSection(packed_length=4096, max_length=1024)
    shapes = BatchShapes.uniform(section, (256, 256, 256), 64, 8)
    assert (shapes.microbatches, shapes.rows, shapes.typical, shapes.longest) == (2, 8, 3072, 4096)
    assert shapes.lengths.sum() == 64 * 768 and shapes.batch.tokens_MBT.shape == (2, 8, 4096)
    one = BatchShapes.uniform(section, (256, 256, 256), 8, 8)
    assert (one.microbatches, one.typical) == (1, 768)
    unshared = dataclasses.replace(section, share_prefix=False)
    separate = BatchShapes.uniform(unshared, (256, 256, 256), 64, 8)
    assert separate.microbatches == 2 and separate.typical == 4096
    assert np.all(separate.lengths == 256)

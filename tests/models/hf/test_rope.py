"""Rope in config.json: both forms, rope scaling, partial rope, rope of sliding-window layers."""

import math
from typing import Any

import pytest

from jaxdpo.models.config import RopeScaling
from jaxdpo.models.hf.config_json import from_hf, to_hf
from tests.families import LONGROPE, raw_config, tiny

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def hub_config(name: str = "llama", **changes: Any) -> dict[str, Any]:
    return raw_config(name, **{"rope_theta": 10000.0, "rope_scaling": None, **changes})


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2.0}, RopeScaling(kind="linear", factor=2.0)),
        (LLAMA3, RopeScaling(kind="llama3", factor=8.0, original_max_positions=64)),
        (
            YARN,
            RopeScaling(
                kind="yarn",
                factor=4.0,
                original_max_positions=64,
                attention_factor=0.1 * math.log(4) + 1,
            ),
        ),
        (
            {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.5},
            RopeScaling(
                kind="yarn",
                factor=4.0,
                original_max_positions=64,
                beta_fast=16,
                beta_slow=2,
                truncate=False,
                attention_factor=1.5,
            ),
        ),
    ],
)
def test_hub_form_and_transformers_5_form_are_read_alike(
    scaling: dict | None, expected: RopeScaling | None
) -> None:
    old = from_hf(hub_config(rope_theta=5e5, rope_scaling=scaling))
    parameters = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
    new = from_hf(hub_config(rope_theta=..., rope_scaling=..., rope_parameters=parameters))
    both = from_hf(hub_config(rope_theta=5e5, rope_scaling=scaling, rope_parameters=parameters))
    assert old == new == both == from_hf(to_hf(old))
    assert old.rope_theta == 5e5 and old.rope_scaling == expected


def test_yarn_reads_deepseeks_factors() -> None:
    """attention_factor is a ratio where mscale and mscale_all_dim are given, as in transformers."""
    scaling = tiny(
        "llama", rope_scaling={**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    ).rope_scaling
    assert scaling is not None and scaling.attention_factor == pytest.approx(
        (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    )


def test_gpt_oss_has_yarn_by_default() -> None:
    scaling = tiny("gpt_oss", rope_scaling=...).rope_scaling
    assert scaling is not None and (
        scaling.kind,
        scaling.factor,
        scaling.original_max_positions,
    ) == ("yarn", 32.0, 4096)
    assert tiny("gpt_oss", rope_scaling={"rope_type": "default"}).rope_scaling is None
    assert tiny("gpt_oss", rope_theta=...).rope_theta == 150000.0


def test_longrope_keeps_to_the_original_context() -> None:
    config = tiny("phi3 long")
    assert (config.max_positions, config.rotary_dim, config.head_dim) == (64, 4, 8)
    attention = math.sqrt(1 + math.log(2) / math.log(64))
    expected = RopeScaling(
        kind="longrope",
        factor=2.0,
        original_max_positions=64,
        attention_factor=attention,
        short_factor=(1.1, 1.5),
        long_factor=(2.0, 8.0),
    )
    assert config.rope_scaling == expected
    for kind in ("su", "yarn"):  # what early versions called it
        assert tiny("phi3 long", rope_scaling={**LONGROPE, "type": kind}) == config


def test_longrope_is_written_for_transformers_4_and_5() -> None:
    config, raw = tiny("phi3 long"), raw_config("phi3 long", max_position_embeddings=128)
    for written in (to_hf(config, raw), to_hf(config)):
        assert (
            written["max_position_embeddings"] == 128
            and written["original_max_position_embeddings"] == 64
        )
        assert written["rope_scaling"] == LONGROPE  # transformers 4 refuses a fourth key
        assert (
            written["rope_parameters"]["rope_type"] == "longrope"
            and written["rope_parameters"]["partial_rotary_factor"] == 0.5
        )
    other = tiny("phi3 long", rope_scaling={**LONGROPE, "attention_factor": 1.25})
    assert (
        to_hf(other)["rope_scaling"]["attention_factor"] == 1.25 and from_hf(to_hf(other)) == other
    )
    explicit = tiny("phi3 long", rope_scaling={**LONGROPE, "factor": 3.0})
    assert from_hf(to_hf(explicit)) == explicit == from_hf(to_hf(explicit, raw))


def test_gemma3_has_another_rope_in_layers_with_a_window() -> None:
    hub = tiny("gemma3", rope_theta=2e6, rope_local_base_freq=5e3)
    assert (hub.rope_theta, hub.local_rope_theta) == (2e6, 5e3)
    assert hub.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    full, sliding = (
        {"rope_type": "linear", "type": "linear", "factor": 2.0, "rope_theta": 2e6},
        {"rope_type": "default", "rope_theta": 5e3},
    )
    nested = {"full_attention": full, "sliding_attention": sliding}
    assert tiny("gemma3", rope_scaling=..., rope_parameters=nested) == hub
    assert to_hf(hub)["rope_parameters"] == nested and to_hf(hub)["rope_local_base_freq"] == 5e3
    usual = tiny("gemma3", rope_scaling=...)
    assert (usual.rope_theta, usual.local_rope_theta, usual.rope_scaling) == (1e6, 1e4, None)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            r'rope_type="dynamic": is not .*default, linear, llama3, yarn',
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            r'rope_type="longrope"',
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": ["yarn"]}},
            r'rope_type=\["yarn"\]: is not implemented',
        ),
        (
            "phi3",
            {"rope_scaling": LLAMA3},
            r'rope_type="llama3": is not implemented.*default, longrope',
        ),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            r"high_freq_factor=1.0: must exceed",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"low_freq_factor: is missing",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": -1}},
            r"factor=-1: must be a number above 0",
        ),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, r"rope: factor: is missing"),
        (
            "llama",
            {"rope_scaling": {**YARN, "truncate": "no"}},
            r'truncate="no": must be true or false',
        ),
        ("llama", {"rope_scaling": "linear"}, r"rope_scaling=.*must be an object"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            r"rope_parameters=.*differs between layers",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 2e4}},
            r"rope_theta=10000.0: the rope parameters say 20000.0",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3},
            r"rope_scaling.rope_type=\"llama3\"",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5: rope on a part"),
        (
            "phi3",
            {"partial_rotary_factor": 0.1},
            r"partial_rotary_factor=0.1: rotates 0 of 8 dimensions",
        ),
        (
            "phi3",
            {"partial_rotary_factor": 2.0},
            r"partial_rotary_factor=2.0: rotates 16 of 8 dimensions",
        ),
        (
            "phi3 long",
            {"rope_scaling": {**LONGROPE, "short_factor": [1.0]}},
            r"short_factor=\[1.0\]: must be a list of 2 numbers",
        ),
        (
            "phi3 long",
            {"rope_scaling": {**LONGROPE, "long_factor": [1.0, 0]}},
            r"long_factor=.*must be a list of 2 numbers above 0",
        ),
        ("phi3 long", {"rope_scaling": {"type": "longrope"}}, r"short_factor: is missing"),
        (
            "gemma3",
            {"rope_parameters": {"rope_theta": 1e4}},
            r"rope_parameters=.*must hold objects: full_attention",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": 3}},
            r"rope_parameters=.*must hold objects",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}},
            r'sliding_attention.rope_type="yarn": only default',
        ),
        (
            "gemma3",
            {
                "rope_local_base_freq": 1e4,
                "rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 2e4}},
            },
            r"rope_local_base_freq=10000.0: .*rope_theta=20000.0 says otherwise",
        ),
    ],
)
def test_refused_by_name(name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(hub_config(name, **changes))

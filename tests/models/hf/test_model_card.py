"""README.md of an exported model."""

import yaml

from jaxdpo.models.hf.model_card import Card, model_card


def test_a_hub_model_is_named_as_base_and_markup_is_inert() -> None:
    text = model_card(
        Card(base_model="org/name", datasets=("a|b", "<script>"), settings={"x": "1\n| y |"})
    )
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "org/name"
    assert r"| data | a\|b, \<script> |" in text and r"| x | 1 \| y \| |" in text


def test_an_adapter_says_how_it_is_loaded() -> None:
    head, body = model_card(Card(base_model="org/name", adapter=True)).split("---\n")[1:]
    assert yaml.safe_load(head)["library_name"] == "peft" and "lora" in yaml.safe_load(head)["tags"]
    assert "load it over its base model with PEFT" in body

"""Tiny models that answer, and the greedy answers of their weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.sampling import generate as generate_ids
from tests.tiny import model, params, write_model

STOP = 63
"""The token <|stop|> of write_chat_model, which ends its turns and is not eos."""
TEMPLATE = (
    "{% for m in messages %}{{ 'w61 ' if m.role == 'user' else 'w62 ' }}{{ m.content }} "
    "{% if m.role == 'assistant' %}<|stop|> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}w62 {% endif %}"
)


def write_chat_model(folder: Path) -> None:
    """Weights of seed 1 and a chat template whose turns end with a token that is not eos."""
    write_model(folder, seed=1)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    (old,) = (word for word, number in vocabulary.items() if number == STOP)
    del vocabulary[old]
    vocabulary["<|stop|>"] = STOP
    stop = tokenizer["added_tokens"][0] | {"id": STOP, "content": "<|stop|>"}
    tokenizer["added_tokens"].append(stop)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def words(ids: Any) -> str:
    return " ".join(f"w{i}" for i in ids)


def greedy(
    seed: int, prompt: list[int], new: int = 5, stop_ids: tuple[int, ...] = (0,)
) -> list[int]:
    """The likeliest answer of the tiny model's weights of this seed."""
    (ids,) = generate_ids(
        params(seed),
        model(),
        [np.array(prompt, np.int32)],
        max_new_tokens=new,
        options=ForwardOptions(),
        stop_ids=stop_ids,
    )
    return ids.tolist()

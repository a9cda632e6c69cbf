"""Greedy completions of every family equal transformers', token by token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.load_save import load_params
from jaxdpo.models.sampling import generate
from tests.families import TINY
from tests.theirs import make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

NEW = 64
RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(1, 96, length).astype(np.int32) for length in (21, 2, 34, 13)]


def their_answers(model: Any, prompts: Sequence[np.ndarray]) -> list[list[int]]:
    """NEW ids for each prompt, all at once: padded on the left."""
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    mask = np.zeros_like(ids)
    for row, here, prompt in zip(ids, mask, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
        here[len(row) - len(prompt) :] = 1
    model.generation_config.eos_token_id = None  # go on for NEW tokens, whatever they are
    found = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
    )
    return found[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("case", TINY)
def test_greedy_completions_of_unequal_prompts_equal_transformers(
    tmp_path: Path, case: str
) -> None:
    both = make(tmp_path, case)
    window = both.config.sliding_window
    assert window is None or any(
        len(prompt) < window < len(other) for prompt in PROMPTS for other in PROMPTS
    )
    theirs = their_answers(both.model, PROMPTS)
    ours = generate(both.params, both.config, PROMPTS, max_new_tokens=NEW, options=ForwardOptions())
    assert [ids.tolist() for ids in ours] == theirs
    assert max(len(set(ids)) for ids in theirs) > 8, "answers that repeat a few tokens prove little"


def test_stories260k_continues_as_transformers_does(real_data: Path) -> None:
    folder = real_data / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ("Once upon a time", "Lily and Ben went to the park. They saw", "The dog said")
    prompts = [np.asarray(tokenizer(text)["input_ids"], np.int32) for text in texts]
    config = load_model_config(folder)
    params = load_params(folder, config, None, "float32")
    ours = generate(params, config, prompts, max_new_tokens=NEW, options=ForwardOptions())
    assert [ids.tolist() for ids in ours] == their_answers(model, prompts)

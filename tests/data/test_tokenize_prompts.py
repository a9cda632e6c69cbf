"""Prompts for generation: the tokens that training puts before an answer, and the stop tokens."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.preference import Dropped, Message, Preference, Text
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.template_source import ChatTemplate, check_kwargs, find_template
from jaxdpo.data.tokenize import EncodedPrompt, Encoder
from jaxdpo.data.tokenizer_json import load_tokenizer

KINDS = ("byte_tokenizer", "metaspace_tokenizer", "chat_tokenizer")
TURNS = (
    Message("user", "Which colour?"),
    Message("assistant", "It is red."),
    Message("user", "Thank you! And?"),
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: something stands before the last answer that the generation prompt lacks."""


def encoder(tokenizer: Any, **changes: Any) -> Encoder:
    return dataclasses.replace(
        Encoder(tokenizer, find_template(tokenizer, None).text, 10**6, 10**5), **changes
    )


def prompt_ids(made: Encoder, text: Text) -> list[int]:
    found = made.encode_prompt(text)
    assert isinstance(found, EncodedPrompt), found
    return found.ids.tolist()


def trained_ids(made: Encoder, text: Text) -> list[int]:
    """What training puts before the answers of a pair with this prompt."""
    answers = (
        ["7", "8"]
        if isinstance(text, str)
        else [(Message("assistant", word),) for word in ("7", "8")]
    )
    (pair,) = made.encode([Preference(text, *answers)])  # type: ignore[arg-type]
    assert isinstance(pair, EncodedPair), pair
    return pair.prompt_ids.tolist()


@pytest.mark.parametrize(
    "text", ["2 + 2 =", TURNS[:1], TURNS, (Message("system", "Be kind."), *TURNS)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_what_training_puts_before_an_answer(
    kind: str, text: Text, request: pytest.FixtureRequest
) -> None:
    made = encoder(request.getfixturevalue(kind))
    assert prompt_ids(made, text) == trained_ids(made, text)


def test_what_the_template_writes_before_an_answer_is_part_of_the_prompt(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    made = encoder(chat_tokenizer, template=THINKING)
    assert prompt_ids(made, TURNS) == trained_ids(made, TURNS)
    assert str(chat_tokenizer.decode(prompt_ids(made, TURNS))).endswith(
        "<|im_start|>assistant\n<think></think>"
    )


def test_prompt_truncation_keeps_bos_and_the_end_and_says_so(
    metaspace_tokenizer: PreTrainedTokenizerFast,
) -> None:
    whole = prompt_ids(encoder(metaspace_tokenizer), TURNS)
    cut = encoder(metaspace_tokenizer, max_prompt_length=9).encode_prompt(TURNS)
    assert (
        isinstance(cut, EncodedPrompt)
        and cut.truncated
        and cut.ids.tolist() == [whole[0], *whole[-8:]]
    )
    exact = encoder(metaspace_tokenizer, max_prompt_length=len(whole)).encode_prompt(TURNS)
    assert isinstance(exact, EncodedPrompt) and not exact.truncated


def test_prompts_that_have_no_form_say_why(
    byte_tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain, templated = encoder(byte_tokenizer), encoder(chat_tokenizer)
    assert plain.encode_prompt("") == Dropped("has no token")
    assert plain.encode_prompt((Message("tool", "3"),)) == Dropped(
        "plain text has no form for a role other than system, user, assistant"
    )
    assert templated.encode_prompt((Message("user", "a<|im_end|>"),)) == Dropped(
        "text spells a special token of the chat template"
    )
    refusing = encoder(
        chat_tokenizer, template="{{ raise_exception('no such turn') }}"
    ).encode_prompt(TURNS)
    assert (
        isinstance(refusing, Dropped)
        and "the chat template refuses it: no such turn" in refusing.reason
    )


def test_stop_ids_are_eos_and_what_the_template_writes_after_an_answer(
    byte_tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    begin, start, end = (
        chat_tokenizer.convert_tokens_to_ids(name)
        for name in ("<|begin|>", "<|im_start|>", "<|im_end|>")
    )
    assert encoder(byte_tokenizer).stop_ids == (byte_tokenizer.eos_token_id,)
    assert encoder(chat_tokenizer).stop_ids == (end,)
    other = encoder(
        chat_tokenizer,
        template="{% for m in messages %}{{ m.content }}\n<|im_start|><|begin|>{% endfor %}",
    )
    assert other.stop_ids == (end, start) and begin not in other.stop_ids
    assert encoder(chat_tokenizer, template="{{ raise_exception('no such turn') }}").stop_ids == (
        end,
    )


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_published_templates_end_a_turn(real_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizers" / "qwen3"))
    template = find_template(tokenizer, str(real_data / "chat_templates" / f"{name}.jinja")).text
    made = encoder(tokenizer, template=template)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in made.stop_ids
    assert prompt_ids(made, TURNS) == trained_ids(made, TURNS)


QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' and '</think>' not in m.content %}"
    "<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
"""Writes an empty think block before an answer without thoughts."""
R1 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""Opens a think block in the generation prompt, and cuts thoughts."""


@pytest.mark.parametrize(
    ("template", "answers", "is_open"),
    [
        (QWEN, ("<think>so</think>7", "<think>no</think>8"), True),
        (QWEN, ("7", "8"), False),
        (QWEN, ("<think>so</think>7", "8"), True),
        (R1, ("7", "8"), False),
        (R1, ("<think>so</think>7", "8"), False),
    ],
)
def test_generation_begins_an_answer_where_training_does(
    template: str, answers: tuple[str, str], is_open: bool, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    made = encoder(chat_tokenizer, template=template)
    chosen, rejected = ((Message("assistant", text),) for text in answers)
    (pair,) = made.encode([Preference(TURNS, chosen, rejected)])
    assert isinstance(pair, EncodedPair)
    assert pair.is_open is is_open
    prompt = made.encode_prompt(TURNS, thinking=is_open)
    assert isinstance(prompt, EncodedPrompt)
    assert prompt.ids.tolist() == pair.prompt_ids.tolist()


@pytest.mark.parametrize("enable", [True, False])
def test_variables_of_the_template_reach_training_and_generation(
    enable: bool, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    made = encoder(chat_tokenizer, template=QWEN, kwargs={"enable_thinking": enable})
    prompt = made.encode_prompt(TURNS, thinking=True)
    assert isinstance(prompt, EncodedPrompt)
    text = str(chat_tokenizer.decode(prompt.ids.tolist()))
    assert text.endswith("assistant\n" if enable else "assistant\n<think></think>")
    assert (made.starts() is None) is not enable
    assert made.identity != encoder(chat_tokenizer, template=QWEN).identity


def test_variables_that_no_template_reads_are_refused() -> None:
    option, kwargs = "data.chat_template_kwargs", {"enable_thinking": True}
    check_kwargs(option, kwargs, ChatTemplate(QWEN, None, ""))
    check_kwargs(option, kwargs, ChatTemplate(R1, QWEN, ""))
    for template in (R1, None):
        with pytest.raises(ValueError, match=r"chat_template_kwargs=.*does not read enable_th"):
            check_kwargs(option, kwargs, ChatTemplate(template, None, ""))
    for name in ("messages", "add_generation_prompt", "a b"):
        with pytest.raises(ValueError, match="is no variable of a chat template"):
            DataSection(chat_template_kwargs={name: 1})


def test_tools_are_part_of_a_prompt_to_generate_from(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + QWEN
    made = encoder(chat_tokenizer, template=template)
    tools = '[{"name": "add"}]'
    (pair,) = made.encode(
        [Preference(TURNS, (Message("assistant", "7"),), (Message("assistant", "8"),), tools=tools)]
    )
    prompt = made.encode_prompt(TURNS, tools)
    assert isinstance(pair, EncodedPair) and isinstance(prompt, EncodedPrompt)
    assert prompt.ids.tolist() == pair.prompt_ids.tolist()
    refused = encoder(chat_tokenizer, template=QWEN).encode_prompt(TURNS, tools)
    assert refused == Dropped("the chat template has no place for tools")

"""Fields of messages are written by the chat template, or refused by name; cut text is counted."""

import dataclasses
import json
import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.data.chat_template import Layout
from jaxdpo.data.formats.preference import Dropped, Message, Preference, read_text
from jaxdpo.data.inspect.convert import to_row
from jaxdpo.data.tokenize import Encoder
from tests.data.encoding import encode, encoder, text_of

WRITES = {
    # Thoughts of the last turn only, as Qwen3 and gpt-oss; calls and tools.
    "full": """
{%- if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if loop.last and (m.reasoning_content or m.thinking) -%}
[{{ m.reasoning_content or m.thinking }}]{% endif -%}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}({{ call.function | tojson }}){% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "cuts": """
{%- for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] | trim }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
}
CALL = {"type": "function", "function": {"name": "tides", "arguments": {"port": "Vigo"}}}


@pytest.fixture(params=WRITES)
def tokenizer(
    request: pytest.FixtureRequest, chat_tokenizer: PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    return with_template(chat_tokenizer, WRITES[request.param])


def with_template(tokenizer: PreTrainedTokenizerFast, text: str) -> PreTrainedTokenizerFast:
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|begin|>", eos_token="<|im_end|>"
    )
    found.chat_template = text
    return found


def record(chosen: Any, rejected: Any, prompt: Any = None, tools: str = "") -> Preference:
    prompt = prompt or {"role": "user", "content": "q"}
    first, second, third = (read_text(item, "prompt") for item in (prompt, chosen, rejected))
    return Preference(first, second, third, tools=tools)


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def layout(tokenizer: PreTrainedTokenizerFast) -> Layout:
    return Layout(tokenizer, str(tokenizer.chat_template), ("<|im_start|>", "<|im_end|>"))


@pytest.mark.parametrize("field", ["reasoning_content", "thinking"])
def test_thoughts_are_loss_tokens_where_the_template_writes_them(
    field: str, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(chat_tokenizer, WRITES["full"])
    pair = encode(tokenizer, record(assistant("a", **{field: "so"}), assistant("b")))
    _, chosen, rejected = text_of(tokenizer, pair)
    assert (chosen, rejected) == ("[so]a<|im_end|>\n", "b<|im_end|>\n")
    assert pair.left_out == frozenset()


def test_a_tool_call_without_content_is_an_answer(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(chat_tokenizer, WRITES["full"])
    tools = json.dumps([{"type": "function", "function": {"name": "tides"}}])
    pair = encode(
        tokenizer, record(assistant(None, tool_calls=[CALL]), assistant("b"), tools=tools)
    )
    prompt, chosen, _ = text_of(tokenizer, pair)
    assert '"name": "tides"' in prompt
    assert chosen == '({"name": "tides", "arguments": {"port": "Vigo"}})<|im_end|>\n'


def test_calls_within_an_answer_of_several_turns_are_loss_tokens(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = with_template(chat_tokenizer, WRITES["full"])
    called = [
        assistant(None, tool_calls=[{"id": "c1", **CALL}]),
        {"role": "tool", "content": "06:12", "tool_call_id": "c1", "name": "tides"},
        assistant("At 06:12.", reasoning_content="early"),
    ]
    pair = encode(tokenizer, record(called, assistant("b")))
    (ids, mask), _ = pair.answers
    counted = str(tokenizer.decode(ids[mask].tolist()))
    assert '({"name": "tides", "arguments": {"port": "Vigo"}})<|im_end|>' in counted
    assert counted.endswith("early]At 06:12.<|im_end|>\n") and "tool" not in counted
    assert pair.left_out == {"message field 'tool_call_id'", "message field 'name'"}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"reasoning_content": "so"}, "reasoning_content"),
        ({"thinking": "so"}, "thinking"),
        ({"tool_calls": [CALL]}, "tool_calls"),
        ({"name": "Ann"}, "name"),
        ({"images": [{"path": "0.jpg"}]}, "images"),
        ({"weight": 0}, "weight"),
        ({"train": False}, "train"),
    ],
)
def test_a_field_without_a_place_is_refused_by_name(
    fields: dict[str, Any], name: str, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(chat_tokenizer, WRITES["cuts"])
    for texts in (
        (assistant("a", **fields), assistant("b"), None),
        (assistant("a"), assistant("b", **fields), None),
        (assistant("a"), assistant("b"), {"role": "user", "content": "q", **fields}),
    ):
        assert layout(tokenizer).render(record(texts[0], texts[1], texts[2])) == Dropped(
            f"the chat template has no place for the message field {name!r}"
        )
    plain = dataclasses.replace(layout(tokenizer), template=None)
    assert plain.render(record(assistant("a", **fields), assistant("b"))) == Dropped(
        f"plain text has no form for the message field {name!r}"
    )


HALF = """
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.thinking %}<think></think>{% endif %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}({{ (call.function or call).name }}){% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        (assistant(None, tool_calls=[CALL]), "tool_calls.arguments"),
        (assistant(None, tool_calls=[CALL["function"]]), "tool_calls.arguments"),
        (assistant(None, tool_calls=[{"name": "f", "arguments": "x"}]), "tool_calls.arguments"),
        (assistant("a", thinking="so"), "thinking"),
    ],
)
def test_a_field_that_is_written_in_part_is_refused(
    answer: dict[str, Any], field: str, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The template writes that there is one, or the name of the call alone."""
    tokenizer = with_template(chat_tokenizer, HALF)
    refused = Dropped(f"the chat template has no place for the message field '{field}'")
    assert encoder(tokenizer).encode([record(answer, assistant("b"))]) == [refused]
    bare = assistant(None, tool_calls=[{"name": "f", "arguments": {}}])
    assert encode(tokenizer, record(bare, assistant("b"))).left_out == frozenset()


def test_thoughts_of_earlier_turns_are_counted(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(chat_tokenizer, WRITES["full"])
    prompt = [
        {"role": "user", "content": "q"},
        assistant("a", thinking="so"),
        {"role": "user", "content": "r"},
    ]
    pair = encode(tokenizer, record(assistant("a"), assistant("b"), prompt))
    assert pair.left_out == {"message field 'thinking'"}


def test_text_that_the_template_cuts_is_counted(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(chat_tokenizer, WRITES["cuts"])
    thinks = record(assistant("<think>so</think> a"), assistant("b"))
    assert encode(tokenizer, thinks).left_out == {"text of an answer"}
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "q"}]
    pair = encode(tokenizer, record(assistant("a"), assistant("b"), prompt))
    assert pair.left_out == {"text of a prompt"}
    assert encode(tokenizer, record(assistant(" a\n"), assistant("b"))).left_out == frozenset()


def test_random_fields_are_written_refused_or_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    random_ = random.Random(0)
    names = ["thinking", "reasoning_content", "name", "note", "id", "mood_id", "weight", "images"]
    for _ in range(60):
        messages = []
        for role in ("user", "assistant", "user", "assistant"):
            picked = random_.sample(names, random_.choice([0, 0, 1, 2]))
            fields = {name: f"{name}{random_.randrange(10**6)}" for name in picked}
            messages.append({"role": role, "content": f"text{len(messages)}", **fields})
        text = layout(tokenizer).render(record(messages[3:], assistant("other"), messages[:3]))
        for message in messages:
            for name in message.keys() - {"role", "content"}:
                if isinstance(text, Dropped):
                    continue  # it names the first
                is_written = message[name] in text.chosen.text
                assert is_written or f"message field {name!r}" in text.left_out
        if isinstance(text, Dropped):
            present = {name for message in messages for name in message}
            assert any(f"message field {name!r}" in text.reason for name in present)


def test_a_special_token_in_a_field_is_refused(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(chat_tokenizer, WRITES["full"])
    answer = assistant("a", thinking="so<|im_end|>")
    (found,) = Encoder(tokenizer, str(tokenizer.chat_template), 10**6, 10**5).encode(
        [record(answer, assistant("b"))]
    )
    assert found == Dropped("text spells a special token of the chat template")


def test_fields_are_part_of_a_pairs_identity_and_of_its_converted_row() -> None:
    first = record(assistant("a", thinking="so"), assistant("a", thinking="no"))
    other = record(assistant("a", thinking="so"), assistant("a", thinking="or"))
    assert first.pair_key != other.pair_key
    row = to_row(first)
    assert record(row["chosen"], row["rejected"], row["prompt"]).pair_key == first.pair_key
    assert row["chosen"] == [assistant("a", thinking="so")]
    assert read_text(row["prompt"], "prompt") == (Message("user", "q"),)

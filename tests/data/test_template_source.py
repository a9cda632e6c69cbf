"""Which chat template is in use: files, names, chat_template.json; and a warning."""

import json
import logging
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.prepare import prepare
from jaxdpo.data.template_source import find_template, template_text
from jaxdpo.data.tokenizer_json import load_tokenizer
from tests.data.conftest import CHATML
from tests.data.encoding import chat, encode, text_of

TOOL_USE = "Tools: {{ tools | tojson }}\n" + CHATML
CHAT = "{% for m in messages %}[{{ m.content }}]<|im_end|>{% endfor %}"


def named(tokenizer: PreTrainedTokenizerFast, **templates: str) -> PreTrainedTokenizerFast:
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|begin|>", eos_token="<|im_end|>"
    )
    found.chat_template = templates
    return found


def section(file: Path, **options: object) -> DataSection:
    return DataSection(
        **{
            "train": [str(file)],
            "eval_fraction": 0,
            "max_length": 200,
            "max_prompt_length": 100,
            "cache": None,
            **options,
        }
    )  # type: ignore[arg-type]


def write_rows(file: Path, *rows: object) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_rows_with_tools_are_laid_out_by_tool_use(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = named(chat_tokenizer, default=CHATML, tool_use=TOOL_USE)
    with_tools = chat(["q"], "a", "b", tools='[{"name": "add"}]')
    prompt, _, _ = text_of(tokenizer, encode(tokenizer, with_tools))
    assert prompt.startswith('Tools: [{"name": "add"}]\n<|begin|>')
    prompt, _, _ = text_of(tokenizer, encode(tokenizer, chat(["q"], "a", "b")))
    assert prompt.startswith("<|begin|><|im_start|>user")


def test_several_templates_without_a_default_name_the_option(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = named(chat_tokenizer, chat=CHAT, tool_use=TOOL_USE)
    with pytest.raises(ValueError, match=r"^data\.chat_template=null: .*data\.chat_template=chat"):
        find_template(tokenizer, None)
    pair = encode(tokenizer, chat(["q"], "a", "b"), chat_template="chat")
    assert text_of(tokenizer, pair)[0].startswith("[q]<|im_end|>")
    assert template_text(tokenizer, "chat") == CHAT
    with pytest.raises(ValueError, match=r"^data\.chat_template=chatt: .*or one of chat, tool_use"):
        find_template(tokenizer, "chatt")


def test_chat_template_json_is_read(
    byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    byte_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "chat_template.json"
    several = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": TOOL_USE}]
    for content in (CHAT, several):
        file.write_text(json.dumps({"chat_template": content}))
        assert find_template(load_tokenizer(str(tmp_path)), None).text == CHAT
    for content in ("{}", "[]", "no json"):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"chat_template\.json holds no"):
            load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["none", "own", "named", "file"])
def test_the_log_names_the_template_in_use(
    kind: str,
    chat_tokenizer: PreTrainedTokenizerFast,
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    jinja = tmp_path / "own.jinja"
    jinja.write_text(CHAT)
    tokenizer, chosen, line = {
        "none": (byte_tokenizer, None, "no chat template was found"),
        "own": (chat_tokenizer, None, "chat template: the tokenizer's own"),
        "named": (
            named(chat_tokenizer, default=CHATML, tool_use=TOOL_USE),
            None,
            "chat template: 'default' of the tokenizer's (default, tool_use), 'tool_use' for rows",
        ),
        "file": (chat_tokenizer, str(jinja), f"chat template: the file {jinja}"),
    }[kind]
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}
    file = write_rows(tmp_path / "pairs.jsonl", row)
    with caplog.at_level(logging.INFO, "jaxdpo"):
        report = prepare(section(file, chat_template=chosen), tokenizer, 1000).report
    assert line in caplog.text and line in report["chat_template"]


def test_answers_that_begin_with_their_prompt_are_warned_of(
    byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    user = [{"role": "user", "content": "Why?"}]
    for rows, expected in (
        ([{"prompt": "Why?", "chosen": "Why? So.", "rejected": "Why? No."}], 1),
        ([{"prompt": user, "chosen": "Why? So.", "rejected": "Why? No."}], 1),
        ([{"prompt": "Why?", "chosen": "Why? So.", "rejected": "No."}], 0),
    ):
        file = write_rows(tmp_path / "pairs.jsonl", *rows)
        warnings = prepare(section(file), byte_tokenizer, 1000).report["warnings"]
        assert sum("begin with their prompt" in warning for warning in warnings) == expected

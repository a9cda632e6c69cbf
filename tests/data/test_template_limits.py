import logging
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from jaxdpo.data import template_limits
from jaxdpo.data.template_limits import named_when_slow
from tests.data.encoding import chat, drop_reason, encode, text_of

END = "{{ eos_token }}"
CONTENT = "{% for message in messages %}{{ message.content }}{% endfor %}"


def template(folder: Path, text: str) -> dict[str, str]:
    (folder / "template.jinja").write_text(text + CONTENT + END)
    return {"chat_template": str(folder / "template.jinja")}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ [1][5:][0].x.y }}", "has no"),
        ("{{ messages[9].content.x.y }}", "has no"),
        ("{{ ''|attr('__class__') }}", "access to attribute '__class__'"),
        ("{{ messages[0].content|attr('__init__') }}", "access to attribute '__init__'"),
        ("{{ messages[0].content.__class__ }}", "access to attribute '__class__'"),
        ("{% for i in range(2000) %}{{ 'x' * 99999 }}{% endfor %}", "more than 67,108,864"),
    ],
)
def test_what_a_template_must_not_do_drops_the_row_with_the_reason(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str, reason: str
) -> None:
    found = drop_reason(chat_tokenizer, chat(["q"], "a", "b"), **template(tmp_path, text))
    assert found.startswith("the chat template refuses it: ") and reason in found


def test_an_ordinary_template_is_not_touched(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = "{% macro m(x) %}{{ x|upper }}{% endmacro %}{{ m('a')|trim }}{{ 'a'|attr('nothing') }}"
    pair = encode(chat_tokenizer, chat(["q"], "a", "b"), **template(tmp_path, text))
    assert text_of(chat_tokenizer, pair)[0] == "Aq"


def test_a_template_that_computes_for_ever_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(template_limits, "SLOW_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING), named_when_slow("the template writes"):
        for _ in range(1000):
            if caplog.text:
                break
            time.sleep(0.01)
    assert "the template writes for more than 0.01 s" in caplog.text
    caplog.clear()
    with named_when_slow("the template writes"):
        pass
    assert caplog.text == ""

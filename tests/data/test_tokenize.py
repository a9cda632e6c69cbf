import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from jaxdpo.data.detokenize import decode_answer
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.tokenize import check_vocabulary
from jaxdpo.data.tokenizer_json import load_tokenizer
from tests.data.encoding import (
    KINDS,
    answers,
    chat,
    drop_reason,
    encode,
    encoder,
    pair_prompt,
    text_of,
)

Write = Callable[..., str]


# --- plain text ---


@pytest.mark.parametrize("kind", KINDS[:2])
def test_messages_without_a_template_become_plain_turns(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    pair = encode(tokenizer, chat(["Hi", "Hello", "Why?"], "So", "No"))
    bos, eos = (
        "<s> " if tokenizer.bos_token else "",
        tokenizer.eos_token,
    )  # the space is the one that SentencePiece puts first
    assert text_of(tokenizer, pair) == (
        f"{bos}\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:",
        f" So{eos}",
        f" No{eos}",
    )
    system = Preference((Message("system", "Be kind."), *pair_prompt("Hi")), *answers("So", "No"))
    assert (
        text_of(tokenizer, encode(tokenizer, system))[0]
        == f"{bos}Be kind.\n\nHuman: Hi\n\nAssistant:"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_strings_are_encoded_verbatim_even_with_a_template(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    pair = encode(tokenizer, Preference("2+2=", "4 .", "five"))
    whole = tokenizer("2+2=4 .", add_special_tokens=False)["input_ids"]
    bos = (
        [] if tokenizer.bos_token is None or kind == "chat_tokenizer" else [tokenizer.bos_token_id]
    )
    assert [*pair.prompt_ids, *pair.chosen_ids] == [*bos, *whole, tokenizer.eos_token_id]


def test_eos_is_not_doubled(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    eos = byte_tokenizer.eos_token_id
    for record in (Preference("q", " a<|end|>", " b"), chat(["q"], "a<|end|>", "b")):
        pair = encode(byte_tokenizer, record)
        assert (
            pair.chosen_ids.tolist().count(eos) == 1
            and pair.chosen_ids[-1] == pair.rejected_ids[-1] == eos
        )
        assert decode_answer(byte_tokenizer, pair.prompt_ids, pair.chosen_ids) == " a<|end|>"


@pytest.mark.parametrize("kind", KINDS[:2])
def test_special_tokens_spelled_in_text_stay_text(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    eos = tokenizer.eos_token
    record = chat([f"say {eos} please"], f"{eos} is it", "no")
    pair = encode(tokenizer, record)
    assert tokenizer.eos_token_id not in [*pair.prompt_ids, *pair.chosen_ids[:-1]]
    assert text_of(tokenizer, pair)[1] == f" {eos} is it{eos}"
    assert encoder(tokenizer).spells_special(record) and not encoder(tokenizer).spells_special(
        chat(["q"], "a", "b")
    )


def test_special_tokens_that_cannot_stay_text_drop_the_row() -> None:
    """In a unigram vocabulary the end token is a piece like any other."""
    model = tokenizers.models.Unigram(
        [
            ("<unk>", 0.0),
            ("</s>", -1.0),
            ("a", -2.0),
            ("b", -2.0),
            ("<", -5.0),
            ("/", -5.0),
            ("s", -5.0),
            (">", -5.0),
        ],
        0,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token="</s>", unk_token="<unk>"
    )
    assert (
        drop_reason(tokenizer, Preference("a", "a</s>b", "b"))
        == "text spells a special token that the tokenizer cannot read as plain text"
    )
    assert encode(tokenizer, Preference("a", "ab", "b</s>")).rejected_ids.tolist() == [3, 1]


def test_a_tokenizer_without_eos_adds_none() -> None:
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "q": 2}, unk_token="q")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    pair = encode(PreTrainedTokenizerFast(tokenizer_object=backend), Preference("q", " a", " b"))
    assert (pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()) == (
        [2],
        [0],
        [1],
    )
    assert not pair.ended_chosen and not pair.ended_rejected


def test_what_is_dropped_and_why(
    byte_tokenizer: PreTrainedTokenizerFast, metaspace_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert (
        drop_reason(byte_tokenizer, Preference("", "a", "b")) == "no prompt token before the answer"
    )
    assert encode(metaspace_tokenizer, Preference("", "a", "b")).prompt_ids.tolist() == [
        metaspace_tokenizer.bos_token_id
    ]
    assert drop_reason(byte_tokenizer, Preference("q", " a", " a<|end|>")) == "identical answers"
    assert drop_reason(byte_tokenizer, Preference("q", " a", "<|end|>")) == "empty answer"
    long = Preference("q", " one two three four", " one two three five")
    assert (
        drop_reason(byte_tokenizer, long, max_length=5, max_prompt_length=2)
        == "identical answers after truncation"
    )
    tool = Preference((Message("user", "q"), Message("tool", "{}")), *answers("a", "b"))
    assert (
        drop_reason(byte_tokenizer, tool)
        == "plain text has no form for a role other than system, user, assistant"
    )


# --- the boundary, over many dialogues ---

PIECES = [
    "the",
    "answer",
    "is",
    " ",
    "  ",
    "\n",
    "\n\n",
    "Human:",
    "42",
    "3.14",
    ",",
    "ü",
    "你好",
    "🙂",
    "\u200d",
    "\t",
    "<",
    "|",
    "▁",
    "Á",
    "'s",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=12)
DIALOGUE = st.tuples(
    st.lists(TEXT, min_size=1, max_size=3).filter(lambda turns: len(turns) % 2 == 1),
    TEXT,
    TEXT,
    st.booleans(),
)


@pytest.mark.parametrize("kind", KINDS)
def test_boundaries_bos_and_eos_of_any_dialogue(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)

    @settings(max_examples=500, deadline=None, derandomize=True, database=None)
    @given(DIALOGUE)
    def check(dialogue: tuple[list[str], str, str, bool]) -> None:
        check_boundary(tokenizer, kind == "chat_tokenizer", *dialogue)

    check()


def check_boundary(
    tokenizer: PreTrainedTokenizerFast,
    has_template: bool,
    turns: list[str],
    chosen: str,
    rejected: str,
    as_strings: bool,
) -> None:
    record = (
        Preference("".join(turns), chosen, rejected)
        if as_strings
        else chat(turns, chosen, rejected)
    )
    whole = encoder(tokenizer)
    (pair,) = whole.encode([record])
    templated = has_template and not as_strings
    if isinstance(pair, Dropped):
        assert pair.reason in {
            "identical answers",
            "empty answer",
            "no prompt token before the answer",
        }
        return
    layout = whole._layout.render(record)
    assert not isinstance(layout, Dropped)
    prompt, *sides = whole.token_ids(
        [layout.prompt, layout.chosen.text, layout.rejected.text], templated
    )
    bos = [] if has_template or tokenizer.bos_token is None else [tokenizer.bos_token_id]
    end = [] if templated else [tokenizer.eos_token_id]
    for ids, expected in zip((pair.chosen_ids, pair.rejected_ids), sides, strict=True):
        assert [*pair.prompt_ids, *ids] == bos + expected + end, (
            "prompt + answer is the whole, encoded at once"
        )
    assert pair.prompt_ids.tolist() == (bos + prompt)[: len(pair.prompt_ids)], (
        "no answer token in the prompt"
    )
    if tokenizer.bos_token is not None and (bos or templated):
        assert pair.prompt_ids.tolist().count(tokenizer.bos_token_id) == 1
        assert tokenizer.bos_token_id not in [*pair.chosen_ids, *pair.rejected_ids]
    check_truncation(tokenizer, record, pair)


def check_truncation(
    tokenizer: PreTrainedTokenizerFast, record: Preference, full: EncodedPair
) -> None:
    (cut,) = encoder(tokenizer, max_prompt_length=6, max_length=10).encode([record])
    if isinstance(cut, Dropped):
        assert cut.reason == "identical answers after truncation"
        return
    begin = 1 if full.prompt_ids[0] == tokenizer.bos_token_id else 0
    kept = cut.prompt_ids.tolist()[begin:]
    assert (
        len(cut.prompt_ids) == min(6, len(full.prompt_ids))
        and cut.prompt_ids[:begin].tolist() == full.prompt_ids[:begin].tolist()
    )
    assert kept == full.prompt_ids.tolist()[len(full.prompt_ids) - len(kept) :]
    for ids, before, flag in (
        (cut.chosen_ids, full.chosen_ids, cut.truncated_chosen),
        (cut.rejected_ids, full.rejected_ids, cut.truncated_rejected),
    ):
        assert (
            1 <= len(ids) <= 10 - len(cut.prompt_ids)
            and ids.tolist() == before[: len(ids)].tolist()
        )
        assert flag == (len(ids) < len(before))


# --- loading, checking, showing ---


def test_loading_a_tokenizer(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    byte_tokenizer.save_pretrained(tmp_path / "good")
    assert load_tokenizer(str(tmp_path / "good")).eos_token == "<|end|>"
    (
        tmp_path / "good" / "tokenizer_config.json"
    ).unlink()  # the special tokens are still known from tokenizer.json
    bare = load_tokenizer(str(tmp_path / "good"))
    assert encoder(bare).spells_special(chat(["<|end|>"], "a", "b"))  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    for name, message in [("empty", "could not be loaded"), ("absent", "no such folder")]:
        with pytest.raises(ValueError, match=rf"^model\.path=.*{name}: .*{message}"):
            load_tokenizer(str(tmp_path / name))


def test_code_beside_a_tokenizer_is_never_run(
    byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}})
    )
    with pytest.raises(ValueError, match="could not be loaded"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    check_vocabulary(9, byte_tokenizer, 10)
    check_vocabulary(-1, byte_tokenizer, 10)
    with pytest.raises(
        ValueError, match=r"gives the id 9 \('.*'\), but the model's vocab_size is 9"
    ):
        check_vocabulary(9, byte_tokenizer, 9)

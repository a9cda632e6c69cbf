"""The ids are those of the folder's tokenizer.json, whatever class transformers has for it."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxdpo.data.tokenizer_json import load_tokenizer
from tests.tiny import write_model

TEXTS = ["Hello world, it's 12345\n\nfun", "你好 здравствуй", "a  b <|end|> c"]


def word_level() -> tokenizers.Tokenizer:
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "a", "b", "c"])}
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return backend


def folder_with(
    folder: Path, own: tokenizers.Tokenizer, model_type: str, settings: Mapping[str, object]
) -> str:
    folder.mkdir()
    own.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("kind", ["word-level", "byte_tokenizer", "metaspace_tokenizer"])
@pytest.mark.parametrize(
    "model_type, settings",
    [
        ("qwen2", {}),
        ("qwen3", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"}),
        ("gemma2", {"tokenizer_class": "GemmaTokenizer"}),
        ("llama", {"tokenizer_class": "LlamaTokenizer"}),
    ],
)
def test_ids_are_those_of_the_folders_tokenizer_json(
    kind: str,
    model_type: str,
    settings: Mapping[str, object],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "word-level":
        own = word_level()
    else:
        own = request.getfixturevalue(kind).backend_tokenizer
    path = folder_with(tmp_path / "model", own, model_type, settings)
    own = tokenizers.Tokenizer.from_file(f"{path}/tokenizer.json")
    with caplog.at_level(logging.WARNING, "jaxdpo"):
        loaded = load_tokenizer(path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == own.encode(text).ids
    if "eos_token" in settings:
        assert loaded.eos_token == "</s>"
    if type(AutoTokenizer.from_pretrained(path)) is not PreTrainedTokenizerFast:
        assert "gives other ids than the folder's tokenizer.json" in caplog.text


def test_a_special_token_that_only_the_class_names_is_kept(tmp_path: Path) -> None:
    path = folder_with(tmp_path / "model", word_level(), "llama", {})
    settings = {"tokenizer_class": "LlamaTokenizer"}
    Path(path, "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(path)
    assert (loaded.eos_token, loaded.eos_token_id) == ("</s>", 1)


def test_a_tokenizer_that_agrees_with_its_file_is_used_without_a_word(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    with caplog.at_level(logging.INFO, "jaxdpo"):
        load_tokenizer(str(tmp_path / "chat"))
    assert not caplog.records


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    settings = {"added_tokens_decoder": {"5": {"content": "quick", "special": False}}}
    path = folder_with(tmp_path / "model", word_level(), "llama", settings)
    with pytest.raises(ValueError, match=r"model\.path=.*tokenizer_config\.json changes what"):
        load_tokenizer(path)


def test_bos_by_tokenizer_config_holds(
    metaspace_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    metaspace_tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"add_bos_token": False}))
    expected = AutoTokenizer.from_pretrained(tmp_path / "model")("a")["input_ids"]
    assert load_tokenizer(str(tmp_path / "model"))("a")["input_ids"] == expected


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer_config.json", "[]", "has no attribute 'get'"),
        ("tokenizer.json", '{"version": "1.0"}', ""),
        ("config.json", '{"model_type": "llama", "eos_token_id": [[2], null]}', "eos_token_id"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    write_model(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(
        ValueError, match=r"^model\.path=.*: its tokenizer could not be loaded"
    ) as e:
        load_tokenizer(str(tmp_path))
    assert reason in str(e.value)


@pytest.mark.parametrize("number", [4_000_000_000, 1000])
def test_added_tokens_whose_ids_are_not_read_are_refused(tmp_path: Path, number: int) -> None:
    write_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"id": number, "content": "<far>", "special": True, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append(token)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"added token '<far>' has the id {number}"):
        load_tokenizer(str(tmp_path))

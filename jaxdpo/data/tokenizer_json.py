"""Loading a tokenizer: tokenizer.json is the tokenizer, whatever class transformers makes of it.

transformers builds the tokenizers of some model types by a class of its own that takes only the
vocabulary from tokenizer.json: its pre-tokenizer and its model are the class's (Qwen2Tokenizer
with the tokenizer of a Llama gives other ids, and makes BPE of a word-level vocabulary). A model
was trained with the file, so ids are compared on texts of many scripts, and the file decides.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FileTokenizer

# transformers advises to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file, chat_template_utils

from jaxdpo.utils.text import printable

logger = logging.getLogger(__name__)

Tokenizer = PreTrainedTokenizerBase

FILE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.json"
PROBES = (
    "a",
    " The quick brown fox doesn't jump;  he'll WALK 12,345.678 miles (100%)!\r\n\n\tx = y[0]\n",
    "def f(x): return x**2 # https://example.com/?q=a+b&c=%20_id \\n {{}} <tag/> a@b.org",
    "1 22 333 4444 ２３ ½ ٣٤ ௧௨ Ⅷ",
    "Grüße, naïve façade, Łódź, İstanbul ıI ßẞ ﬁ ﬀ Å Å é é",
    "Съешь же ещё этих булок. Ξεσκεπάζω την ψυχοφθόρα. Բարև ձեզ გამარჯობა",
    "שָׁלוֹם עוֹלָם مرحبا بالعالم ‏نص‏ سلام دنیا",
    "नमस्ते दुनिया বাংলা தமிழ் తెలుగు ไทยภาษา ລາວ မြန်မာ ភាសាខ្មែរ ሰላም",
    "你好，世界。繁體字 こんにちは カタカナ ｶﾀｶﾅ 안녕하세요 한글　全角",
    "🙂👩‍👩‍👧🏽🇪🇺 ∑∫√≠ →…“quotes”—‘x’ ™ № ␣ \u200b\u00a0\ufeff \ue000",
    "▁Ġ ## the ##ing ab <0x41> aaaaaaaaaaaaaaaaa \x00\x07",
)
"""Scripts, numbers, white space, contractions, code, and what normalizers change."""
MAX_SPELLED = 256
"""Added tokens whose spelling is probed: more than any chat template has."""
MAX_REASON = 300
"""Characters of another library's error that are shown."""
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(path: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or hub id. Code that comes with a model is never run.

    Raises:
        ValueError: there is none, it needs such code, or its files contradict each other.
    """
    folder = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not folder.is_dir():
        raise ValueError(f"model.path={path}: no such folder")
    if folder.is_dir():
        path = str(folder)
    revision = revision or "main"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of any library below; a Rust panic is no Exception
        raise _not_loaded(path, error) from None
    tokenizer = as_in_file(tokenizer, path, revision)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _template_json(path, revision)
    return tokenizer


def _not_loaded(path: str, error: BaseException) -> ValueError:
    reason = " ".join(printable(str(error)).split())[:MAX_REASON] or type(error).__name__
    return ValueError(
        f"model.path={path}: its tokenizer could not be loaded ({reason}). "
        "The folder needs config.json and tokenizer.json of one model, undamaged"
    )


def compiled_template(template: str) -> Any:
    """The jinja2.Template that transformers compiles a chat template to, and keeps.

    Raises:
        jinja2.TemplateSyntaxError: it does not compile.
    """
    # A private name: the public functions of transformers compile and render in one.
    return chat_template_utils._compile_jinja_template(template)


def as_in_file(tokenizer: Tokenizer, path: str, revision: str) -> Tokenizer:
    """The tokenizer, or that of its tokenizer.json where the two give other ids.

    Args:
        tokenizer: as transformers loads it from `path`.
        path: Hugging Face folder or hub id.
        revision: of a hub id.

    Raises:
        ValueError: tokenizer_config.json adds tokens with which the ids are not the file's.
    """
    file, settings = (_find(path, revision, name) for name in (FILE, SETTINGS))
    if file is None:
        return tokenizer
    try:
        own = FileTokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no class of its own
        raise _not_loaded(path, error) from None
    _check_added_ids(own, file)
    # A file may ask for truncation and padding, which are never the tokenizer's business here.
    own.no_truncation()
    own.no_padding()
    named: dict[str, Any] = {}
    if settings is not None:
        named = json.loads(settings.read_text(encoding="utf-8"))
    probes = _probes(own)
    text = first_difference(tokenizer, own, probes, named)
    if text is None:
        return tokenizer
    logger.warning(
        "model.path=%s: transformers' %s gives other ids than the folder's %s, e.g. for %r: "
        "the file's are used",
        path,
        type(tokenizer).__name__,
        FILE,
        printable(text[:40]),
    )
    names = {}
    for name in _NAMES:  # those that the class names by default, if the file has such tokens
        token = getattr(tokenizer, name)
        if token is not None and name not in named and own.token_to_id(str(token)) is not None:
            names[name] = str(token)
    replacement = PreTrainedTokenizerFast.from_pretrained(
        path, revision=revision, trust_remote_code=False, **names
    )
    text = first_difference(replacement, own, probes, named)
    if text is not None:
        raise ValueError(
            f"model.path={path}: {SETTINGS} changes what {FILE} makes of "
            f"{printable(repr(text[:40]))} (added tokens that differ). Make the two files agree"
        )
    return replacement


def _check_added_ids(own: FileTokenizer, file: Path) -> None:
    """Refuse ids of added tokens that the library does not take: it numbers those anew.

    Raises:
        ValueError: names the first such token.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    for token in content.get("added_tokens") or []:
        found = own.token_to_id(token["content"])
        if found != token["id"]:
            raise ValueError(
                f"{file}: the added token {printable(token['content'])!r} has the id "
                f"{token['id']}, and is read as {found}: ids of added tokens follow those of the "
                "vocabulary. Use the tokenizer.json that the model was trained with"
            )


def first_difference(
    tokenizer: Tokenizer,
    own: FileTokenizer,
    probes: Sequence[str],
    named: dict[str, Any],
) -> str | None:
    """The first of some texts whose ids differ from those of tokenizer.json; None if there is none.

    Args:
        named: tokenizer_config.json. If it says whether bos and eos are added, this holds.
    """
    adds = "add_bos_token" in named or "add_eos_token" in named
    for number, text in enumerate(probes):
        with_special = number == 0 and not adds
        try:
            found = list(tokenizer(text, add_special_tokens=with_special)["input_ids"])
        except Exception:  # tokenizers raises no class of its own, e.g. for a missing unk token
            found = None
        if found != own.encode(text, add_special_tokens=with_special).ids:
            return text
    return None


def _template_json(path: str, revision: str) -> Any:
    """The template of chat_template.json, which transformers reads for processors only, or None.

    Raises:
        ValueError: the file holds none.
    """
    file = _find(path, revision, TEMPLATE)
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError):
        found = None
    if isinstance(found, list):  # of named ones
        found = {item["name"]: item["template"] for item in found}
    if not isinstance(found, str | dict):
        raise ValueError(
            f'model.path={path}: {TEMPLATE} holds no {{"chat_template": "..."}}. '
            "Repair or remove it"
        )
    return found


def _probes(own: FileTokenizer) -> list[str]:
    """Texts of many scripts, and one with the spelling of the file's added tokens."""
    spelled = ""
    for _, token in sorted(own.get_added_tokens_decoder().items())[:MAX_SPELLED]:
        spelled += f"x{token.content} y\n"
    return [*PROBES, spelled]


def _find(path: str, revision: str, name: str) -> Path | None:
    folder = Path(path)
    if folder.is_dir():
        file = folder / name
        return file if file.is_file() else None
    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)

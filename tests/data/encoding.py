"""Records, and encoders of whole texts, for the tests of tokenization."""

from transformers import PreTrainedTokenizerFast

from jaxdpo.config.data_options import DataSection
from jaxdpo.data.detokenize import decode_answer
from jaxdpo.data.formats.preference import Dropped, Message, Preference
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.data.tokenize import Encoder

KINDS = ("byte_tokenizer", "metaspace_tokenizer", "chat_tokenizer")


def chat(prompt: list[str], chosen: str, rejected: str, **options: object) -> Preference:
    """A conversation whose turns alternate, beginning with the user's."""
    turns = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(prompt))
    return Preference(
        turns,
        (Message("assistant", chosen),),
        (Message("assistant", rejected),),
        **options,  # type: ignore[arg-type]
    )


def encoder(tokenizer: PreTrainedTokenizerFast, **options: object) -> Encoder:
    return Encoder.create(
        tokenizer,
        DataSection(
            **{
                "packed_length": 2 * 10**6,
                "max_length": 10**6,
                "max_prompt_length": 10**5,
                **options,
            }
        ),
    )  # type: ignore[arg-type]


def encode(
    tokenizer: PreTrainedTokenizerFast, record: Preference, **options: object
) -> EncodedPair:
    (result,) = encoder(tokenizer, **options).encode([record])
    assert isinstance(result, EncodedPair), result
    return result


def drop_reason(tokenizer: PreTrainedTokenizerFast, record: Preference, **options: object) -> str:
    (result,) = encoder(tokenizer, **options).encode([record])
    assert isinstance(result, Dropped), result
    return result.reason


def text_of(tokenizer: PreTrainedTokenizerFast, pair: EncodedPair) -> tuple[str, str, str]:
    answers = [
        decode_answer(tokenizer, pair.prompt_ids, ids)
        for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    return str(tokenizer.decode(pair.prompt_ids.tolist())), answers[0], answers[1]


def pair_prompt(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def answers(chosen: str, rejected: str) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    return (Message("assistant", chosen),), (Message("assistant", rejected),)

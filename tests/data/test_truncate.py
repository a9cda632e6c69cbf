import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.encoding import KINDS, chat, encode


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_truncation_keeps_the_end_and_completion_truncation_the_beginning(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    record = chat(["one two three four five six seven"], "eight nine ten eleven twelve", "no")
    full = encode(tokenizer, record)
    limit, room = len(full.prompt_ids) - 3, len(full.chosen_ids) - 1
    cut = encode(tokenizer, record, max_prompt_length=limit, max_length=limit + room)
    kept_bos = int(full.prompt_ids[0] == tokenizer.bos_token_id)
    assert cut.prompt_ids.tolist() == [
        *full.prompt_ids[:kept_bos],
        *full.prompt_ids[3 + kept_bos :],
    ]
    assert cut.chosen_ids.tolist() == full.chosen_ids[:room].tolist()
    assert cut.rejected_ids.tolist() == full.rejected_ids.tolist()
    assert (cut.truncated_prompt, cut.truncated_chosen, cut.truncated_rejected) == (
        True,
        True,
        False,
    )
    if kind != "chat_tokenizer":  # there the line break after the end marker was cut
        assert not cut.ended_chosen and tokenizer.eos_token_id not in cut.chosen_ids
    assert cut.ended_rejected


def test_prompt_truncation_to_one_token_keeps_bos(
    metaspace_tokenizer: PreTrainedTokenizerFast,
) -> None:
    pair = encode(
        metaspace_tokenizer, chat(["one two"], "a", "b"), max_prompt_length=1, max_length=3
    )
    assert (
        pair.prompt_ids.tolist() == [metaspace_tokenizer.bos_token_id] and len(pair.chosen_ids) == 2
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [0, 3])
def test_a_prompt_keeps_all_that_the_longer_answer_leaves(
    kind: str, room: int, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    record = chat(["one two three four five six seven"], "eight nine", "no")
    full = encode(tokenizer, record)
    fits = len(full.prompt_ids) + max(len(full.chosen_ids), len(full.rejected_ids))
    assert len(full.prompt_ids) > fits // 2 + room  # so half would cut it
    cut = encode(tokenizer, record, max_prompt_length=0, max_length=fits - room)
    assert len(cut.prompt_ids) == len(full.prompt_ids) - room
    assert cut.truncated_prompt == (room > 0)
    assert cut.chosen_ids.tolist() == full.chosen_ids.tolist()
    assert cut.rejected_ids.tolist() == full.rejected_ids.tolist()


def test_a_long_answer_leaves_a_prompt_half(metaspace_tokenizer: PreTrainedTokenizerFast) -> None:
    record = chat(["one two three four five six seven"], "eight nine ten " * 20, "no")
    cut = encode(metaspace_tokenizer, record, max_prompt_length=0, max_length=12)
    assert (len(cut.prompt_ids), len(cut.chosen_ids)) == (6, 6)
    assert (cut.truncated_prompt, cut.truncated_chosen) == (True, True)

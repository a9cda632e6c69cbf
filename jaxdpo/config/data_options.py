"""Options of the section `data`: which preference sets are read, and how they become packed
sequences."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from jaxdpo.config.sections import refuse
from jaxdpo.config.sections import section as _section

DEFAULT_MAX_LENGTH = 1024
"""data.max_length where it is automatic, as in TRL's DPOConfig; less for a model with fewer
positions."""
DEFAULT_PACKED_LENGTH = 4096
"""data.packed_length where it is automatic: two pairs of the default max_length. More where
max_length is longer."""
MAX_PACKED_LENGTH = 2**25
"""Above any context length; the arrays of one packed sequence then take half a gigabyte."""
LENGTH_MULTIPLE = 64
"""Lengths of packed sequences are multiples of it: the block of models/attention_blocks.py, and
what mesh.context must divide."""
ORDER = "order"
"""data.score where answers are listed best first."""


RESERVED_KWARGS = frozenset(
    {
        "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
        "bos_token", "eos_token",
    }
)  # fmt: skip
"""Variables of a chat template, and arguments of apply_chat_template, that are not the user's."""


def invalid_kwargs(option: str, kwargs: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the variables of a chat template that an option sets, as messages."""
    for name in kwargs:
        if name in RESERVED_KWARGS or not str(name).isidentifier():
            yield (
                f"{option}={{{name}: ...}}: is no variable of a chat template that can be set. "
                "Leave it out"
            )


@_section
class ShpSection:
    """Rows of the Stanford Human Preferences (SHP)."""

    min_score_ratio: float = 2.0
    """Lowest ratio of the better comment's score to the other's; closer pairs are filtered."""

    def __post_init__(self) -> None:
        if self.min_score_ratio < 1:
            raise ValueError(f"data.shp.min_score_ratio={self.min_score_ratio}: must be at least 1")


@_section
class OasstSection:
    """Message trees of oasst1 and oasst2."""

    languages: list[str] = dataclasses.field(default_factory=list)
    """Languages to keep, e.g. [en,de]. Empty: all."""
    synthetic: bool = True
    """Keep threads with messages that a model wrote."""


@_section
class DataSection:
    """Preference pairs: where they are read, how they are filtered, tokenized, truncated and
    packed."""

    # Where pairs are read.

    train: list[str] = dataclasses.field(default_factory=list)
    """Training sets: each a file (.jsonl, .json, .csv, .parquet, also .gz), a folder[:split], or a
    hub set name[@revision][:split]; :count at the end reads only that many rows."""
    weights: list[float] = dataclasses.field(default_factory=list)
    """One weight for each training set: its share of the pairs that are visited. Default: every
    pair once an epoch."""
    eval: list[str] = dataclasses.field(default_factory=list)
    """Validation sets, written like data.train. Empty: a share of the training prompts, see
    eval_fraction."""
    eval_fraction: float = 0.05
    """Share held out for validation when data.eval is empty: whole prompts, chosen by hash, so that
    the split is stable when rows are added; of few prompts, those that come nearest to the share.
    0: no validation."""
    format: Literal["auto", "hh-rlhf", "shp", "oasst", "ranked", "ab", "preference"] = "auto"
    """Format of the rows of files and of hub sets that are not known by name (docs/data.md). auto:
    detected from the first rows."""

    # Which pairs are taken, and what happens to those that look wrong.

    pairing: Literal["best-worst", "adjacent", "all"] = "best-worst"
    """Which pairs of a ranking of several answers are taken (oasst, ranked): the best with the
    worst, each with the next, or all."""
    score: str | None = None
    """Field that scores the answers of a list (ranked), more being better, where it has none of the
    names that are known (docs/data.md): a field of each answer, or a column with a list of numbers.
    order: the answers are listed best first."""
    max_pairs_per_prompt: int | None = None
    """Most pairs with one prompt that are taken from a training set. 0: no limit. Default: 5 for
    SHP, else no limit."""
    duplicates: Literal["drop", "keep", "error"] = "drop"
    """What happens to a pair that occurs again in the training (or the validation) sets."""
    contradictions: Literal["drop", "keep", "error"] = "drop"
    """What happens to pairs that prefer two answers to one prompt both ways; drop filters all of
    them."""
    identical: Literal["drop", "error"] = "drop"
    """What happens to a pair whose two answers are the same."""
    empty: Literal["drop", "error"] = "drop"
    """What happens to a pair with an empty answer."""
    missing_eos: Literal["error", "keep"] = "error"
    """What happens to training sets in which no answer ends in an end-of-sequence (eos) token, so
    that the model would not learn to stop."""
    overlap: Literal["error", "drop", "keep"] = "error"
    """What happens to pairs of data.eval whose prompt is in data.train too."""

    # Tokenization and truncation.

    chat_template: str | None = None
    """Path of a Jinja chat template, or the name of one of the tokenizer's. Default: the
    tokenizer's own (of several the one called default, and tool_use for rows with tools), or plain
    text (Human: / Assistant:) if it has none."""
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Values of variables that the chat template reads, e.g. {enable_thinking: false}. Default:
    none."""
    strings: Literal["verbatim", "message", "templated"] | None = None
    """What a prompt and answers that are strings are. verbatim: text to continue, in which special
    tokens are the characters that spell them; message: a user's message and its answers, for the
    chat template; templated: what a chat template wrote, in which special tokens are read as such.
    Default: verbatim, and an error if they spell special tokens."""
    loss_turns: Literal["all", "last"] = "all"
    """Which assistant turns are in the loss where the two conversations differ before their last
    turn: all from there on, or the last only. Tokens of other roles are never in the loss."""
    max_length: int = 0
    """Maximum length of prompt + answer, in tokens. Longer answers lose their end, after the prompt
    was truncated to fit. 0: 1024, or the model's number of positions if that is less."""
    max_prompt_length: int = 0
    """Maximum length of the prompt, in tokens; a longer one keeps its end. Both answers always keep
    the same prompt. 0: what the longer answer leaves of max_length, at least half of it."""

    # Packing, and the order of the pairs.

    share_prefix: bool = True
    """Prefix sharing: compute a pair's prompt once for both answers. false: once for each."""
    packed_length: int = 0
    """Maximum length of a packed sequence, in tokens. It sets the activation memory: a step with
    more tokens than the packed sequences of one forward pass hold uses more microbatches (gradient
    accumulation). 0: 4096, or twice max_length if that is more."""
    num_packed_lengths: int = 8
    """Number of different packed lengths, each a compiled program of its own. More of them waste
    less padding and compile longer."""
    shuffle: bool = True
    """Visit the pairs of each epoch in a new random order (from seed)."""

    # How the sets are read.

    max_dropped_fraction: float = 0.1
    """Stop when more than this share of the rows is invalid."""
    cache: str | None = "~/.cache/jaxdpo/pairs"
    """Folder that stores tokenized pairs, so that the next start reads them at once. null: no
    cache."""
    num_proc: int = 0
    """Processes that tokenize large sets, this one included. 0: as many as there are cores, at most
    32."""

    # Options of single formats.

    shp: ShpSection = ShpSection()
    oasst: OasstSection = OasstSection()

    def __post_init__(self) -> None:
        refuse([*self._invalid_values(), *self._invalid_lengths()])

    def _invalid_values(self) -> Iterator[str]:
        if not 0 <= self.eval_fraction < 1:
            yield f"data.eval_fraction={self.eval_fraction}: must be at least 0 and below 1"
        if not 0 <= self.max_dropped_fraction <= 1:
            yield f"data.max_dropped_fraction={self.max_dropped_fraction}: must lie between 0 and 1"
        if self.max_pairs_per_prompt is not None and self.max_pairs_per_prompt < 0:
            yield (
                f"data.max_pairs_per_prompt={self.max_pairs_per_prompt}: "
                "must be 0 (no limit) or more"
            )
        if self.score is not None and not self.score.strip():
            yield f"data.score={self.score!r}: must name a field of the answers, or be {ORDER}"
        if any(weight <= 0 for weight in self.weights):
            yield f"data.weights={self.weights}: every weight must be above 0"
        yield from invalid_kwargs("data.chat_template_kwargs", self.chat_template_kwargs)
        if self.num_packed_lengths < 1:
            yield f"data.num_packed_lengths={self.num_packed_lengths}: must be at least 1"
        if self.num_proc < 0:
            yield f"data.num_proc={self.num_proc}: must be 0 (automatic) or at least 1"

    def _invalid_lengths(self) -> Iterator[str]:
        length, prompt, packed = self.max_length, self.max_prompt_length, self.packed_length
        if length != 0 and length < 2:
            yield f"data.max_length={length}: must be 0 (automatic) or at least 2"
        if 2 * length > MAX_PACKED_LENGTH:
            yield f"data.max_length={length}: must be at most {MAX_PACKED_LENGTH // 2:,}"
        if prompt < 0:
            yield f"data.max_prompt_length={prompt}: must be 0 (automatic) or at least 1"
        # An automatic maximum always fits, so what is named here was set by the user.
        if 0 < length <= prompt:
            yield (
                f"data.max_prompt_length={prompt}: "
                f"must be below data.max_length={length}, or no room is left for answers. "
                "Lower the one or raise the other"
            )
        if packed < 0:
            yield f"data.packed_length={packed}: must be 0 (automatic) or positive"
        elif packed > MAX_PACKED_LENGTH:
            yield f"data.packed_length={packed}: must be at most {MAX_PACKED_LENGTH:,}"
        elif packed != 0 and packed < 2 * length:
            yield f"data.packed_length={packed}: must be at least twice data.max_length={length}"

    @property
    def has_eval(self) -> bool:
        """Whether some pairs are for validation."""
        return bool(self.eval) or self.eval_fraction > 0

    def max_length_for(self, max_positions: int) -> int:
        """max_length for a model with so many positions, in tokens."""
        return self.max_length or min(DEFAULT_MAX_LENGTH, max_positions)

    def with_lengths(self, max_positions: int) -> "DataSection":
        """The section with numbers in place of automatic lengths, for a model of so many positions.

        Raises:
            ValueError: data.max_prompt_length or data.packed_length does not fit the automatic
                data.max_length.

        >>> section = DataSection(max_length=3000).with_lengths(8192)
        >>> section.max_length, section.packed_length
        (3000, 6016)
        """
        max_length = self.max_length_for(max_positions)
        longest_pair = -(-2 * max_length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        return dataclasses.replace(
            self,
            max_length=max_length,
            packed_length=self.packed_length or max(DEFAULT_PACKED_LENGTH, longest_pair),
        )

"""Options of the section `data`: which preference sets are read, and how they become packed sequences."""

import dataclasses
from typing import Literal

from jaxdpo.config.sections import require
from jaxdpo.config.sections import section as _section

DEFAULT_MAX_LENGTH = 1024
"""data.max_length=0, for models with as many positions: TRL's default."""


@_section
class ShpSection:
    """Rows of SHP."""

    min_score_ratio: float = 2.0
    """Lowest ratio of the better comment's score to the other's; closer pairs are filtered."""

    def __post_init__(self) -> None:
        require(
            (
                self.min_score_ratio >= 1,
                f"data.shp.min_score_ratio={self.min_score_ratio}: must be at least 1",
            )
        )


@_section
class OasstSection:
    """Message trees of oasst1 and oasst2."""

    languages: list[str] = dataclasses.field(default_factory=list)
    """Languages to keep, e.g. [en,de]. Empty: all."""
    synthetic: bool = True
    """Keep threads with messages that a model wrote."""


@_section
class DataSection:
    """Preference pairs in, packed rows out."""

    train: list[str] = dataclasses.field(default_factory=list)
    """Training sets: each a file (.jsonl, .json, .csv, .parquet, also .gz), a folder[:split], or a hub set name[@revision][:split];
    :count at the end reads so many rows."""
    weights: list[float] = dataclasses.field(default_factory=list)
    """One weight for each training set: its share of the pairs that are visited. Default: every pair once an epoch."""
    eval: list[str] = dataclasses.field(default_factory=list)
    """Validation sets, written like data.train. Empty: a share of the training prompts, see eval_fraction."""
    eval_fraction: float = 0.05
    """Share of the prompts (by hash, so stable when rows are added) held out for validation when data.eval is empty."""
    format: Literal["auto", "hh-rlhf", "shp", "oasst", "ranked", "ab", "preference"] = "auto"
    """Form of the rows of files and of hub sets that are not known by name (docs/data.md). auto: found from the first rows."""
    pairing: Literal["best-worst", "adjacent", "all"] = "best-worst"
    """Which pairs of an order of several answers are taken (oasst, ranked): the best with the worst, each with the next, or all."""
    max_pairs_per_prompt: int | None = None
    """Most pairs with one prompt that are taken from a training set. 0: no limit. Default: 5 for SHP, else no limit."""
    duplicates: Literal["drop", "keep", "error"] = "drop"
    """What becomes of a pair that the training (or the validation) sets hold already."""
    contradictions: Literal["drop", "keep", "error"] = "drop"
    """What becomes of pairs that prefer two answers to one prompt both ways; drop leaves out all of them."""
    identical: Literal["drop", "error"] = "drop"
    """What becomes of a pair whose two answers are the same."""
    empty: Literal["drop", "error"] = "drop"
    """What becomes of a pair with an empty answer."""
    missing_eos: Literal["error", "keep"] = "error"
    """What becomes of training sets in which no answer ends in an end marker, so that the model would not learn to stop."""
    overlap: Literal["error", "drop", "keep"] = "error"
    """What becomes of pairs of data.eval whose prompt is in data.train too."""
    chat_template: str | None = None
    """Path of a Jinja chat template. Default: the tokenizer's own, or plain text (Human: / Assistant:) if it has none."""
    loss_turns: Literal["all", "last"] = "all"
    """Which assistant turns are scored where the two conversations part before their last turn: all since then, or the last only.
    What others say is never scored."""
    max_length: int = 0
    """Longest prompt + answer, in tokens. Longer answers lose their end, after the prompt was cut to fit.
    0: 1024, or the model's number of positions where that is less."""
    max_prompt_length: int = 0
    """Longest prompt, in tokens; a longer one keeps its end. Both sides always keep the same prompt. 0: half of max_length."""
    share_prefix: bool = True
    """Compute a pair's prompt once for both answers (prefix sharing). false: once for each."""
    packed_length: int = 4096
    """Longest packed row, in tokens. Steps with more tokens than the rows of one pass hold use more microbatches."""
    num_packed_lengths: int = 8
    """How many row lengths, each a compiled program of its own. More of them waste fewer slots and compile longer."""
    shuffle: bool = True
    """Visit the pairs of each epoch in a new random order (from seed)."""
    max_dropped_fraction: float = 0.1
    """Stop when more than this share of the rows is unusable."""
    cache: str | None = "~/.cache/jaxdpo/pairs"
    """Folder that keeps encoded pairs, so that the next start reads them at once. null: keep none."""
    num_proc: int = 0
    """Processes that encode large sets, this one among them. 0: as many as there are cores, at most 32."""

    shp: ShpSection = ShpSection()
    oasst: OasstSection = OasstSection()

    def lengths_for(self, max_positions: int) -> tuple[int, int]:
        """max_length and max_prompt_length for a model with so many positions, in tokens."""
        max_length = self.max_length or min(DEFAULT_MAX_LENGTH, max_positions)
        return max_length, self.max_prompt_length or max_length // 2

    def __post_init__(self) -> None:
        require(
            (
                0 <= self.eval_fraction < 1,
                f"data.eval_fraction={self.eval_fraction}: must be at least 0 and below 1",
            ),
            (
                0 <= self.max_dropped_fraction <= 1,
                f"data.max_dropped_fraction={self.max_dropped_fraction}: must lie between 0 and 1",
            ),
            (
                self.max_length == 0 or self.max_length >= 2,
                f"data.max_length={self.max_length}: must be 0 (automatic) or at least 2",
            ),
            (
                self.max_prompt_length >= 0,
                f"data.max_prompt_length={self.max_prompt_length}: must be 0 (automatic) or at least 1",
            ),
            (
                self.max_pairs_per_prompt is None or self.max_pairs_per_prompt >= 0,
                f"data.max_pairs_per_prompt={self.max_pairs_per_prompt}: must be 0 (no limit) or more",
            ),
            (
                all(weight > 0 for weight in self.weights),
                f"data.weights={self.weights}: every weight must be above 0",
            ),
            (
                self.num_packed_lengths >= 1,
                f"data.num_packed_lengths={self.num_packed_lengths}: must be at least 1",
            ),
            (
                self.num_proc >= 0,
                f"data.num_proc={self.num_proc}: must be 0 (automatic) or at least 1",
            ),
            (
                self.max_length == 0 or self.max_length > self.max_prompt_length,
                f"data.max_length={self.max_length}: must exceed data.max_prompt_length={self.max_prompt_length}, "
                "or no room is left for answers. Raise the one or lower the other",
            ),
            (
                self.packed_length >= 2 * self.max_length,
                f"data.packed_length={self.packed_length}: must be at least twice data.max_length={self.max_length}",
            ),
        )

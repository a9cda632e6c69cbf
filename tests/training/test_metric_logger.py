import io
import json
import math
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jaxdpo.config.schema import LogSection
from jaxdpo.training.metric_logger import TIME_KEYS, Health, JsonLines, Logger
from jaxdpo.utils.console import show_table
from jaxdpo.utils.text import clean


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in path.read_text().splitlines()
    ]


def console(terminal: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(
        file=text, force_terminal=terminal, width=120, highlight=False, soft_wrap=True
    ), text


def run(
    folder: Path, steps: range, resume_step: int | None = None, total: int = 10, **log: Any
) -> str:
    out, text = console()
    with Logger(folder, LogSection(**log), total, resume_step, console=out) as logger:
        for step in steps:
            logger.log(step, {"loss": 1 / step, "rewards/accuracies": 0.5, "pairs_per_second": 3.0})
    return text.getvalue()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float32_values_read_back_as_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    rows = JsonLines(path)
    rows.write({"step": 1, "loss": float(np.float32(value))})
    rows.close()
    assert struct.pack("f", np.float32(rows_of(path)[0]["loss"])) == struct.pack("f", value)


def test_numpy_and_jax_numbers_are_written_as_numbers(tmp_path: Path) -> None:
    out, _ = console()
    with Logger(tmp_path, LogSection(), 2, console=out) as logger:
        logger.log(
            1,
            {
                "a": np.float32(0.1),
                "b": jnp.float32(0.1),
                "c": np.int32(3),
                "d": jnp.bfloat16(1.5),
                "e": 2,
                "ids": ["f:1"],
            },
        )
    expected = float(np.float32(0.1))
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": expected, "b": expected, "c": 3, "d": 1.5, "e": 2, "ids": ["f:1"]}
    ]


def test_nan_and_infinities_are_null_in_the_file_and_do_not_stop_the_run(tmp_path: Path) -> None:
    out, text = console()
    with Logger(tmp_path, LogSection(), 3, console=out) as logger:
        logger.log(1, {"loss": math.nan, "grad_norm": math.inf, "x": -math.inf})
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "grad_norm": None, "x": None}
    ]
    assert "loss is nan and grad_norm is inf" in text.getvalue()


def test_log_every_and_the_first_and_last_row_are_written(tmp_path: Path) -> None:
    run(tmp_path, range(1, 11), every=4)
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 4, 8, 10]


def test_rows_are_means_over_the_steps_since_the_last(tmp_path: Path) -> None:
    out, _ = console()
    with Logger(tmp_path, LogSection(every=3, tensorboard=False), 8, console=out) as logger:
        for step in range(1, 9):
            bad = step == 5
            row = {
                "loss": math.nan if bad else float(step),
                "tokens": 10 * step,
                "learning_rate": 1.0 / step,
                "nonfinite": float(bad),
            }
            logger.log(step, row | ({"compile_seconds": 2.0} if step in (2, 3) else {}))
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 3, 6, 8]
    assert [row["loss"] for row in rows] == [1.0, 2.5, 5.0, 7.5]
    assert [row["tokens"] for row in rows] == [10, 30, 60, 80]
    assert [row["learning_rate"] for row in rows] == [1.0, 1 / 3, 1 / 6, 1 / 8]
    assert [row["nonfinite"] for row in rows] == [0, 0, 1, 0]
    assert [row.get("compile_seconds") for row in rows] == [None, 4.0, None, None]


def test_a_row_of_steps_that_were_all_skipped_says_so(tmp_path: Path) -> None:
    out, _ = console()
    with Logger(tmp_path, LogSection(every=2, tensorboard=False), 9, console=out) as logger:
        for step in (2, 3, 4):
            logger.log(step, {"loss": math.nan, "nonfinite": 1.0})
    last = rows_of(tmp_path / "metrics.jsonl")[-1]
    assert last == {"step": 4, "loss": None, "nonfinite": 2.0}


def test_the_console_shows_the_kl_of_an_evaluation(tmp_path: Path) -> None:
    out, text = console()
    with Logger(tmp_path, LogSection(), 10, console=out) as logger:
        logger.evaluation(5, {"loss": 0.5, "kl/token_exact": 0.0625})
    assert text.getvalue() == "eval 5/10  loss 0.5  kl 0.0625\n"


def test_evaluations_are_written_at_any_step_under_their_prefix(tmp_path: Path) -> None:
    out, text = console()
    with Logger(tmp_path, LogSection(every=100), 10, console=out) as logger:
        logger.evaluation(0, {"loss": np.float32(0.5), "rewards/accuracies": 0.25})
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 0, "eval/loss": 0.5, "eval/rewards/accuracies": 0.25}
    ]
    assert text.getvalue() == "eval 0/10  loss 0.5  accuracy 0.25\n"


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    run(tmp_path / "whole", range(1, 11))
    run(tmp_path / "killed", range(1, 8))
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "los')
    run(tmp_path / "killed", range(6, 11), resume_step=5)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (
        tmp_path / "whole/metrics.jsonl"
    ).read_bytes()


def test_a_half_written_row_is_cut_even_when_it_parses(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 1, "b": 2}')
    JsonLines(path, resume_step=3).close()
    assert path.read_text() == '{"step": 1}\n'


def test_a_new_run_in_a_used_folder_starts_an_empty_file(tmp_path: Path) -> None:
    run(tmp_path, range(1, 8))
    run(tmp_path, range(1, 3))
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2]


def test_rows_reach_the_file_before_the_run_ends(tmp_path: Path) -> None:
    out, _ = console()
    with Logger(tmp_path, LogSection(), 10, console=out) as logger:
        logger.log(1, {"loss": 1.0})
        assert len(rows_of(tmp_path / "metrics.jsonl")) == 1
        logger.flush()


def test_tensorboard_files_are_written_only_when_wanted(tmp_path: Path) -> None:
    run(tmp_path / "with", range(1, 3))
    run(tmp_path / "without", range(1, 3), tensorboard=False)
    (events,) = (tmp_path / "with/tensorboard").iterdir()
    assert b"rewards/accuracies" in events.read_bytes()
    assert not (tmp_path / "without/tensorboard").exists()


def test_without_a_terminal_a_long_run_prints_about_twenty_lines(tmp_path: Path) -> None:
    lines = run(tmp_path, range(1, 1001), total=1000).splitlines()
    assert len(lines) == 21
    assert lines[0] == "step 1/1000  loss 1  accuracy 0.5  pairs/s 3"
    assert lines[-1].startswith("step 1000/1000")


def test_a_terminal_shows_a_progress_bar(tmp_path: Path) -> None:
    out, text = console(terminal=True)
    with Logger(tmp_path, LogSection(), 10, 4, console=out) as logger:
        logger.log(5, {"loss": 0.25})
    assert "5/10" in text.getvalue() and "loss 0.25" in text.getvalue()


@pytest.mark.parametrize("text", ["\x1b[2Jx", "a\x07b", "\x9b31m", "a\u202eb", "a\rb", "\x7f"])
def test_control_characters_never_reach_the_terminal(tmp_path: Path, text: str) -> None:
    out, shown = console()
    with Logger(tmp_path, LogSection(), 10, console=out) as logger:
        logger.info(text)
        logger.warn(text)
        show_table(text, ["", text], [[text, text]], out)
    assert not set(shown.getvalue()) & set("\x1b\x07\x9b\u202e\r\x7f")
    assert clean(text) in shown.getvalue()


def test_text_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    out, shown = console()
    with Logger(tmp_path, LogSection(), 10, console=out) as logger:
        logger.info("[red]model.path=[a][/red]")
        show_table("[b]t[/b]", ["[h]"], [["[c]"]], out)
    for text in ("[red]model.path=[a][/red]", "[b]t[/b]", "[h]", "[c]"):
        assert text in shown.getvalue()


def warnings(
    rows: list[dict[str, float]], total_steps: int = 1000, has_reference: bool = True
) -> list[str]:
    health = Health(total_steps, has_reference)
    return [text for step, row in enumerate(rows, 1) for text in health.check(step, row)]


HEALTHY = {"loss": 0.6, "grad_norm": 1.0, "rewards/chosen": 0.1, "rewards/accuracies": 0.7}


def test_a_healthy_run_warns_of_nothing() -> None:
    assert warnings([HEALTHY] * 1000) == []


def test_chosen_rewards_below_zero_for_long_are_warned_of_once() -> None:
    fallen = {**HEALTHY, "rewards/chosen": -0.1}
    assert warnings([fallen] * 19 + [HEALTHY] + [fallen] * 19) == []
    (text,) = warnings([fallen] * 100)
    assert "less likely than under the reference" in text and "dpop" in text
    assert warnings([fallen] * 100, has_reference=False) == []


def test_a_high_accuracy_is_warned_of_only_early() -> None:
    easy, hard = {**HEALTHY, "rewards/accuracies": 1.0}, HEALTHY
    (text,) = warnings([easy] * 200)
    assert "first tenth" in text
    assert warnings([hard] * 100 + [easy] * 200) == []
    assert warnings([easy] * 5 + [hard] * 200) == []


def test_a_gradient_of_exactly_zero_is_told_once() -> None:
    (text,) = warnings([HEALTHY, *[{**HEALTHY, "grad_norm": 0.0}] * 3])
    assert text.startswith("step 2: the gradient is exactly 0")
    assert warnings([{**HEALTHY, "grad_norm": 1e-30}] * 3) == []


@pytest.mark.parametrize(("total", "needed"), [(1000, 100), (60, 20), (3, 3)])
def test_bfloat16_weights_that_hardly_change_are_told_with_the_share(
    total: int, needed: int
) -> None:
    still = {**HEALTHY, "weights/changed": 0.004, "learning_rate": 5e-7}
    assert warnings([still] * (needed - 1), total) == []
    (text,) = warnings([still] * total, total)
    assert "at most 0.40% changed" in text and "model.param_dtype=float32" in text
    moving = {**HEALTHY, "weights/changed": 0.3}
    assert warnings([moving, *[still] * (total - 1)], total) == []  # a schedule that has decayed


def test_a_nan_is_explained_once() -> None:
    (text,) = warnings([HEALTHY, {**HEALTHY, "grad_norm": math.nan}, {**HEALTHY, "loss": math.inf}])
    assert text.startswith("step 2: grad_norm is nan")


def test_time_keys_are_the_only_ones_that_depend_on_the_clock(tmp_path: Path) -> None:
    run(tmp_path / "a", range(1, 4))
    keys = set(rows_of(tmp_path / "a/metrics.jsonl")[0])
    assert keys & TIME_KEYS == {"pairs_per_second"}


def test_a_full_disk_names_the_file_and_closing_it_tries_no_more(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"a row could not be written \(No space left on device\)"
    ) as raised:
        lines.write({"step": 1})
    assert raised.value.filename == str(tmp_path / "metrics.jsonl")
    lines.close()

"""What goes together among the loss options, and what is refused."""

import pytest

from jaxdpo.config.loss_options import LossSection
from jaxdpo.losses.rules import check


@pytest.mark.parametrize(
    ("options", "reference", "words"),
    [
        ({"name": "sigmod"}, "frozen", ["loss.name=sigmod", "Did you mean sigmoid?", "orpo"]),
        (
            {"label_smoothing": 0.1},
            "frozen",
            ["loss.label_smoothing=0.1", "sigmoid does not read it", "cdpo"],
        ),
        (
            {"name": "exo_pair", "label_smoothing": 0.0},
            "frozen",
            ["loss.label_smoothing=0", "above 0"],
        ),
        ({"name": "bco_pair", "f_divergence": "js"}, "frozen", ["loss.f_divergence=js", "hinge"]),
        (
            {"name": ["sigmoid", "bco_pair"], "f_divergence": "js"},
            "frozen",
            ["loss.f_divergence=js", "bco_pair", "cannot take it"],
        ),
        ({"name": "aot", "wpo": True}, "frozen", ["loss.wpo=True"]),
        (
            {"name": ["sigmoid", "aot"], "wpo": True},
            "frozen",
            ["aot of loss.name=sigmoid,aot cannot take it"],
        ),
        ({"name": "sft", "beta": 0.2}, "none", ["loss.beta=0.2"]),
        ({"name": "simpo", "ld_alpha": 0.5}, "none", ["loss.ld_alpha=0.5"]),
        ({"name": "sigmoid"}, "none", ["reference=none", "reference=frozen", "simpo"]),
        ({"name": "simpo", "ref_sync_every": 5}, "frozen", ["loss.ref_sync_every=5"]),
    ],
)
def test_loss_options_that_are_refused(options: dict, reference: str, words: list[str]) -> None:
    problems = check(LossSection(**options), reference)
    assert len(problems) == 1
    assert all(word in problems[0] for word in words), problems[0]


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"name": "simpo"}, "none"),
        (
            {"name": ["sigmoid", "sft"], "f_divergence": "js", "ld_alpha": 0.5, "wpo": True},
            "frozen",
        ),
        ({"name": ["sigmoid", "robust"], "label_smoothing": 0.1, "ref_sync_every": 5}, "frozen"),
    ],
)
def test_loss_options_that_are_accepted(options: dict, reference: str) -> None:
    assert check(LossSection(**options), reference) == []

"""The metrics of a step are what their names say."""

import numpy as np
import pytest

from tests.tiny import Setup, Stepper, pack, params
from tests.training.test_step import EQUAL, SIZE, WEIGHTED


def test_metrics_are_means_over_pairs_of_what_their_names_say() -> None:
    stepper = Stepper(Setup(), policy=params(0), reference=params(0))
    batch = stepper.pack(WEIGHTED)
    for _ in range(3):
        stepper.train(batch)
    whole = stepper.evaluate(batch)
    alone = [
        stepper.evaluate(stepper.put(pack([one], size=SIZE, places=len(EQUAL)))) for one in WEIGHTED
    ]
    for key in whole:
        if key == "kl/token_exact":
            tokens = [len(one.chosen_ids) + len(one.rejected_ids) for one in WEIGHTED]
            mean = np.average([one[key] for one in alone], weights=tokens)
        elif key == "loss":
            mean = np.average([one[key] for one in alone], weights=[one.weight for one in WEIGHTED])
        else:
            mean = np.mean([one[key] for one in alone])
        np.testing.assert_allclose(whole[key], mean, rtol=1e-5, atol=1e-6, err_msg=key)
    assert whole["lengths/chosen"] == np.mean([len(one.chosen_ids) for one in WEIGHTED])
    assert whole["rewards/chosen"] == pytest.approx(
        0.1 * (whole["logps/chosen"] - whole["logps/ref_chosen"]), rel=1e-5
    )
    assert whole["kl/token_exact"] > 0.001

"""One DPO step of every family has torch's gradients.

The weights it leaves compute the same in transformers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.config.loss_options import LossSection
from jaxdpo.config.schema import OptimSection
from jaxdpo.data.pair_table import EncodedPair
from jaxdpo.models.decoder import ForwardOptions
from jaxdpo.models.forward import forward, logits
from jaxdpo.models.hf.config_json import load_model_config
from jaxdpo.models.hf.load_save import load_params
from jaxdpo.models.hf.model_card import Card
from jaxdpo.models.hf.save_folder import export_model
from tests.families import TINY
from tests.theirs import Both, logits_of, make, padded, read
from tests.tiny import Setup, Stepper, pairs

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

PAIRS = pairs(3, low=8, high=24, vocab=96)
ROW = np.random.default_rng(2).integers(1, 96, 50).astype(np.int32)
BETA, AUX = 0.3, 0.05


def sides(pair: EncodedPair) -> list[np.ndarray]:
    return [
        np.concatenate([pair.prompt_ids, answer]) for answer in (pair.chosen_ids, pair.rejected_ids)
    ]


def their_loss(model: Any, some: Sequence[EncodedPair]) -> Any:
    """DPO (2305.18290 eq. 7) at policy = reference, as a mean over pairs.

    With experts, the router's load-balancing loss is added.
    """
    ids, mask = padded([row for pair in some for row in sides(pair)])
    more = {"output_router_logits": True} if hasattr(model.config, "num_experts_per_tok") else {}
    out = model(ids, attention_mask=mask, **more)
    logps = torch.log_softmax(out.logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    answers = mask[:, 1:].clone()
    for row, prompt in zip(
        answers, np.repeat([len(pair.prompt_ids) for pair in some], 2), strict=True
    ):
        row[: prompt - 1] = 0
    chosen, rejected = (logps * answers).sum(-1).reshape(-1, 2).T
    margins = (chosen - chosen.detach()) - (rejected - rejected.detach())
    return -torch.nn.functional.logsigmoid(BETA * margins).mean() + (
        AUX * out.aux_loss if more else 0
    )


def their_gradients(both: Both, folder: Path) -> tuple[float, Any]:
    """The loss, and its gradients as our tree: saved and loaded in place of the weights."""
    loss = their_loss(both.model, PAIRS)
    loss.backward()
    kept = {name: weight.detach().clone() for name, weight in both.model.named_parameters()}
    with torch.no_grad():
        for weight in both.model.parameters():
            weight.copy_(weight.grad)
        both.model.save_pretrained(folder)
        for name, weight in both.model.named_parameters():
            weight.copy_(kept[name])
    return loss.item(), load_params(folder, both.config, None, "float32")


def our_logits(params: Any, config: Any) -> np.ndarray:
    row_BT, options = jnp.asarray(ROW[None]), ForwardOptions()
    slots_BT = jnp.arange(len(ROW), dtype=jnp.int32)[None]
    hidden_BTD = forward(
        params, config, row_BT, slots_BT, jnp.zeros_like(slots_BT), slots_BT + 1, options
    )
    return np.asarray(logits(params, config, hidden_BTD, options))[0]


@pytest.mark.parametrize("case", TINY)
def test_a_step_has_torchs_gradients_and_its_weights_go_back_to_transformers(
    tmp_path: Path, case: str
) -> None:
    both = make(tmp_path, case)
    loss = LossSection(beta=BETA, router_aux_coef=AUX if both.config.num_experts else None)
    optim = OptimSection(
        learning_rate=0.02, b1=0.0, max_grad_norm=0.0
    )  # so that the first moment is the gradient
    stepper = Stepper(
        Setup(config=both.config, loss=loss, optim=optim, share_prefix=False, size=256),
        both.params,
        both.params,
    )
    metrics = stepper.train(stepper.pack(PAIRS))
    their, gradients = their_gradients(both, tmp_path / "gradients")
    assert metrics["nonfinite"] == 0 and metrics["loss"] == pytest.approx(their, rel=1e-4)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(stepper.state.opt["mu"]),
        jax.tree.leaves(gradients),
        strict=True,
    ):
        name, size = jax.tree_util.keystr(path, simple=True, separator="/"), np.abs(theirs).max()
        assert size > 1e-5 or name.endswith("k_bias"), name
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * size + 1e-6, rtol=0, err_msg=name)

    trained = jax.tree.map(np.asarray, stepper.state.params)
    assert all(
        (new != old).any()
        for new, old in zip(jax.tree.leaves(trained), jax.tree.leaves(both.params), strict=True)
    )
    wanted = our_logits(trained, both.config)
    assert np.abs(wanted - both.logits([ROW])[0]).max() > 0.1
    for out, raw in ((tmp_path / "kept", both.raw), (tmp_path / "made", None)):
        export_model(out, both.config, trained, card=Card(base_model="tiny"), raw_config=raw)
        again, report = read(out, output_loading_info=True)
        assert not any(
            report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        ), report
        assert load_model_config(out) == both.config
        np.testing.assert_allclose(logits_of(again.eval(), [ROW])[0], wanted, atol=1e-4, rtol=0)

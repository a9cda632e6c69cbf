"""Evaluation: metrics over the validation pairs, and sampled answers to their prompts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.data.detokenize import decode_answer
from jaxdpo.models.params import Params
from jaxdpo.models.sampling import generate
from jaxdpo.training.reference_cache import CachedLogps
from jaxdpo.training.state import FrozenState
from jaxdpo.training.step_metrics import averages
from jaxdpo.training.trainer import Trainer


def evaluate(
    trainer: Trainer,
    params: Params,
    fixed: FrozenState,
    cached: CachedLogps | None,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means of the metrics over all validation pairs.

    Loss, rewards, accuracies, lengths and, where the reference runs, the exact KL per token.

    Sums and counts are added up over the batches and divided once, so that the batch size does not
    matter.

    Args:
        params: the trained weights.
        fixed: base and reference.
        cached: log-probs of a cached reference.
        poll: called before each batch; what it raises ends the evaluation.
    """
    sums: Any = None
    for indices in trainer.eval_batches():
        poll()
        batch = trainer.loader.pack(trainer.data.eval, indices)
        ref_logps = None if cached is None else cached.eval[indices]
        with_reference = trainer.with_logps(fixed, ref_logps, batch)
        batch_sums = trainer.eval_step(params, with_reference, trainer.put_batch(batch))
        sums = batch_sums if sums is None else jax.tree.map(jnp.add, sums, batch_sums)
    means = jax.device_get(jax.jit(averages)(sums))
    metrics = {key: value.item() for key, value in means.items()}
    metrics["pairs"] = len(trainer.data.eval)
    return metrics


def sample_answers(
    trainer: Trainer,
    params: Params,
    fixed: FrozenState,
    poll: Callable[[], None] = lambda: None,
) -> list[dict[str, str]]:
    """Greedy answers of policy and reference to the first eval.samples validation prompts.

    Args:
        params, fixed: as `evaluate` takes them.
        poll: called before each model answers; what it raises ends the sampling.

    Returns:
        For each prompt {"id", "prompt", "policy"} and, where the reference runs, "reference".
    """
    num_samples = min(trainer.config.eval.samples, len(trainer.data.eval))
    if num_samples == 0:
        return []
    pairs = [trainer.data.eval[i] for i in range(num_samples)]
    prompt_ids = [pair.prompt_ids for pair in pairs]
    texts = {"prompt": trainer.tokenizer.batch_decode(prompt_ids)}
    poll()
    texts["policy"] = _greedy_answers(trainer, fixed.policy_view(params), prompt_ids)
    reference = fixed.reference_view()
    if reference is not None:
        poll()
        texts["reference"] = _greedy_answers(trainer, reference, prompt_ids)
    samples = []
    for i, pair in enumerate(pairs):
        samples.append({"id": pair.id} | {name: column[i] for name, column in texts.items()})
    return samples


def _greedy_answers(trainer: Trainer, params: Params, prompt_ids: list[np.ndarray]) -> list[str]:
    answers = generate(
        params,
        trainer.model,
        prompt_ids,
        max_new_tokens=trainer.config.eval.sample_tokens,
        options=trainer.options.forward,
        stop_ids=trainer.stop_ids,
        num_tokens=min(len(trainer.tokenizer), trainer.model.vocab_size),
    )
    texts = []
    for ids, answer in zip(prompt_ids, answers, strict=True):
        texts.append(decode_answer(trainer.tokenizer, ids, answer, skip_special=True))
    return texts

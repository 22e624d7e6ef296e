"""What a policy is worth on held-out data: comparisons, and its own samples against the reference."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from prefopt.batching import RaggedBatch, make_batch
from prefopt.data.groups import PromptGroup
from prefopt.errors import Problem, RecipeError
from prefopt.feed import Feed
from prefopt.forward import Scorer, score
from prefopt.held_out import HeldOut, held_out_rows
from prefopt.objective import (
    MetricSums,
    Record,
    StepFacts,
    add_comparison_metrics,
    add_record_metrics,
    loss_record,
    loss_values,
)
from prefopt.prepare import Prepared
from prefopt.recipe import EvalRecipe
from prefopt.reference.running import RunReference
from prefopt.run_folder import write_lines
from prefopt.sampling import Sample, distinct_prompts, read_samples, sample
from prefopt.step_record import joined
from prefopt_losses import Loss

GoldReward = Callable[[str, str], float]
"""(prompt, completion) -> reward; both decoded without special tokens."""


@dataclass(frozen=True)
class Evaluator:
    """Everything evaluation needs besides the policy."""

    loss: Loss
    feed: Feed
    """The held-out data on their way into the loss."""
    open_reference: Callable[[], AbstractContextManager[Scorer]]
    """Gives the reference model itself, for log-probs of new samples."""
    tokenizer: Any
    prompts: tuple[np.ndarray, ...]
    settings: EvalRecipe
    gold_reward: GoldReward | None
    precision: str
    token_budget: int
    seed: int


def make_evaluator(prepared: Prepared, reference: RunReference, *, token_budget: int) -> Evaluator | None:
    """Return what evaluation needs, or None where nothing is held out."""
    recipe, dataset = prepared.recipe, prepared.data.eval
    if dataset is None:
        return None
    return Evaluator(
        loss=prepared.loss,
        feed=reference.feed("eval"),
        open_reference=reference.open,
        tokenizer=prepared.tokenizer,
        prompts=tuple(distinct_prompts(dataset, recipe.eval.samples)),
        settings=recipe.eval,
        gold_reward=load_gold_reward(recipe.eval.gold_reward),
        precision=recipe.train.precision,
        token_budget=token_budget,
        seed=recipe.seed,
    )


def measure(
    evaluator: Evaluator,
    policy: Scorer,
    reference_wrote: Sequence[Sample],
    loss_state: Mapping[str, Tensor] | None = None,
    *,
    rows: list[HeldOut] | None = None,
) -> tuple[dict[str, Any], list[Sample]]:
    """Everything that is measured of a policy on held-out data, and what it wrote; `rows` takes every comparison."""
    measures = evaluate_comparisons(evaluator, policy, loss_state, rows=rows)
    if not evaluator.prompts:
        return measures, []
    samples = write_samples(evaluator, policy)
    measures |= evaluate_samples(evaluator, policy, samples)
    if "gold_reward" in measures:
        gold = {"reference": mean_gold_reward(reference_wrote), "policy": measures["gold_reward"]}
        measures["gold_reward"] = gold
    return measures, samples


def evaluate_comparisons(
    evaluator: Evaluator,
    policy: Scorer,
    loss_state: Mapping[str, Tensor] | None = None,
    *,
    rows: list[HeldOut] | None = None,
) -> dict[str, Any]:
    """Loss, accuracy, margin and drift of the policy on the held-out comparisons.

    Numbers that the loss carries from step to step are read and not moved; what it takes over a batch is taken over
    all held-out examples.

    Returns:
        ``loss``; ``accuracy`` with its 95 % interval (Wilson) and ``comparisons``; ``margin`` (beta times the score
        difference the loss ranks by); ``chosen_drift_per_token`` and ``rejected_drift_per_token`` (policy minus
        reference, nats per token, mean over completions); ``displacement`` (share of comparisons whose margin grew
        while both completions became less likely).
    """
    loss, comparisons = evaluator.loss, 0
    sums = MetricSums(next(policy.parameters()).device)
    waiting: list[Record] = []
    if rows is not None:
        rows.clear()
    for scored, plan, micro in evaluator.feed.evaluated(policy, evaluator.token_budget):
        record = loss_record(loss.needs, scored, StepFacts(plan.tokens_per_example, loss_state or None))
        comparisons = plan.comparisons
        if rows is not None and not scored.batch.unpaired:
            rows += held_out_rows(loss, evaluator.feed.dataset, scored, micro)
        if loss.needs.batch:
            waiting.append(record)
        else:
            add_comparison_metrics(sums, loss, scored, record, loss_values(loss, record))
    if waiting:
        whole = joined(waiting)
        add_record_metrics(sums, loss, whole, loss_values(loss, whole))
    means = sums.means()
    measures: dict[str, Any] = {"loss": means["loss"], "comparisons": comparisons}
    if "rewards/accuracies" in means:
        accuracy = means["rewards/accuracies"]
        measures |= {
            "accuracy": accuracy,
            "accuracy_interval": list(wilson_interval(accuracy, comparisons)),
            "margin": means["rewards/margins"],
        }
    for side in ("chosen", "rejected"):
        if f"logratios_per_token/{side}" in means:
            measures[f"{side}_drift_per_token"] = means[f"logratios_per_token/{side}"]
    if "displacement" in means:
        measures["displacement"] = means["displacement"]
    return measures


def reference_samples(evaluator: Evaluator, file: Path) -> list[Sample]:
    """Let the reference write once per run; where the file exists, read what it wrote."""
    if not evaluator.prompts:
        return []
    if not file.exists():
        with evaluator.open_reference() as scorer:
            write_lines(file, (one.as_dict() for one in write_samples(evaluator, scorer)))
    return read_samples(file)


def write_samples(evaluator: Evaluator, scorer: Scorer) -> list[Sample]:
    """Let a model continue the held-out prompts and judge what it writes; the same random numbers every time."""
    groups = sample(
        scorer,
        evaluator.prompts,
        evaluator.tokenizer,
        max_new_tokens=evaluator.settings.max_new_tokens,
        temperature=evaluator.settings.temperature,
        seed=evaluator.seed,
        precision=evaluator.precision,
    )
    return [_judged(evaluator, group) for group in groups]


def _judged(evaluator: Evaluator, group: PromptGroup) -> Sample:
    tokenizer = evaluator.tokenizer
    prompt = tokenizer.decode(group.prompt, skip_special_tokens=True)
    ids = group.completions[0]
    completion = tokenizer.decode(ids, skip_special_tokens=True)
    finished = bool(len(ids)) and int(ids[-1]) == tokenizer.eos_token_id
    return Sample(prompt, completion, len(ids), finished, _gold(evaluator, prompt, completion), group)


def _gold(evaluator: Evaluator, prompt: str, completion: str) -> float | None:
    if evaluator.gold_reward is None:
        return None
    try:
        return float(evaluator.gold_reward(prompt, completion))
    except Exception as error:  # somebody's own function: it raises what it likes
        raise RecipeError(
            Problem("eval.gold_reward", "a number for every (prompt, completion)",
                    f"{type(error).__name__}: {error} for the prompt {prompt[:60]!r}",
                    f"correct the function {evaluator.settings.gold_reward}")
        ) from error  # fmt: skip


def evaluate_samples(evaluator: Evaluator, policy: Scorer, samples: Sequence[Sample]) -> dict[str, Any]:
    """Sampled KL to the reference, length, share of finished samples, gold reward.

    ``kl``: mean over samples y ~ policy of log pi(y|x) - log pi_ref(y|x), nats per completion, with its standard
    error. It estimates KL(pi || pi_ref) at temperature 1.
    """
    groups = [one.group for one in samples]
    batches = list(_sample_batches(groups, evaluator.token_budget))
    policy_sums = _sums(policy, batches, evaluator.precision)
    with evaluator.open_reference() as reference:
        reference_sums = _sums(reference, batches, evaluator.precision)
    ratios = policy_sums - reference_sums
    measures: dict[str, Any] = {
        "samples": len(samples),
        "kl": float(ratios.mean()),
        "kl_standard_error": float(ratios.std(ddof=1) / math.sqrt(len(ratios))) if len(ratios) > 1 else None,
        "length": float(np.mean([one.tokens for one in samples])),
        "finished": float(np.mean([one.finished for one in samples])),
    }
    if samples[0].gold_reward is not None:
        measures["gold_reward"] = mean_gold_reward(samples)
    return measures


def mean_gold_reward(samples: Sequence[Sample]) -> float:
    """Mean gold reward of judged samples."""
    return float(np.mean([one.gold_reward for one in samples if one.gold_reward is not None]))


def _sample_batches(groups: Sequence[PromptGroup], token_budget: int) -> Iterator[RaggedBatch]:
    pending: list[PromptGroup] = []
    size = 0
    for group in groups:
        tokens = len(group.prompt) + len(group.completions[0])
        if pending and size + tokens > token_budget:
            yield make_batch(pending)
            pending, size = [], 0
        pending.append(group)
        size += tokens
    yield make_batch(pending)


def _sums(scorer: Scorer, batches: Sequence[RaggedBatch], precision: str) -> np.ndarray:
    return np.concatenate(
        [result.sums.double().cpu().numpy() for _, result in score(scorer, batches, precision=precision)]
    )


def wilson_interval(share: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of ``count`` independent cases (Wilson's score interval)."""
    if count == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def load_gold_reward(name: str | None) -> GoldReward | None:
    """Return the gold reward that a recipe names: `sandbox`, or `module:function`.

    Raises:
        RecipeError: there is no such function.
    """
    if name is None:
        return None
    if name == "sandbox":
        from prefopt.sandbox import gold_reward

        return gold_reward
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs somebody's module
        raise RecipeError(
            Problem("eval.gold_reward", "sandbox, or module:function of (prompt, completion)", f"{name}: {error}",
                    "put the module on PYTHONPATH and check the function's name")
        ) from error  # fmt: skip
    return found

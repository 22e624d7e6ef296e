"""The end of a run: the model in plain format with its card, the samples, and `result.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.card import model_card
from prefopt.export import merge_adapter
from prefopt.forward import Scorer, plain_attention
from prefopt.models import quiet_transformers
from prefopt.policy import Policy
from prefopt.prepare import Prepared
from prefopt.recipe import Recipe
from prefopt.reference.running import RunReference
from prefopt.run_folder import RESULT, SAMPLES, conventions, write_json, write_lines, write_text
from prefopt.sampling import Sample
from prefopt.screen import Screen


@dataclass(frozen=True)
class Finish:
    """What the loop hands over when it is done."""

    recipe: Recipe
    folder: Path
    prepared: Prepared
    policy: Policy
    reference: RunReference
    steps: int
    resolved: dict[str, Any]
    step_zero: dict[str, Any] | None
    evaluation: dict[str, Any]
    samples: Sequence[Sample]
    reference_samples: Sequence[Sample]
    final_loss: float
    comparisons: int
    """Comparisons trained on since this process started; so are the next three."""
    tokens: int
    seconds: float
    peak_memory: int
    writes: bool = True
    """False in every process but the first."""


def finish_run(finish: Finish, screen: Screen) -> dict[str, Any]:
    """Write everything that outlives the process; `result.json` last, for it says that the run has finished."""
    result = result_content(finish)
    if not finish.writes:
        return result
    save_model(finish, result)
    write_lines(finish.folder / SAMPLES, _side_by_side(finish))
    write_json(finish.folder / RESULT, result)
    screen.finished(finish.folder, result, finish.samples, finish.reference_samples, finish.recipe.eval.show)
    return result


def result_content(finish: Finish) -> dict[str, Any]:
    """Return the content of `result.json`, in the types that JSON gives back."""
    loss = finish.prepared.loss
    content = {
        "status": "finished",
        "steps": finish.steps,
        "loss": {"name": loss.name, **loss.hyperparameters},
        "conventions": conventions(loss),
        "train": {
            "loss": finish.final_loss,
            "comparisons": finish.comparisons,
            "pairs_per_second": finish.comparisons / finish.seconds if finish.seconds else None,
            "computed_tokens_per_second": finish.tokens / finish.seconds if finish.seconds else None,
            "seconds": finish.seconds,
            "peak_memory_bytes": finish.peak_memory,
            "trainable_parameters": finish.policy.trainable,
            **finish.resolved,
        },
        "eval": finish.evaluation,
        "reference": _reference_part(finish),
        "data": finish.prepared.data.report.as_dict(),
        "seed": finish.recipe.seed,
    }
    return json.loads(json.dumps(content))


def _reference_part(finish: Finish) -> dict[str, Any]:
    reference, report, zero = finish.reference, finish.reference.report, finish.step_zero
    return {
        "model": reference.source.path,
        "fingerprint": reference.identity.fingerprint if reference.identity else None,
        "quantization": finish.prepared.recipe.reference.quantization,
        "cache": finish.recipe.reference.cache,
        "cache_hits": report.hits,
        "cache_misses": report.misses,
        "tokens_scored": report.tokens if reference.online is None else reference.online.tokens,
        "seconds": report.seconds,
        "max_abs_error": zero["max_abs_error"] if zero and not finish.recipe.reference.model else None,
        "max_margin_error": zero["max_margin_error"] if zero and not finish.recipe.reference.model else None,
    }


def save_model(finish: Finish, result: dict[str, Any]) -> None:
    """Save the policy so that plain `from_pretrained` loads it: weights or adapter, tokenizer, card."""
    folder = finish.folder / "model"
    save_policy(finish.policy.scorer, folder)
    finish.prepared.tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", model_card(finish.recipe, result))
    if finish.recipe.adapter is not None and finish.recipe.adapter.merge:
        merge_adapter(finish.prepared.recipe, folder, finish.folder / "model-merged", dtype=None)


def save_policy(scorer: Scorer, folder: Path) -> None:
    """Save the model or its adapter, with its own attention in its config."""
    model = scorer.language_model
    before = model.config._attn_implementation
    model.set_attn_implementation(plain_attention(model))
    try:
        with quiet_transformers():
            scorer.model.save_pretrained(folder)
    finally:
        model.set_attn_implementation(before)


def _side_by_side(finish: Finish) -> list[dict[str, Any]]:
    """One row per prompt: what the reference wrote and what the policy writes."""
    return [
        {
            "prompt": after.prompt,
            "reference": before.completion,
            "policy": after.completion,
            "gold_reward": {"reference": before.gold_reward, "policy": after.gold_reward},
        }
        for before, after in zip(finish.reference_samples, finish.samples)
    ]

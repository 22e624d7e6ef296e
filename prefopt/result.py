"""The end of a run: the model in plain format with its card, the samples, and `result.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prefopt.attention import attention
from prefopt.card import model_card
from prefopt.errors import ModelError, Problem
from prefopt.export import merge_adapter
from prefopt.forward import Scorer, plain_attention
from prefopt.held_out import FILE as HELD_OUT
from prefopt.held_out import write_held_out
from prefopt.models import mend_generation_settings, own_dropout, quiet_transformers
from prefopt.reference.certificate_table import sentence
from prefopt.run import Run
from prefopt.run_folder import RESULT, SAMPLES, conventions, write_json, write_lines, write_text


def finish_run(run: Run, *, step_zero: dict[str, Any] | None, peak_memory: int) -> dict[str, Any]:
    """Write everything that outlives the process; `result.json` last, for it says that the run has finished.

    Args:
        run: at its end.
        step_zero: the figures of the step-0 comparison.
        peak_memory: bytes.

    Returns:
        The content of ``result.json``.
    """
    result = result_content(run, step_zero, peak_memory)
    if run.accelerator.is_main_process:
        save_model(run, result)
        write_lines(run.folder / SAMPLES, _side_by_side(run))
        if run.held_out:
            write_held_out(run.folder / HELD_OUT, run.held_out)
        write_json(run.folder / RESULT, result)
    run.accelerator.wait_for_everyone()
    run.screen.finished(run.folder, result, run.samples, run.reference_samples, run.recipe.eval.show)
    return result


def result_content(run: Run, step_zero: dict[str, Any] | None, peak_memory: int) -> dict[str, Any]:
    """Return the content of `result.json`, in the types that JSON gives back."""
    loss, state = run.prepared.loss, run.state
    content = {
        "status": "finished",
        "steps": state.step,
        "loss": {"name": loss.name, **loss.hyperparameters},
        "conventions": conventions(loss),
        "train": {
            "loss": state.loss,
            "comparisons": state.comparisons,
            "pairs_per_second": state.comparisons / state.seconds if state.seconds else None,
            "computed_tokens_per_second": state.tokens / state.seconds if state.seconds else None,
            "seconds": state.seconds,
            "peak_memory_bytes": peak_memory,
            "trainable_parameters": run.policy.trainable,
            **run.resolved,
        },
        "eval": run.evaluation,
        "reference": _reference_part(run, step_zero),
        "data": run.prepared.data.report.as_dict(),
        "seed": run.recipe.seed,
        "best": None if state.best is None else {"value": state.best[0], "step": state.best[1]},
    }
    return json.loads(json.dumps(content))


def _reference_part(run: Run, step_zero: dict[str, Any] | None) -> dict[str, Any]:
    reference, report = run.reference, run.reference.report
    compared = step_zero if run.recipe.reference.model is None else None
    return {
        "model": run.recipe.reference.model or run.recipe.model.path,
        "fingerprint": reference.identity.fingerprint if reference.identity else None,
        "quantization": str(run.recipe.reference.quantization),
        "adapter": reference.source.adapter.path if reference.source.adapter is not None else None,
        "sync": reference.sync_facts(run.state.step),
        "cache": run.recipe.reference.cache,
        "cache_hits": report.hits,
        "cache_misses": report.misses,
        "tokens_scored": report.tokens if reference.online is None else reference.online.tokens,
        "seconds": report.seconds,
        "max_abs_error": compared["max_abs_error"] if compared else None,
        "max_margin_error": compared["max_margin_error"] if compared else None,
        "certificate": _certificate_part(run),
    }


def _certificate_part(run: Run) -> dict[str, Any] | None:
    """What is known of a quantized reference's error, and what that does to this run's loss."""
    certificate, loss = run.reference.certificate, run.prepared.loss
    return None if certificate is None else {"sentence": sentence(certificate, loss), **certificate.summary(loss)}


def save_model(run: Run, result: dict[str, Any]) -> None:
    """Save the policy so that plain `from_pretrained` loads it: weights or adapter, tokenizer, card."""
    folder = run.folder / "model"
    try:
        save_policy(run.scorer, folder)
        run.prepared.tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", model_card(run.recipe, result))
        if run.recipe.adapter is not None and run.recipe.adapter.merge:
            merge_adapter(run.prepared.recipe, folder, run.folder / "model-merged", dtype=None)
    except SafetensorError as error:
        raise ModelError(
            Problem(str(folder), "room to write the model", str(error).splitlines()[0],
                    "free space and run the same command again: it goes on from the last checkpoint")
        ) from error  # fmt: skip


def save_policy(scorer: Scorer, folder: Path) -> None:
    """Save the model or its adapter, with its own attention in its config."""
    mend_generation_settings(scorer.language_model)
    model = scorer.language_model
    with quiet_transformers(), own_dropout(model), attention(model, plain_attention(model)):
        scorer.model.save_pretrained(folder)


def _side_by_side(run: Run) -> list[dict[str, Any]]:
    """One row per prompt: what the reference wrote and what the policy writes."""
    return [
        {
            "prompt": after.prompt,
            "reference": before.completion,
            "policy": after.completion,
            "gold_reward": {"reference": before.gold_reward, "policy": after.gold_reward},
            "tokens": {"reference": before.tokens, "policy": after.tokens},
            "finished": {"reference": before.finished, "policy": after.finished},
        }
        for before, after in zip(run.reference_samples, run.samples)
    ]

"""What a loss is fed is what policy and reference say of the very completions that it names."""

from __future__ import annotations

import pytest
import torch
from published.records import make_lists
from transformers import AutoModelForCausalLM
from world import make_model, make_recipe, quiet

from prefopt.errors import ModelError
from prefopt.evaluate import evaluate_comparisons, make_evaluator
from prefopt.forward import Scorer
from prefopt.invariant import step_zero
from prefopt.planning import every_comparison
from prefopt.prepare import prepare
from prefopt.probe import plain_logps
from prefopt.reference.running import open_reference
from prefopt.step_record import joined
from prefopt.train import run_training
from prefopt_losses import LogProbs, get_loss


@pytest.fixture
def apart(tmp_path):
    """A policy, another model as its reference, and a recipe of both for a loss."""
    torch.manual_seed(3)
    named = {"model": str(make_model(tmp_path / "other", hidden_size=16))}

    def opened(loss):
        prepared = prepare(make_recipe(tmp_path, loss=loss, reference=named, eval={"samples": 0}), quiet=True)
        return prepared, open_reference(prepared, quiet())

    models = {}
    for name in ("base", "other"):
        if not (tmp_path / name).exists():
            make_model(tmp_path / name)
        models[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
    return opened, models["base"], models["other"]


def test_mismatched_completions_are_scored_by_policy_and_reference(apart):
    opened, policy, other = apart
    prepared, reference = opened("kto")
    feed, partners = reference.feed("train"), prepared.partners["train_partners"]
    micro = every_comparison(prepared.data.train)[5:9]
    with torch.no_grad():
        scored = feed.scored(Scorer(policy).eval(), micro, feed.batch(micro, torch.device("cpu")))
    for given, model in zip(scored.mismatched, (policy, other)):
        expected = torch.cat([plain_logps(model, partners[part.group]) for part in micro])
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["kto", "aot", "bco"])
def test_an_evaluation_takes_what_couples_examples_over_all_of_them(apart, name):
    """One number over the whole held-out set, whatever the token budget; log-probs by the models' own logits."""
    opened, policy, other = apart
    prepared, reference = opened(name)
    evaluator = make_evaluator(prepared, reference, token_budget=60)
    found = evaluate_comparisons(evaluator, Scorer(policy).eval())
    groups = list(prepared.data.eval)
    order = [(g.comparisons[0].chosen, g.comparisons[0].rejected) for g in groups]
    sides = {}
    for prefix, model in (("", policy), ("ref_", other)):
        both = [plain_logps(model, group)[list(places)] for group, places in zip(groups, order)]
        sides |= {f"{prefix}{side}_logps": torch.stack(both)[:, n] for n, side in enumerate(("chosen", "rejected"))}
        if name == "kto":
            partners = prepared.partners["eval_partners"]
            sides[f"{prefix}mismatched_logps"] = torch.cat([plain_logps(model, group) for group in partners])
    assert found["comparisons"] == len(groups) > 4
    assert found["loss"] == pytest.approx(float(get_loss(name)(LogProbs(**sides)).mean()), rel=1e-4)


def test_lists_of_several_micro_batches_stay_apart_when_joined():
    loss = get_loss("plackett_luce_dpo")
    parts = [make_lists(sizes=(2, 3), seed=0), make_lists(sizes=(4,), seed=1), make_lists(sizes=(3, 2), seed=2)]
    torch.testing.assert_close(loss(joined(parts)), torch.cat([loss(part) for part in parts]))


def test_a_policy_that_gives_no_numbers_on_held_out_data_is_said_to(tmp_path, monkeypatch):
    """The loss looks for NaN there too; the message is that of a step, not a traceback."""

    def then_poisoned(scorer, *rest, **named):
        found = step_zero(scorer, *rest, **named)
        with torch.no_grad():
            next(scorer.parameters()).fill_(float("nan"))
        return found

    monkeypatch.setattr("prefopt.train.step_zero", then_poisoned)
    with pytest.raises(ModelError, match=r"finite[^|]*on held-out data"):
        run_training(make_recipe(tmp_path, eval={"samples": 0}), quiet())

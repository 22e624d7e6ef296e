"""TRL's own trainer with losses of ours: its batches, its reference, its logs, and nothing accepted and ignored."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from peft import LoraConfig
from tiny_trl import make_model, make_pairs, make_tokenizer
from trl import DPOConfig, DPOTrainer

from prefopt.errors import DataError, UserError
from prefopt.integrations.trl import PreferenceTrainer
from prefopt.integrations.trl_options import unfed
from prefopt_losses import Loss, LossError, Running, Score, Term, TokenWeights, convex, get_loss
from prefopt_losses.terms import FromRecord

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def make(tmp_path):
    """A factory of trainers on the same pairs; `trainer=DPOTrainer` gives TRL's own."""

    def trainer(loss=None, *, trainer=PreferenceTrainer, ref=True, model=None, data=None, others=None, **options):
        common = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 6,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "max_length": 64,
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
        }
        arguments = {
            "model": model or make_model(0, layers=1),
            "ref_model": make_model(1, layers=1) if ref else None,
            "args": DPOConfig(**common | options),
            "train_dataset": data or make_pairs(),
            "processing_class": make_tokenizer(),
        }
        if loss is not None:
            arguments["loss"] = loss
        return trainer(**arguments | (others or {}))

    return trainer


def value_and_gradient(trainer, batch=None):
    batch = batch or next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    slopes = torch.autograd.grad(loss, [each for each in trainer.model.parameters() if each.requires_grad])
    return loss.detach(), torch.cat([slope.flatten() for slope in slopes])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("dpo", {"loss_type": "sigmoid"}),
        ({"name": "dpo", "beta": 0.5}, {"loss_type": "sigmoid", "beta": 0.5}),
        ("hinge", {"loss_type": "hinge"}),
        ({"name": "ipo", "beta": 0.7}, {"loss_type": "ipo", "beta": 0.7}),
        (["dpo", {"name": "sft", "weight": 0.5}], {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ],
    ids=["sigmoid", "sigmoid-0.5", "hinge", "ipo", "rpo"],
)
def test_loss_and_gradient_are_those_of_trl(make, ours, theirs):
    expected, expected_slope = value_and_gradient(make(trainer=DPOTrainer, **theirs))
    given, slope = value_and_gradient(make(ours))
    torch.testing.assert_close(given, expected, rtol=2e-5, atol=1e-6)
    assert expected_slope.norm() > 0
    assert (slope - expected_slope).norm() <= 2e-5 * expected_slope.norm()


def test_metrics_agree_with_trls_where_they_share_a_name(make):
    logs = {}
    for kind, loss in ((DPOTrainer, None), (PreferenceTrainer, "dpo")):
        trainer = make(loss, trainer=kind)
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        logs[kind] = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    theirs, ours = logs[DPOTrainer], logs[PreferenceTrainer]
    assert set(theirs) <= set(ours)
    assert {"logratios/chosen", "logratios/rejected", "displacement"} <= set(ours) - set(theirs)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_training_with_a_loss_trl_lacks_lowers_it(make):
    trainer = make("gpo_exponential", learning_rate=1e-2, max_steps=8, ref=True, lr_scheduler_type="constant")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    last = [entry for entry in trainer.state.log_history if "rewards/margins" in entry][-1]
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] == pytest.approx(0.1 * (last["logratios/chosen"] - last["logratios/rejected"]), 1e-4)


def test_precomputed_columns_are_what_is_used(make, monkeypatch):
    online = make("dpo")
    expected, _ = value_and_gradient(online)
    trainer = make("dpo", precompute_ref_log_probs=True)
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.train_dataset.column_names)
    monkeypatch.setattr(trainer, "compute_ref_log_probs", None)
    given, _ = value_and_gradient(trainer)
    torch.testing.assert_close(given, expected, rtol=2e-5, atol=1e-6)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["ref_chosen_logps"] = batch["ref_chosen_logps"] + 10
    assert trainer.compute_loss(trainer.model, batch) > given


@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo"])
def test_a_loss_without_reference_never_scores_one(make, monkeypatch, loss):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the reference was asked for")

    monkeypatch.setattr(PreferenceTrainer, "compute_ref_log_probs", refuse)
    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", refuse)
    trainer = make(loss, ref=False, max_steps=1, others={"eval_dataset": make_pairs(3)})
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.evaluate(make_pairs(2))["eval_loss"] > 0
    assert not trainer.args.precompute_ref_log_probs
    assert not [name for name in trainer.state.log_history[0] if "logratios" in name]


def test_lengths_are_the_scored_tokens(make):
    trainer = make("simpo", ref=False)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    mask = batch["completion_mask"][:, 1:]
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    means = (logps * mask).sum(1) / mask.sum(1)
    assert logged["rewards/chosen"] == pytest.approx(2.0 * means[:6].mean().item(), rel=1e-4)


def test_an_adapter_is_switched_off_for_the_reference(make):
    trainer = make("dpo", ref=False, others={"peft_config": LoraConfig(r=2, target_modules=["q_proj"])})
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    start = trainer.compute_loss(trainer.model, batch).item()
    assert start == pytest.approx(0.6931, abs=1e-4)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(start, abs=1e-3)


def test_a_token_mean_does_not_depend_on_how_the_step_is_cut(make):
    """Micro-batches of 2, 2 and 1 pairs weigh every token of the step as one batch of 5 does."""
    weights = []
    for size, accumulation in ((5, 1), (2, 3)):
        trainer = make(
            "sft",
            ref=False,
            data=make_pairs(5),
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            max_steps=1,
            lr_scheduler_type="constant",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        weights.append(torch.cat([each.detach().flatten() for each in trainer.model.parameters()]))
    start = torch.cat([each.detach().flatten() for each in make_model(0, layers=1).parameters()])
    assert (weights[0] - start).norm() > 1e-2
    assert (weights[1] - weights[0]).norm() <= 1e-4 * (weights[0] - start).norm()


def test_soft_labels_come_from_a_column_of_any_name(make):
    agreement = [0.9, 0.6, 0.5, 0.8, 1.0, 0.7]
    soft = {"name": "dpo", "soft_labels": True}
    data = make_pairs(agreement=agreement)
    trainer = make(soft, data=data, others={"columns": {"preference_probability": "agreement"}})
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    assert batch["preference_probability"].tolist() == pytest.approx(agreement)
    given = trainer.compute_loss(trainer.model, batch)
    margin = get_loss("dpo").margin(trainer._record(scored(trainer, batch), batch))
    q = torch.tensor(agreement)
    expected = -(q * margin.sigmoid().log() + (1 - q) * (-margin).sigmoid().log()).mean()
    torch.testing.assert_close(given, expected)
    trainer.args.max_steps = 1
    trainer.train()
    with pytest.raises(DataError, match="examples: the loss reads a column 'agreement'"):
        trainer.evaluate(make_pairs(2))


def scored(trainer, batch):
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return trainer.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
    )


def test_token_log_probs_are_left_aligned_and_the_references_are_caught(make):
    trainer = make("dpo")
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = trainer._reference(batch, tokens=True)
    sums, lengths = tokens["ref_chosen_logps"], batch["completion_mask"][:6, 1:].sum(1)
    torch.testing.assert_close(tokens["ref_chosen_token_logps"].sum(1), sums)
    assert ((tokens["ref_chosen_token_logps"] != 0).sum(1) == lengths).all()
    for row, length in zip(tokens["ref_chosen_token_logps"], lengths):
        assert (row[:length] < 0).all()


def test_a_loss_of_token_weights_sees_policy_and_reference_tokens(make):
    """Weight 1 everywhere is dpo; weight 1 on the first token only is dpo of first tokens."""

    def loss(weights):
        return Loss("mine", terms=(Term(convex.logistic, Score(TokenWeights("mine", weights)), beta=0.1),))

    every, _ = value_and_gradient(make(loss(lambda at, own, other, draw: torch.ones_like(at, dtype=torch.float))))
    torch.testing.assert_close(every, value_and_gradient(make("dpo"))[0], rtol=2e-5, atol=1e-6)
    trainer = make(loss(lambda at, own, other, draw: (at == 0).float()))
    batch = next(iter(trainer.get_train_dataloader()))
    first, _ = value_and_gradient(trainer, batch)
    starts = batch["completion_mask"].argmax(1)
    with torch.no_grad():
        ratio = 0
        for sign, model in ((1, trainer.model), (-1, trainer.ref_model)):
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
            rows = torch.arange(len(starts))
            ratio = ratio + sign * logits[rows, starts - 1, batch["input_ids"][rows, starts]]
        chosen, rejected = ratio.chunk(2)
    torch.testing.assert_close(first, -(0.1 * (chosen - rejected)).sigmoid().log().mean(), rtol=1e-4, atol=1e-5)


def test_relative_log_probs_are_those_over_the_squared_distribution(make):
    weight = FromRecord("mine", ("chosen_relative_logps",), lambda record: record.chosen_relative_logps)
    trainer = make(Loss("mine", terms=(Term(convex.logistic, Score(), beta=0.1, weight=weight),)))
    batch = next(iter(trainer.get_train_dataloader()))
    given = trainer._record(scored(trainer, batch), batch).chosen_relative_logps
    mask = batch["completion_mask"][:6, 1:]
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:6, :-1]
    logs = logits.log_softmax(-1)
    own = logs.gather(-1, batch["input_ids"][:6, 1:, None])[..., 0]
    torch.testing.assert_close(given, ((own - (2 * logs).logsumexp(-1)) * mask).sum(1), rtol=1e-4, atol=1e-4)
    assert not given.requires_grad


def test_running_numbers_move_in_training_and_come_back_on_resuming(make, tmp_path):
    counted = Running("steps", start=0.0, reads=("chosen_logps",), update=lambda steps, record: steps + 1)
    shift = FromRecord("mine", (), lambda record: record.state["steps"], batch=True, running=(counted,))
    loss = Loss("mine", terms=(Term(convex.logistic, Score(), beta=0.1, shift=shift),))
    options = {"save_strategy": "steps", "save_steps": 2, "others": {"eval_dataset": make_pairs(3)}}
    trainer = make(loss, max_steps=2, eval_strategy="steps", eval_steps=1, **options)
    trainer.train()
    assert trainer.loss_module.running_steps == 2
    resumed = make(loss, max_steps=3, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.loss_module.running_steps == 3


@pytest.mark.parametrize(
    ("loss", "options", "where"),
    [
        ("dpo", {"loss_type": "ipo"}, "args.loss_type"),
        ("dpo", {"label_smoothing": 0.1}, "args.label_smoothing"),
        ("dpo", {"f_divergence_type": "forward_kl"}, "args.f_divergence_type"),
        ("dpo", {"f_alpha_divergence_coef": 0.7}, "args.f_alpha_divergence_coef"),
        ("dpo", {"ld_alpha": 0.5}, "args.ld_alpha"),
        ("dpo", {"use_weighting": True}, "args.use_weighting"),
        ("dpo", {"discopop_tau": 0.1}, "args.discopop_tau"),
        ("dpo", {"loss_weights": [2.0]}, "args.loss_weights"),
        ("dpo", {"beta": 0.3}, "args.beta"),
        ("dpo+sft", {"beta": 0.3}, "args.beta"),
        ("orpo", {"beta": 0.3, "ref": False}, "args.beta"),
        ("simpo", {}, "ref_model"),
        ("simpo", {"ref": False, "precompute_ref_log_probs": True}, "args.precompute_ref_log_probs"),
        ("simpo", {"ref": False, "sync_ref_model": True}, "args.sync_ref_model"),
        ("dpo", {"others": {"columns": {"preference_probability": "p"}}}, "columns.preference_probability"),
    ],
)
def test_what_would_be_ignored_is_refused(make, loss, options, where):
    with pytest.raises(UserError) as refused:
        make(loss, **options)
    (problem,) = refused.value.problems
    assert problem.where == where
    assert problem.fix


def test_all_problems_are_said_at_once(make):
    with pytest.raises(UserError) as refused:
        make("simpo", loss_type="hinge", label_smoothing=0.1, beta=0.5)
    assert [each.where for each in refused.value.problems] == [
        "args.loss_type",
        "args.label_smoothing",
        "args.beta",
        "ref_model",
    ]


def test_the_losss_own_beta_may_be_repeated(make):
    make({"name": "dpo", "beta": 0.3}, beta=0.3)


def test_a_missing_column_is_named_with_those_that_are_there(make):
    with pytest.raises(DataError, match=r"train_dataset: the loss reads a column 'preference_probability'") as refused:
        make({"name": "dpo", "soft_labels": True}, others={"eval_dataset": {"held out": make_pairs(2)}})
    assert [each.where for each in refused.value.problems] == ["train_dataset", "eval_dataset['held out']"]
    assert refused.value.problems[0].given == "columns prompt, chosen, rejected"


def test_an_unknown_loss_is_refused_with_its_name_here(make):
    with pytest.raises(LossError, match='It is called "dpo" here'):
        make("sigmoid")


def needing(*tensors, **needs):
    """A loss that asks for more than a pair's log-probs."""
    basic = get_loss("dpo").needs
    return SimpleNamespace(name="mine", needs=replace(basic, tensors=(*basic.tensors, *tensors), **needs))


@pytest.mark.parametrize("tensor", ["mismatched_logps", "chosen_sequential_kl", "gold_logps"])
def test_what_trl_cannot_give_is_refused_with_the_way_out(tensor):
    (problem,) = unfed(needing(tensor), DPOConfig(use_cpu=True, bf16=False))
    assert tensor in problem.expected
    assert "prefopt train" in problem.fix


def test_statistics_of_a_step_are_refused_when_the_step_is_cut():
    loss = needing(batch=("mean margin",))
    whole = DPOConfig(use_cpu=True, bf16=False)
    assert not unfed(loss, whole)
    (problem,) = unfed(loss, replace(whole, gradient_accumulation_steps=4))
    assert "mean margin" in problem.expected
    assert "gradient_accumulation_steps=4" in problem.given


def test_a_last_batch_too_small_for_the_loss_is_foreseen():
    whole = DPOConfig(use_cpu=True, bf16=False)
    (problem,) = unfed(needing(minimum_batch=2), whole)
    assert problem.where == "args.dataloader_drop_last"
    assert not unfed(needing(minimum_batch=2), replace(whole, dataloader_drop_last=True))


def test_token_losses_are_refused_on_precomputed_sums():
    loss = needing("ref_chosen_token_logps")
    (problem,) = unfed(loss, DPOConfig(use_cpu=True, bf16=False, precompute_ref_log_probs=True))
    assert problem.where == "args.precompute_ref_log_probs"


def test_the_users_arguments_are_left_as_they_are(tmp_path, make):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    before = {field.name: copy.copy(getattr(args, field.name)) for field in fields(args)}
    make("simpo", ref=False, others={"args": args})
    assert {name: getattr(args, name) for name in before} == before


def test_a_run_is_saved_resumed_and_carded(make, tmp_path):
    options = {"ref": False, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    make("simpo", max_steps=2, **options).train()
    card = (tmp_path / "README.md").read_text()
    assert "preference optimization" in card
    resumed = make("simpo", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4

"""Value and gradient against TRL's own trainers, run on CPU on the batches they collate themselves.

TRL's side is the real `compute_loss` of a real trainer: policy and reference forward, masks, sums and loss.
Our side scores the same batch with plain logits and `token_logps_from_logits`, and calls the loss.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from tiny_trl import assert_same, make_model, make_pairs, make_tokenizer, scored, settings
from trl import DPOConfig, DPOTrainer

from prefopt_losses import LogProbs, get_loss, loss_from_config, token_logps_from_logits
from prefopt_losses.distributions import relative_token_logps_from_logits
from prefopt_losses.logps import left_aligned


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    return make_dpo(tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def weighted_dpo(tmp_path_factory):
    return make_dpo(tmp_path_factory.mktemp("wpo"), use_weighting=True)


def make_dpo(folder, **options):
    trainer = DPOTrainer(
        model=make_model(0),
        ref_model=make_model(1),
        args=DPOConfig(**settings(folder), **options),
        train_dataset=make_pairs(),
        processing_class=make_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))

    def record():
        columns = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
        (chosen, rejected), (n_chosen, n_rejected) = (each.chunk(2) for each in scored(trainer.model, *columns))
        with torch.no_grad():
            ref_chosen, ref_rejected = scored(trainer.ref_model, *columns)[0].chunk(2)
        return LogProbs(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected)

    def theirs(loss_types, weights=None, beta=0.1, label_smoothing=0.0):
        trainer.loss_types, trainer.loss_weights = loss_types, weights or [1.0] * len(loss_types)
        trainer.beta, trainer.label_smoothing = beta, label_smoothing
        return trainer.compute_loss(trainer.model, batch)

    return SimpleNamespace(trainer=trainer, batch=batch, record=record, theirs=theirs)


def test_the_batch_can_tell_losses_apart(dpo):
    """Completions differ in length and the policy is nats away from its reference: nothing hides here."""
    record = dpo.record()
    assert len(set(record.chosen_lengths.tolist() + record.rejected_lengths.tolist())) > 3
    assert get_loss("dpo", beta=1.0).margin(record).abs().min() > 0.5


@pytest.mark.parametrize(
    ("name", "loss_type"),
    [
        ("dpo", "sigmoid"),
        ("hinge", "hinge"),
        ("ipo", "ipo"),
        ("bco_pair", "bco_pair"),
        ("nca_pair", "nca_pair"),
        ("sppo_hard", "sppo_hard"),
        ("apo_zero", "apo_zero"),
        ("apo_down", "apo_down"),
        ("discopop", "discopop"),
        ("dpo_norm", "sigmoid_norm"),
        ("aot", "aot"),
        ("aot_unpaired", "aot_unpaired"),
    ],
)
@pytest.mark.parametrize("beta", [0.03, 0.1, 0.7])
def test_it_trains_as_trl_does(dpo, name, loss_type, beta):
    theirs = dpo.theirs([loss_type], beta=beta)
    assert_same(theirs, get_loss(name, beta=beta)(dpo.record()).mean(), dpo.trainer.model)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_robust_dpo_trains_as_trls_robust(dpo, label_smoothing):
    theirs = dpo.theirs(["robust"], label_smoothing=label_smoothing)
    ours = get_loss("robust_dpo", label_smoothing=label_smoothing)(dpo.record()).mean()
    assert_same(theirs, ours, dpo.trainer.model)


@pytest.mark.parametrize("label_smoothing", [0.001, 0.1, 0.4])
def test_exo_trains_as_trls_exo_pair(dpo, label_smoothing):
    theirs = dpo.theirs(["exo_pair"], label_smoothing=label_smoothing)
    assert_same(theirs, get_loss("exo", label_smoothing=label_smoothing)(dpo.record()).mean(), dpo.trainer.model)


@pytest.mark.parametrize(
    ("name", "options", "divergence", "coefficient"),
    [
        ("f_dpo_forward_kl", {}, "forward_kl", None),
        ("f_dpo_js", {}, "js_divergence", None),
        ("f_dpo_alpha", {"alpha": 0.3}, "alpha_divergence", 0.7),  # TRL's coefficient is 1 - alpha
        ("f_dpo_alpha", {"alpha": 0.9}, "alpha_divergence", 0.1),
    ],
)
def test_divergences_train_as_trls(dpo, monkeypatch, name, options, divergence, coefficient):
    monkeypatch.setattr(dpo.trainer, "f_divergence_type", divergence)
    monkeypatch.setattr(dpo.trainer, "f_alpha_divergence_coef", coefficient)
    assert_same(dpo.theirs(["sigmoid"]), get_loss(name, **options)(dpo.record()).mean(), dpo.trainer.model)


@pytest.mark.parametrize(
    ("name", "loss_types", "weights"),
    [("irpo", ["sigmoid", "sft"], [1.0, 1.0]), ("mpo", ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])],
)
def test_named_mixtures_differ_from_trls_lists_only_in_what_their_nll_is_a_mean_over(dpo, name, loss_types, weights):
    record, theirs = dpo.record(), dpo.theirs(loss_types, weights)
    ours = get_loss(name)(record).mean()
    assert not torch.isclose(theirs, ours)
    by_completion, by_token = (get_loss("sft", normalize=each)(record).mean() for each in ("sequence", "token"))
    assert_same(theirs, ours - by_completion + by_token, dpo.trainer.model)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_smoothed_aot_trains_as_trls(dpo, name):
    theirs = dpo.theirs([name], label_smoothing=0.2)
    assert_same(theirs, get_loss(name, beta=0.1, label_smoothing=0.2)(dpo.record()).mean(), dpo.trainer.model)


def test_sft_is_trls_token_mean(dpo):
    assert_same(dpo.theirs(["sft"]), get_loss("sft")(dpo.record()).mean(), dpo.trainer.model)


@pytest.mark.parametrize(
    ("loss_types", "weights", "config"),
    [
        (["sigmoid", "sft"], [1.0, 0.5], ["dpo", {"name": "sft", "weight": 0.5}]),
        (
            ["sigmoid", "bco_pair", "sft"],
            [0.8, 0.2, 1.0],
            [{"name": "dpo", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}, "sft"],
        ),
        (["ipo", "apo_zero"], [0.01, 1.0], [{"name": "ipo", "weight": 0.01}, "apo_zero"]),
    ],
    ids=["dpo+sft", "mpo", "ipo+apo_zero"],
)
def test_mixtures_train_as_trls_lists(dpo, loss_types, weights, config):
    theirs = dpo.theirs(loss_types, weights)
    assert_same(theirs, loss_from_config(config)(dpo.record()).mean(), dpo.trainer.model)


def with_tokens(dpo):
    """The record with what token-level losses read: log-probs token by token, and relative ones."""
    ids, mask = dpo.batch["input_ids"][:, 1:], dpo.batch["completion_mask"][:, 1:]

    def tokens(model):
        logits = model(input_ids=dpo.batch["input_ids"], attention_mask=dpo.batch["attention_mask"]).logits[:, :-1]
        relative = (relative_token_logps_from_logits(logits, ids) * mask).sum(-1)
        return *left_aligned(token_logps_from_logits(logits, ids), mask).chunk(2), *relative.chunk(2)

    names = ("chosen_token_logps", "rejected_token_logps", "chosen_relative_logps", "rejected_relative_logps")
    with torch.no_grad():
        ref_chosen, ref_rejected, *_ = tokens(dpo.trainer.ref_model)
    reference = {"ref_chosen_token_logps": ref_chosen, "ref_rejected_token_logps": ref_rejected}
    return replace(dpo.record(), **dict(zip(names, tokens(dpo.trainer.model))), **reference)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_ld_dpo_trains_as_trls_ld_alpha(dpo, alpha, monkeypatch):
    monkeypatch.setattr(dpo.trainer, "ld_alpha", alpha)
    record, theirs = with_tokens(dpo), dpo.theirs(["sigmoid"])
    assert not torch.isclose(theirs, get_loss("dpo")(record).mean())
    assert_same(theirs, get_loss("ld_dpo", alpha=alpha)(record).mean(), dpo.trainer.model)


def test_wpo_trains_as_trls_use_weighting_where_no_weight_exceeds_one(weighted_dpo):
    """Beyond it we clamp, as WPO's authors; TRL does not. A random model finds no completion that likely."""
    record, theirs = with_tokens(weighted_dpo), weighted_dpo.theirs(["sigmoid"])
    loss = get_loss("wpo", beta=0.1)(record)
    weight = loss / get_loss("dpo", beta=0.1)(record)
    assert 0 < weight.min() < weight.max() < 1
    assert_same(theirs, loss.mean(), weighted_dpo.trainer.model)


def test_where_we_differ_on_purpose(dpo):
    """Controls: the comparison is not blind, and these differences are ours by decision."""
    record = dpo.record()
    smoothed = dpo.theirs(["sigmoid"], label_smoothing=0.3)
    assert torch.equal(smoothed, dpo.theirs(["sigmoid"]))  # TRL accepts label_smoothing here and ignores it
    assert not torch.isclose(smoothed, get_loss("cdpo", label_smoothing=0.3)(record).mean())
    assert not torch.isclose(dpo.theirs(["ipo"]), get_loss("ipo", normalize="sum")(record).mean())
    assert not torch.isclose(dpo.theirs(["sft"]), get_loss("sft", normalize="sequence")(record).mean())


def reference_free(trainer, chosen_labels, rejected_labels, batch):
    sides = {}
    for side, labels in (("chosen", chosen_labels), ("rejected", rejected_labels)):
        ids, attention = batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"]
        sides[side] = scored(trainer.model, ids, attention, labels != -100)
    (chosen, n_chosen), (rejected, n_rejected) = sides["chosen"], sides["rejected"]
    return LogProbs(chosen, rejected, chosen_lengths=n_chosen, rejected_lengths=n_rejected)


def make_reference_free_trainer(kind, folder):
    """Build a trainer of trl.experimental, which moves between versions; skip where it is not there."""
    module = pytest.importorskip(f"trl.experimental.{kind.lower()}", exc_type=ImportError)
    options = settings(folder) | {"remove_unused_columns": False}
    trainer = getattr(module, f"{kind}Trainer")(
        model=make_model(0),
        args=getattr(module, f"{kind}Config")(**options),
        train_dataset=make_pairs(),
        processing_class=make_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer, batch


@pytest.fixture(scope="module")
def cpo(tmp_path_factory):
    return make_reference_free_trainer("CPO", tmp_path_factory.mktemp("cpo"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"loss_type": "sigmoid", "cpo_alpha": 1.0}, get_loss("cpo")),
        ({"loss_type": "sigmoid", "cpo_alpha": 0.3, "beta": 0.5}, get_loss("cpo", alpha=0.3, beta=0.5)),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
            get_loss("simpo", beta=2.0, gamma_beta_ratio=0.25),
        ),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.7, "beta": 2.0, "simpo_gamma": 1.0},
            get_loss("simpo", gamma_beta_ratio=0.5) + 0.7 * get_loss("sft"),
        ),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 0.1, "simpo_gamma": 0.5},
            get_loss("simpo", beta=0.1, gamma_beta_ratio=5.0),
        ),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25},
            get_loss("alphapo"),
        ),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 0.5, "simpo_gamma": 0.3, "alpha": -0.5},
            get_loss("alphapo", beta=0.5, gamma=0.3, alpha=-0.5),
        ),
    ],
    ids=["cpo", "cpo-0.3", "simpo", "simpo+sft", "simpo-trl-defaults", "alphapo", "alphapo-negative"],
)
def test_cpo_simpo_and_alphapo_train_as_trls_cpo_trainer(cpo, settings, ours):
    trainer, batch = cpo
    for key, value in ({"beta": 0.1, "alpha": 0.0} | settings).items():
        setattr(trainer, key, value)
    record = reference_free(trainer, batch["chosen_labels"], batch["rejected_labels"], batch)
    assert_same(trainer.compute_loss(trainer.model, batch), ours(record).mean(), trainer.model)


@pytest.mark.filterwarnings("ignore")
def test_orpo_trains_as_trls_but_for_the_prompt_in_its_nll(tmp_path):
    """TRL's NLL runs over prompt and completion, ours over the completion; the odds ratio is the same."""
    trainer, batch = make_reference_free_trainer("ORPO", tmp_path)
    record = reference_free(trainer, batch["chosen_labels"], batch["rejected_labels"], batch)
    completion_nll = get_loss("sft")(record).mean()
    attention = batch["chosen_attention_mask"]
    logps, tokens = scored(trainer.model, batch["chosen_input_ids"], attention, attention == 1)
    whole_nll = -logps.sum() / tokens.sum()
    ours = get_loss("orpo", lambda_coef=trainer.beta)(record).mean()
    theirs = trainer.compute_loss(trainer.model, batch)
    assert not torch.isclose(theirs, ours)
    assert_same(theirs, ours - completion_nll + whole_nll, trainer.model)

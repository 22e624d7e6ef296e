"""Value and gradient against TRL's trainers of unpaired feedback, of triples, and of scores.

As in test_trl.py: TRL's side is the real loss of a real trainer on a batch it collated itself, its mismatched
completions included.
"""

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from tiny_trl import WORDS, assert_same, make_model, make_pairs, make_tokenizer, scored, settings
from trl import KTOConfig, KTOTrainer

from prefopt_losses import LogProbs, UnpairedLogProbs, get_loss


def make_unpaired(rows=6):
    choose = random.Random(3)

    def text(low, high):
        return " ".join(choose.choices(WORDS, k=choose.randint(low, high)))

    columns = {
        "prompt": [text(3, 6) for _ in range(rows)],
        "completion": [" " + text(2, 12) for _ in range(rows)],
        "label": [True, False, True, True, False, True][:rows],
    }
    return Dataset.from_dict(columns)


@pytest.fixture(scope="module", params=["anchored", "clamped"])
def kto(tmp_path_factory, request):
    """With these two models the mean of the mismatched log-ratios is 2.4 nats; swapped, -2.4."""
    seeds = (1, 0) if request.param == "anchored" else (0, 1)
    trainer = KTOTrainer(
        model=make_model(seeds[0]),
        ref_model=make_model(seeds[1]),
        args=KTOConfig(**settings(tmp_path_factory.mktemp("kto"))),
        train_dataset=make_unpaired(),
        processing_class=make_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))

    def both(prefix):
        columns = [batch[f"{prefix}{key}"] for key in ("input_ids", "attention_mask", "completion_mask")]
        policy = scored(trainer.model, *columns)[0]
        with torch.no_grad():
            return policy, scored(trainer.ref_model, *columns)[0]

    def record(mismatched=True):
        (logps, ref_logps), off = both(""), both("KL_") if mismatched else (None, None)
        return UnpairedLogProbs(
            logps, batch["label"].bool(), ref_logps, mismatched_logps=off[0], ref_mismatched_logps=off[1]
        )

    def theirs(loss_type="kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
        trainer.loss_type, trainer.beta = loss_type, beta
        trainer.desirable_weight, trainer.undesirable_weight = desirable_weight, undesirable_weight
        trainer.calculate_KL = loss_type == "kto"
        return trainer.compute_loss(trainer.model, batch)

    return SimpleNamespace(trainer=trainer, record=record, theirs=theirs, anchored=request.param == "anchored")


def test_the_batch_holds_both_labels_and_an_anchor_that_is_clamped_or_not(kto):
    """Else a mistaken sign, side or clamp would hide."""
    record = kto.record()
    assert len(record.desirable.unique()) == 2
    anchor = (record.mismatched_logps - record.ref_mismatched_logps).mean()
    assert anchor > 0.5 if kto.anchored else anchor < -0.5


@pytest.mark.parametrize("weights", [{}, {"desirable_weight": 1.5, "undesirable_weight": 0.25}])
@pytest.mark.parametrize("beta", [0.03, 0.1, 0.7])
def test_kto_trains_as_trls(kto, beta, weights):
    ours = get_loss("kto", beta=beta, **weights).unpaired(kto.record()).mean()
    assert_same(kto.theirs(beta=beta, **weights), ours, kto.trainer.model)


def test_unpaired_apo_zero_trains_as_trls(kto):
    ours = get_loss("apo_zero").unpaired(kto.record(mismatched=False)).mean()
    assert_same(kto.theirs("apo_zero_unpaired"), ours, kto.trainer.model)


def test_the_anchor_matters_unless_it_is_clamped(kto):
    """Control: without it KTO is APO-zero."""
    ours = get_loss("apo_zero").unpaired(kto.record(mismatched=False)).mean()
    assert torch.isclose(kto.theirs(), ours) != kto.anchored


@pytest.fixture(scope="module")
def tpo(tmp_path_factory):
    module = pytest.importorskip("trl.experimental.tpo", exc_type=ImportError)
    triples = make_pairs().add_column("reference", [" " + " ".join(WORDS[i : 2 * i + 3]) for i in range(6)])
    trainer = module.TPOTrainer(
        model=make_model(0),
        args=module.TPOConfig(**settings(tmp_path_factory.mktemp("tpo"))),
        train_dataset=triples,
        processing_class=make_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))

    def record():
        columns = [batch[key] for key in ("input_ids", "attention_mask", "completion_mask")]
        (chosen, rejected, gold), lengths = (each.chunk(3) for each in scored(trainer.model, *columns))
        sides = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        return LogProbs(chosen, rejected, gold_logps=gold, gold_lengths=lengths[2], **sides)

    def theirs(loss_type, beta, alpha, gamma=0.5):
        trainer.loss_type, trainer.beta, trainer.tpo_alpha, trainer.tpo_l_gamma = loss_type, beta, alpha, gamma
        return trainer.compute_loss(trainer.model, batch)

    return SimpleNamespace(trainer=trainer, record=record, theirs=theirs)


@pytest.mark.parametrize(("beta", "alpha"), [(0.01, 1.0), (0.1, 0.05)])
def test_tpo_trains_as_trls(tpo, beta, alpha):
    ours = get_loss("tpo", beta=beta, alpha=alpha)(tpo.record()).mean()
    assert_same(tpo.theirs("sigmoid", beta, alpha), ours, tpo.trainer.model)


@pytest.mark.parametrize(("beta", "alpha", "gamma"), [(0.01, 1.0, 0.5), (2.0, 0.05, 1.6)])
def test_tpo_l_trains_as_trls(tpo, beta, alpha, gamma):
    ours = get_loss("tpo_l", beta=beta, alpha=alpha, gamma=gamma)(tpo.record()).mean()
    assert_same(tpo.theirs("tpo-l", beta, alpha, gamma), ours, tpo.trainer.model)


def test_a_gold_nll_per_sequence_is_not_trls(tpo):
    """Control: gold completions differ in length here."""
    theirs = tpo.theirs("sigmoid", 0.01, 1.0)
    assert not torch.isclose(theirs, get_loss("tpo", normalize="sequence")(tpo.record()).mean())


@pytest.mark.parametrize("beta", [0.001, 0.1])
def test_a_star_po_regresses_as_trls(beta):
    """TRL's A2PO samples its completions; here its own loss is given log-probs, rewards and values."""
    module = pytest.importorskip("trl.experimental.a2po", exc_type=ImportError)
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps, rewards, values = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    logps = (-9 * logps).requires_grad_()
    inputs = {"ref_logps": -9 * ref_logps, "rewards": rewards, "v_star": values}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(beta2=beta),
        _metrics={"train": {"implicit_reward": [], "advantage": []}},
        _get_sequence_logps=lambda *_: logps,
    )
    ids = {"input_ids": None, "attention_mask": None, "logits_to_keep": None}
    theirs = module.A2POTrainer.compute_loss(trainer, None, inputs | ids)
    everything = torch.ones(5, dtype=torch.bool)
    record = UnpairedLogProbs(logps, everything, inputs["ref_logps"], scores=rewards, values=values)
    ours = get_loss("a_star_po", beta=beta).unpaired(record).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(value, logps)[0] for value in (ours, theirs)))

"""The module other people's trainers are given: four tensors in, losses and rewards out, torch only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prefopt_losses import (
    LogProbs,
    Loss,
    LossError,
    Running,
    Score,
    Term,
    TokenWeights,
    convex,
    get_loss,
)
from prefopt_losses.module import PreferenceLoss
from prefopt_losses.terms import FromRecord

BATCH = 5


def tensors(seed=0, dtype=torch.float32):
    """Policy chosen, policy rejected, reference chosen, reference rejected: nats of some ten tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple((-10 * torch.rand(BATCH, generator=generator) - 1).to(dtype) for _ in range(4))


LENGTHS = torch.tensor([3, 7, 9, 12, 4]), torch.tensor([8, 5, 9, 2, 6])


class SomebodysTrainer:
    """A trainer of somebody else's: it knows the signature, calls `.mean()`, and has never heard of us."""

    def __init__(self, policy, reference, loss_fn):
        self.policy, self.reference, self.loss_fn = policy, reference, loss_fn
        self.optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)

    def step(self, chosen, rejected):
        with torch.no_grad():
            ref_chosen, ref_rejected = self.reference(chosen), self.reference(rejected)
        losses, chosen_rewards, rejected_rewards = self.loss_fn(
            self.policy(chosen), self.policy(rejected), ref_chosen, ref_rejected
        )
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.optimizer.step()
        return losses.mean().item(), (chosen_rewards > rejected_rewards).float().mean().item()


class Unigram(nn.Module):
    """One logit per word."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(11))

    def forward(self, tokens):
        return self.logits.log_softmax(-1)[tokens].sum(-1)


def test_a_trainer_that_knows_nothing_of_us_trains_with_exponential():
    torch.manual_seed(0)
    chosen, rejected = torch.randint(0, 8, (16, 6)), torch.randint(3, 11, (16, 6))
    trainer = SomebodysTrainer(Unigram(), Unigram(), PreferenceLoss("exponential", beta=0.2))
    curve = [trainer.step(chosen, rejected) for _ in range(30)]
    assert curve[0] == (1.0, 0.0)  # exp(0), and no completion is ahead of another
    assert curve[-1][0] < 0.5
    assert curve[-1][1] == 1.0


@pytest.mark.parametrize("word", ["exponential", "truncated_quadratic", "savage", "squared"])
def test_a_function_of_gpos_table_goes_by_its_own_name(word):
    assert PreferenceLoss(word, beta=0.3).loss == get_loss(f"gpo_{word}", beta=0.3)


@pytest.mark.parametrize(("word", "ours"), [("sigmoid", "dpo"), ("rso", "hinge")])
def test_names_that_mean_something_else_elsewhere_stay_refused(word, ours):
    with pytest.raises(LossError, match=f'It is called "{ours}" here'):
        PreferenceLoss(word)


def test_it_gives_the_formulas_values_and_rewards():
    lw, ll, rw, rl = tensors()
    rho = (lw - rw) - (ll - rl)
    losses, chosen, rejected = PreferenceLoss("gpo_exponential", beta=0.05)(lw, ll, rw, rl)
    torch.testing.assert_close(losses, torch.exp(-0.05 * rho))
    torch.testing.assert_close(chosen, 0.05 * (lw - rw))
    torch.testing.assert_close(rejected, 0.05 * (ll - rl))


def test_rewards_carry_no_gradient_and_losses_do():
    lw, ll, rw, rl = tensors()
    losses, chosen, rejected = PreferenceLoss("dpo")(lw.requires_grad_(), ll.requires_grad_(), rw, rl)
    assert losses.requires_grad
    assert not chosen.requires_grad
    assert not rejected.requires_grad


def test_no_gradient_reaches_the_reference():
    """One model with its adapter off is scored with gradient by mistake: the policy's must not change."""
    lw, ll, rw, rl = (each.requires_grad_() for each in tensors())
    PreferenceLoss("dpo")(lw, ll, rw, rl)[0].sum().backward()
    assert lw.grad.abs().min() > 0
    assert rw.grad is None
    assert rl.grad is None


def test_mean_is_for_trainers_that_expect_one_number():
    each, total = (PreferenceLoss("dpo", reduction=kind)(*tensors())[0] for kind in ("none", "mean"))
    assert total.shape == ()
    torch.testing.assert_close(total, each.mean())
    with pytest.raises(LossError, match="expected 'none' or 'mean', given 'sum'"):
        PreferenceLoss("dpo", reduction="sum")


def test_a_loss_a_recipe_and_a_name_are_the_same():
    made = get_loss("dpo", beta=0.2) + 0.5 * get_loss("sft")
    for given in (made, [{"name": "dpo", "beta": 0.2}, {"name": "sft", "weight": 0.5}]):
        losses, _, _ = PreferenceLoss(given)(*tensors(), *LENGTHS)
        torch.testing.assert_close(losses, made(LogProbs(*tensors(), *LENGTHS)))
    with pytest.raises(LossError, match=r"beta: a loss brings its own hyper-parameters"):
        PreferenceLoss(made, beta=0.1)
    with pytest.raises(LossError, match=r"expected a name, .* given Linear"):
        PreferenceLoss(nn.Linear(1, 1))


def test_without_lengths_ipo_offers_its_summed_form_which_works():
    with pytest.raises(LossError) as refused:
        PreferenceLoss("ipo")(*tensors())
    assert len(refused.value.problems) == 2
    assert 'PreferenceLoss("ipo", normalize="sum")' in refused.value.problems[0]
    assert PreferenceLoss("ipo", normalize="sum")(*tensors())[0].shape == (BATCH,)
    assert PreferenceLoss("ipo")(*tensors(), *LENGTHS)[0].shape == (BATCH,)


def test_everything_missing_is_said_at_once_in_the_callers_names():
    lw, ll, _, _ = tensors()
    with pytest.raises(LossError) as refused:
        PreferenceLoss("ipo")(lw, ll)
    names = [problem.split(":")[0] for problem in refused.value.problems]
    assert names == ["reference_chosen_logps", "reference_rejected_logps", "chosen_lengths", "rejected_lengths"]


def test_a_loss_without_reference_takes_two_tensors_and_lengths():
    lw, ll, _, _ = tensors()
    losses, chosen, _ = PreferenceLoss("simpo")(lw, ll, chosen_lengths=LENGTHS[0], rejected_lengths=LENGTHS[1])
    torch.testing.assert_close(chosen, 2.0 * lw / LENGTHS[0])
    assert losses.shape == (BATCH,)
    with pytest.raises(LossError, match=r"Pass chosen_lengths=chosen_mask.sum\(-1\)"):
        PreferenceLoss("simpo")(lw, ll)


def test_other_fields_pass_by_keyword_and_typos_do_not():
    soft = PreferenceLoss("dpo", soft_labels=True)
    half = torch.full((BATCH,), 0.5)
    losses, _, _ = soft(*tensors(), preference_probability=half)
    margins = get_loss("dpo").margin(LogProbs(*tensors()))
    torch.testing.assert_close(losses, -0.5 * (margins.sigmoid().log() + (-margins).sigmoid().log()))
    with pytest.raises(LossError, match="preference_probability: dpo reads it"):
        soft(*tensors())
    with pytest.raises(LossError, match=r'Did you mean "chosen_lengths"\?'):
        soft(*tensors(), chosen_length=LENGTHS[0])
    with pytest.raises(LossError, match="hyper-parameters belong to the constructor"):
        soft(*tensors(), beta=0.1)
    with pytest.raises(LossError, match="keeps the loss's running numbers itself"):
        soft(*tensors(), state={})


def test_per_token_log_probs_are_refused_with_the_sum_to_take():
    with pytest.raises(LossError, match=r"\(logps \* mask\).sum\(-1\)"):
        PreferenceLoss("dpo")(*(-torch.rand(4, BATCH, 3)))


def test_nan_is_found_unless_the_look_is_switched_off():
    lw, *others = tensors()
    lw[2] = float("nan")
    with pytest.raises(LossError, match="by row: 2"):
        PreferenceLoss("dpo")(lw, *others)
    assert PreferenceLoss("dpo", check=False)(lw, *others)[0].isnan().sum() == 1


def test_it_compiles_without_a_break():
    for name in ("gpo_exponential", "ipo", "dpo+0.5*sft"):
        module = PreferenceLoss(name)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        for given, expected in zip(compiled(*tensors(), *LENGTHS), module(*tensors(), *LENGTHS)):
            torch.testing.assert_close(given, expected)


def test_sixteen_bit_inputs_under_autocast_are_widened_before_anything_is_subtracted():
    narrow = tensors(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, chosen, _ = PreferenceLoss("gpo_exponential", beta=0.05)(*narrow)
    expected = PreferenceLoss("gpo_exponential", beta=0.05)(*(each.float() for each in narrow))
    assert losses.dtype == chosen.dtype == torch.float32
    torch.testing.assert_close(losses, expected[0])


def test_it_prints_what_it_is_and_what_its_numbers_mean():
    text = repr(PreferenceLoss("gpo_exponential", beta=0.05))
    for part in ("gpo_exponential, beta=0.05", "sum over completion tokens", "policy minus reference", "0.05 per nat"):
        assert part in text


def running_mean():
    """A loss of one's own with a running mean of log-ratios as its shift: 0.9 old + 0.1 new."""

    def update(mean, record):
        return 0.9 * mean + 0.1 * (record.chosen_logps - record.ref_chosen_logps).mean()

    number = Running("mean", start=0.0, reads=("chosen_logps", "ref_chosen_logps"), update=update)
    shift = FromRecord("mean", reads=(), value=lambda record: record.state["mean"], batch=True, running=(number,))
    return Loss("mine", terms=(Term(convex.logistic, Score(), beta=0.1, shift=shift),))


def test_running_numbers_move_in_training_only_and_the_loss_reads_them():
    module = PreferenceLoss(running_mean())
    lw, ll, rw, rl = tensors()
    ratio = (lw - rw).mean()
    losses, _, _ = module(lw, ll, rw, rl)
    assert module.running_mean.item() == pytest.approx(0.1 * ratio.item())
    rho = (lw - rw) - (ll - rl)
    torch.testing.assert_close(losses, -(0.1 * (rho - 0.1 * ratio)).sigmoid().log())
    module.eval()
    module(*tensors(1))
    module.train()
    with torch.no_grad():  # OpenRLHF evaluates without gradients and never calls eval() on its loss
        module(*tensors(1))
    assert module.running_mean.item() == pytest.approx(0.1 * ratio.item())
    module(lw, ll, rw, rl)
    assert module.running_mean.item() == pytest.approx(0.19 * ratio.item())


def test_running_numbers_are_saved_and_loaded_and_survive_backward():
    module = PreferenceLoss(running_mean())
    lw, ll, rw, rl = tensors()
    first, _, _ = module(lw.requires_grad_(), ll, rw, rl)
    second, _, _ = module(lw, ll, rw, rl)
    (first.mean() + second.mean()).backward()
    saved = copy.deepcopy(module.state_dict())
    fresh = PreferenceLoss(running_mean())
    assert fresh.running_mean == 0
    fresh.load_state_dict(saved)
    assert fresh.running_mean == module.running_mean
    assert not list(module.parameters())


@pytest.mark.parametrize("narrow", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.float])
def test_running_numbers_keep_their_digits_when_the_model_around_them_is_narrowed(narrow):
    module = PreferenceLoss("bco")
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), module])
    module.running_bco_count.fill_(2**24 + 1)
    narrow(model)
    assert module.running_bco_count.dtype == torch.float64
    module(*tensors())
    assert module.running_bco_count == 2**24 + 1 + 2 * len(tensors()[0])


def test_losses_without_running_numbers_save_nothing():
    assert not PreferenceLoss("dpo").state_dict()


def test_a_loss_that_samples_tokens_draws_anew_in_every_call_of_training():
    drawn = []

    def weights(at, own, other, draw):
        drawn.append(draw)
        return torch.ones_like(at, dtype=torch.float)

    score = Score(TokenWeights("mine", weights, draws=True), reference=False)
    module = PreferenceLoss(Loss("mine", terms=(Term(convex.logistic, score),)))
    lw, ll, _, _ = tensors()
    tokens = {"chosen_token_logps": -torch.rand(BATCH, 12), "rejected_token_logps": -torch.rand(BATCH, 12)}
    for mode in (True, True, False, True):
        module.train(mode)(lw, ll, chosen_lengths=LENGTHS[0], rejected_lengths=LENGTHS[1], **tokens)
    assert list(dict.fromkeys(drawn)) == [1, 2, 3]
    assert module.state_dict()["draws"] == 3

"""What is logged about a batch ranks by the margin of the loss itself."""

import pytest
import torch

from prefopt_losses import METHODS, LogProbs, accuracies, get_loss, likelihood_displacement, loss_metrics
from prefopt_losses.metrics import logratios_per_token

RECORD = LogProbs(
    chosen_logps=torch.tensor([-12.0, -30.0]),
    rejected_logps=torch.tensor([-20.0, -11.0]),
    ref_chosen_logps=torch.tensor([-10.0, -36.0]),
    ref_rejected_logps=torch.tensor([-14.0, -9.0]),
    chosen_lengths=torch.tensor([2, 60]),
    rejected_lengths=torch.tensor([6, 2]),
)


def test_a_win_counts_one_a_tie_half_a_loss_nothing():
    assert accuracies(torch.tensor([2.0, 0.0, -1e-9])).tolist() == [1.0, 0.5, 0.0]


def test_a_policy_equal_to_its_reference_scores_chance():
    logps = torch.tensor([-3.0, -4.0])
    metrics = loss_metrics(get_loss("dpo"), LogProbs(logps, logps - 1, logps, logps - 1))
    assert metrics["rewards/accuracies"].tolist() == [0.5, 0.5]


def test_displacement_is_both_down_while_the_margin_grows():
    chosen = torch.tensor([-1.0, 1.0, -3.0, -1.0])
    rejected = torch.tensor([-2.0, -2.0, -2.0, 1.0])
    assert likelihood_displacement(chosen, rejected).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_drift_is_per_scored_token():
    drift = logratios_per_token(RECORD.chosen_logps, RECORD.ref_chosen_logps, RECORD.chosen_lengths)
    torch.testing.assert_close(drift, torch.tensor([-1.0, 0.1]))


def test_the_accuracy_of_ipo_is_one_of_means_and_not_of_sums():
    """Log-ratios -2 and -6 over 2 and 6 tokens: by sums the chosen wins, by means it is a tie."""
    assert loss_metrics(get_loss("dpo"), RECORD)["rewards/accuracies"].tolist() == [1.0, 1.0]
    assert loss_metrics(get_loss("ipo"), RECORD)["rewards/accuracies"].tolist() == [0.5, 1.0]


def test_the_keys_are_the_fields():
    metrics = loss_metrics(get_loss("dpo", beta=0.5), RECORD)
    assert metrics["rewards/chosen"].tolist() == [-1.0, 3.0]
    assert metrics["rewards/rejected"].tolist() == [-3.0, -1.0]
    assert metrics["rewards/margins"].tolist() == [2.0, 4.0]
    assert metrics["logps/chosen"].tolist() == [-12.0, -30.0]
    assert metrics["logratios/rejected"].tolist() == [-6.0, -2.0]
    assert metrics["displacement"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_one_value_per_example_without_gradients(name):
    policy = RECORD.chosen_logps.clone().requires_grad_()
    record = LogProbs(**{**vars(RECORD), "chosen_logps": policy})
    for value in loss_metrics(get_loss(name), record).values():
        assert value.shape == (2,)
        assert not value.requires_grad


def test_a_record_of_chosen_completions_alone_has_no_margin():
    record = LogProbs(chosen_logps=RECORD.chosen_logps, chosen_lengths=RECORD.chosen_lengths)
    assert set(loss_metrics(get_loss("sft"), record)) == {"logps/chosen"}

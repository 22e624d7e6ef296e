"""What cannot be right is refused, by the name of the tensor, with its shape and what to do."""

import pytest
import torch

from prefopt_losses import LogProbs, LossError, UnpairedLogProbs, dpo_loss, get_loss, ipo_loss, simpo_loss

B = 3
LOGPS = torch.tensor([-10.0, -20.0, -30.0])
LENGTHS = torch.tensor([5, 8, 9])


def pair(**changes):
    tensors = {"chosen_logps": LOGPS, "rejected_logps": LOGPS - 1, "ref_chosen_logps": LOGPS}
    return LogProbs(**(tensors | {"ref_rejected_logps": LOGPS} | changes))


def test_per_token_log_probs_are_refused_with_the_sum_to_take():
    with pytest.raises(LossError, match=r"rejected_logps: expected shape \(batch,\), given \(3, 7\).*sum\(-1\)"):
        pair(rejected_logps=torch.zeros(B, 7))


def test_every_wrong_tensor_is_named_at_once():
    with pytest.raises(LossError) as caught:
        pair(rejected_logps=torch.zeros(B, 1), ref_chosen_logps=torch.zeros(4), ref_rejected_logps=[1.0])
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
    ]


def test_batches_of_different_size_never_broadcast():
    with pytest.raises(LossError, match=r"expected 3 rows on cpu like chosen_logps, given shape \(1,\)"):
        dpo_loss(LOGPS, LOGPS, LOGPS, torch.zeros(1))


def test_integer_log_probs_are_refused():
    with pytest.raises(LossError, match=r"chosen_logps: expected floating-point.*int64"):
        pair(chosen_logps=torch.tensor([1, 2, 3]))


def test_a_missing_reference_says_which_tensor_and_what_shape():
    record = pair(ref_rejected_logps=None)
    with pytest.raises(LossError, match=r"ref_rejected_logps: dpo needs it.*shape \(3,\): reference log-probs"):
        get_loss("dpo")(record)


def test_missing_lengths_are_all_named():
    with pytest.raises(LossError) as caught:
        get_loss("simpo")(pair())
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "chosen_lengths",
        "rejected_lengths",
    ]
    with pytest.raises(LossError, match="chosen_lengths: ipo needs it"):
        ipo_loss(LOGPS, LOGPS, LOGPS, LOGPS)


def test_tensors_a_loss_does_not_read_may_be_missing():
    assert get_loss("sft")(LogProbs(chosen_logps=LOGPS, chosen_lengths=LENGTHS)).shape == (B,)
    assert simpo_loss(LOGPS, LOGPS, LENGTHS, LENGTHS).shape == (B,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_log_probs_that_are_not_finite_are_refused_with_their_rows(bad):
    chosen = LOGPS.clone()
    chosen[1] = bad
    with pytest.raises(LossError, match=rf"chosen_logps: expected finite.*by row: 1 \({bad}\) of shape \(3,\)"):
        get_loss("dpo")(pair(chosen_logps=chosen))


def test_nan_in_a_tensor_that_is_not_read_is_nobodys_business():
    record = pair(chosen_lengths=LENGTHS, rejected_lengths=LENGTHS, ref_chosen_logps=torch.full((B,), torch.nan))
    assert get_loss("simpo")(record).isfinite().all()


def test_the_look_at_values_can_be_switched_off():
    assert get_loss("dpo")(pair(chosen_logps=LOGPS * torch.nan), check=False).isnan().all()


def test_an_empty_completion_is_refused_before_it_divides_by_zero():
    record = pair(chosen_lengths=torch.tensor([5, 0, 9]), rejected_lengths=LENGTHS)
    with pytest.raises(LossError, match=r"chosen_lengths: expected at least one scored token.*row: 1 \(0\)"):
        get_loss("ipo")(record)


def test_a_soft_label_outside_zero_and_one_is_refused():
    record = pair(preference_probability=torch.tensor([0.5, 1.2, -0.1]))
    with pytest.raises(LossError, match=r"preference_probability.*1 \(1.2\), 2 \(-0.1\)"):
        get_loss("dpo", soft_labels=True)(record)


@pytest.mark.parametrize("tokens", [0, -3.0, torch.ones(3)])
def test_tokens_per_example_is_one_positive_number(tokens):
    with pytest.raises(LossError, match="tokens_per_example"):
        pair(tokens_per_example=tokens)


def test_labels_of_plus_and_minus_one_are_not_taken_for_bools():
    with pytest.raises(LossError, match="labels > 0"):
        UnpairedLogProbs(LOGPS, desirable=torch.tensor([1, -1, 1]))


def test_a_reference_on_another_device_is_named_before_it_is_subtracted():
    with pytest.raises(LossError, match=r"ref_chosen_logps: expected 3 rows on cpu.*on meta"):
        pair(ref_chosen_logps=torch.zeros(B, device="meta"))


def test_lengths_that_are_no_numbers_are_refused_as_lengths():
    lengths = torch.tensor([float("nan"), 8.0, float("inf")])
    with pytest.raises(LossError, match=r"chosen_lengths: expected at least one scored token.*0 \(nan\), 2 \(inf\)"):
        simpo_loss(LOGPS, LOGPS - 1, lengths, LENGTHS)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float16])
def test_lengths_of_any_dtype_count_alike(dtype):
    reference = LOGPS.clone()
    for name in ("r_dpo", "simpo", "sft"):
        long = pair(ref_chosen_logps=reference, chosen_lengths=LENGTHS, rejected_lengths=LENGTHS + 3)
        other = pair(
            ref_chosen_logps=reference, chosen_lengths=LENGTHS.to(dtype), rejected_lengths=(LENGTHS + 3).to(dtype)
        )
        assert torch.equal(get_loss(name)(other), get_loss(name)(long))


def test_an_empty_batch_is_refused():
    empty = LOGPS[:0]
    with pytest.raises(LossError, match=r"^dpo: expected at least 1 example, given 0\. Leave empty batches out\.$"):
        dpo_loss(empty, empty, empty, empty)
    with pytest.raises(LossError, match="at least 2 examples, for sorted margins is taken over the batch, given 1"):
        get_loss("aot")(LogProbs(*[LOGPS[:1]] * 4))

"""What goes through the decoder together changes no log-prob, and padding stays small."""

from __future__ import annotations

import pytest
import torch
from tiny import group, tiny_model
from transformers import AutoConfig

from prefopt.batching import make_batch
from prefopt.forward import Scorer
from prefopt.passes import completions_of, frequency_limits, in_order, padded_passes, tree_passes
from prefopt.probe import plain_logps

LIMIT = 40
SHORT, LONG, STRADDLING = group(10, [9, 5], seed=1), group(38, [12, 9], seed=2), group(30, [25, 4, 20, 3], seed=3)


def long_rotary():
    """A model with one set of frequencies up to 40 tokens and another beyond."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": LIMIT, **factors}
    return tiny_model("phi3", sliding_window=None, original_max_position_embeddings=LIMIT, rope_parameters=rope)


def test_limits_are_those_of_the_configuration():
    assert frequency_limits(long_rotary().config) == (LIMIT,)
    assert frequency_limits(tiny_model("llama").config) == ()
    assert frequency_limits(tiny_model("gemma3_text").config) == ()


@pytest.mark.parametrize("layout", ["shared", "unshared"])
@pytest.mark.parametrize("groups", [[SHORT], [LONG], [SHORT, LONG], [STRADDLING], [LONG, STRADDLING, SHORT]])
def test_a_log_prob_does_not_depend_on_how_long_its_neighbours_are(groups, layout):
    model = long_rotary()
    expected = torch.cat([plain_logps(model, one) for one in groups])
    found = Scorer(model, layout=layout)(make_batch(groups)).sums
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_gradients_of_two_kinds_of_rows_are_those_of_each_alone():
    model, groups = long_rotary(), [LONG, STRADDLING, SHORT]
    weights = torch.linspace(-1, 1, 8)

    def gradients(layout, batches):
        scorer, begin = Scorer(model, layout=layout), 0
        model.zero_grad(set_to_none=True)
        for batch in batches:
            count = len(batch.completion_lengths)
            (scorer(batch).sums * weights[begin : begin + count]).sum().backward()
            begin += count
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradients("shared", [make_batch(groups)])
    alone = gradients("unshared", [make_batch([one]) for one in groups])
    torch.testing.assert_close(whole, alone, rtol=0, atol=2e-5 * float(alone.abs().max()))


def test_a_batch_on_one_side_of_a_limit_is_one_pass_as_it_is():
    batch = make_batch([SHORT, LONG])
    for limits in ((), (10,), (500,)):
        (one,) = tree_passes(batch, limits)
        assert one.input_ids is batch.input_ids
        assert one.scored is None


def test_passes_score_every_token_once():
    batch = make_batch([LONG, STRADDLING, SHORT])
    for passes in (tree_passes(batch, (LIMIT,)), padded_passes(batch), padded_passes(batch, (LIMIT,))):
        assert len(passes) > 1
        assert sorted(torch.cat([one.scored for one in passes]).tolist()) == list(range(len(batch.targets)))
        states = [one.scored[:, None].double() for one in passes]
        assert in_order(states, passes).flatten().tolist() == list(range(len(batch.targets)))


def test_padding_is_a_fifth_of_a_pass_at_most_however_long_one_completion_is():
    batch = make_batch([group(10, [900, 700], seed=1), *(group(5, [8 + n % 40, 3 + n], seed=n) for n in range(60))])
    passes = padded_passes(batch)
    real = sum(one.tokens for one in completions_of(batch))
    assert sum(one.input_ids.numel() for one in passes) <= 1.25 * real
    assert len(passes) < 20


def test_completions_of_like_lengths_are_one_pass():
    assert len(padded_passes(make_batch([group(20, [9, 10, 11], seed=n) for n in range(5)]))) == 1


def test_a_prompt_whose_completions_differ_is_computed_for_both_kinds():
    short, long = sorted(tree_passes(make_batch([STRADDLING]), (LIMIT,)), key=lambda one: len(one.input_ids))
    assert [len(one.input_ids) for one in (short, long)] == [30 + 3 + 2, 30 + 24 + 19]
    assert int(short.position_ids.max()) < LIMIT <= int(long.position_ids.max())


def test_frequencies_by_kind_of_layer_are_found_too():
    config = AutoConfig.for_model("gemma3_text")
    config.rope_parameters = {
        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64},
        "sliding_attention": {"rope_type": "default"},
    }
    assert frequency_limits(config) == (64,)

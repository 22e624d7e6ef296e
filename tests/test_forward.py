"""One row of prompt trees gives the log-probs and gradients of one row per completion."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, UNSHARED, group, tiny_model, unshared

from prefopt.batching import make_batch
from prefopt.data.groups import PromptGroup
from prefopt.errors import ModelError
from prefopt.forward import Scorer, score
from prefopt.layout import choose_layout
from prefopt.probe import plain_logps
from prefopt_losses import workspace

GROUPS = [group(11, [9, 5], seed=1), group(1, [1, 6, 3], seed=2), group(5, [12], seed=3)]


def gradients(scorer, batch, weights):
    scorer.zero_grad(set_to_none=True)
    (scorer(batch).sums * weights).sum().backward()
    return {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_ragged_batch_scores_what_the_model_scores_alone(name):
    model = tiny_model(name)
    expected = torch.cat([plain_logps(model, one) for one in GROUPS])
    result = Scorer(model)(make_batch(GROUPS))
    torch.testing.assert_close(result.sums, expected, rtol=0, atol=2e-4)
    assert result.lengths.tolist() == [9, 5, 1, 6, 3, 12]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_shared_and_unshared_layouts_agree(name):
    model = tiny_model(name)
    batch = make_batch(GROUPS)
    weights = torch.linspace(-1, 1, 6)
    shared = gradients(Scorer(model, layout="shared"), batch, weights)
    rows = gradients(Scorer(model, layout="unshared"), batch, weights)
    ragged = gradients(Scorer(model), make_batch([one for many in GROUPS for one in unshared(many)]), weights)
    assert shared.keys() == rows.keys() == ragged.keys()
    for parameter, grad in shared.items():
        scale = float(rows[parameter].abs().max()) + 1e-6
        torch.testing.assert_close(grad, rows[parameter], rtol=0, atol=2e-5 * max(scale, 1), msg=parameter)
        torch.testing.assert_close(grad, ragged[parameter], rtol=0, atol=2e-5 * max(scale, 1), msg=parameter)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_completion_never_sees_its_neighbours(name):
    scorer = Scorer(tiny_model(name))
    one = group(6, [8, 8, 4], seed=5)
    changed = PromptGroup(one.prompt, ((one.completions[0] + 1) % 50 + 3, *one.completions[1:]), ())
    before, after = scorer(make_batch([one])).sums, scorer(make_batch([changed])).sums
    assert before[0] != after[0]
    torch.testing.assert_close(before[1:], after[1:], rtol=0, atol=0)


def test_a_prompt_is_computed_once_and_no_padding_is():
    batch = make_batch(GROUPS)
    assert batch.tokens == (11 + 8 + 4) + (1 + 0 + 5 + 2) + (5 + 11)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_the_start_up_comparison_takes_the_shared_layout(name):
    choice = choose_layout(Scorer(tiny_model(name)), GROUPS[0])
    assert choice.layout == "shared"
    assert choice.max_difference < 1e-4


@pytest.mark.parametrize("name", UNSHARED)
def test_models_that_cannot_share_fall_back_to_one_row_per_completion(name):
    scorer = Scorer(tiny_model(name))
    choice = choose_layout(scorer, GROUPS[0])
    assert scorer.layout == choice.layout == "unshared"
    assert "shared prompts" in choice.reason or "layers call" in choice.reason
    expected = torch.cat([plain_logps(scorer.language_model, one) for one in GROUPS])
    torch.testing.assert_close(scorer(make_batch(GROUPS)).sums, expected, rtol=0, atol=1e-3)


def test_a_shared_layout_that_cannot_be_right_is_refused_when_asked_for():
    with pytest.raises(ModelError, match=r"model\.attention"):
        choose_layout(Scorer(tiny_model("bloom")), GROUPS[0], wanted="shared")


def test_gradient_checkpointing_changes_nothing():
    model = tiny_model("llama").train()
    scorer = Scorer(model)
    batch, weights = make_batch(GROUPS), torch.linspace(-1, 1, 6)
    plain = gradients(scorer, batch, weights)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients(scorer, batch, weights)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=0, atol=0, msg=name)


def test_a_pass_without_gradient_leaves_no_buffers_behind():
    workspace.free()
    passes = score(Scorer(tiny_model("llama")), [make_batch([group(5, [4, 3])])], precision="fp32")
    next(passes)
    assert workspace._free  # they wait for the next batch
    assert not list(passes)
    assert not workspace._free


def test_a_head_with_bias_is_applied_with_it():
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size)
    torch.nn.init.normal_(model.lm_head.bias)
    expected = plain_logps(model, GROUPS[0])
    torch.testing.assert_close(Scorer(model)(make_batch([GROUPS[0]])).sums, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hyperclovax", {"logits_scaling": 3.0}),  # multiplies by what Granite divides by
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("falcon_h1", {"lm_head_multiplier": 0.4, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                       "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}),
        ("recurrent_gemma", {"logits_soft_cap": 2.0, "num_hidden_layers": 3, "lru_width": 32}),
    ],
)  # fmt: skip
def test_a_factor_or_cap_on_the_logits_is_found_under_its_name(name, changes):
    scorer = Scorer(tiny_model(name, **changes))
    choose_layout(scorer, GROUPS[0])
    expected = torch.cat([plain_logps(scorer.language_model, one) for one in GROUPS])
    torch.testing.assert_close(scorer(make_batch(GROUPS)).sums, expected, rtol=0, atol=1e-3)

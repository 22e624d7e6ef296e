"""The last layer's MLP computes what is read and nothing else, and nobody can tell from the numbers."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, group, tiny_model
from torch import nn

import prefopt.forward
from prefopt.activations import decoder_layers
from prefopt.attention import AttentionPlan
from prefopt.batching import make_batch
from prefopt.forward import Scorer, autocast
from prefopt.last_layer import parts_that_multiply

BATCH = make_batch([group(11, [9, 5], seed=1), group(1, [1, 6, 3], seed=2), group(5, [12], seed=3)])
READ = 1 + 8 + 4 + 1 + 5 + 2 + 1 + 11
"""Of each tree its prompt's last position, and every computed one of its completions."""
SLOPES = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5, -1.0])


def whole(monkeypatch) -> None:
    """Let no scorer made from now on leave anything out."""
    monkeypatch.setattr(prefopt.forward, "read_only_what_predicts", lambda model: None)


def numbers(scorer: Scorer, precision: str = "fp32") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    scorer.zero_grad(set_to_none=True)
    with autocast(torch.device("cpu"), precision):
        sums = scorer(BATCH).sums
    (sums * SLOPES).sum().backward()
    return sums.detach(), {name: p.grad for name, p in scorer.language_model.named_parameters() if p.grad is not None}


def rows_seen(scorer: Scorer, call) -> list[int]:
    """Rows that each linear layer of the last MLP multiplies while something is called."""
    seen = []
    for module in decoder_layers(scorer.language_model)[-1].mlp.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda module, given, output: seen.append(given[0].shape[-2]))
    call()
    return seen


def test_a_plan_reads_the_positions_that_predict_each_once():
    plan = AttentionPlan(BATCH.trees, torch.device("cpu"))
    assert plan.read.tolist() == sorted(set(BATCH.predict_index.tolist()))
    assert (len(plan.read), plan.tokens) == (READ, BATCH.tokens)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_family_has_the_numbers_of_the_whole_row(family, monkeypatch):
    sums, gradients = numbers(Scorer(tiny_model(family)))
    whole(monkeypatch)
    expected, slopes = numbers(Scorer(tiny_model(family)))
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-4)
    assert set(gradients) == set(slopes)
    for name, gradient in slopes.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_family_has_one_attention_and_an_mlp(family):
    attention, others = parts_that_multiply(decoder_layers(tiny_model(family))[-1])
    assert len(attention) == 1
    assert len(others) == (2 if family == "opt" else 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_last_mlp_multiplies_the_rows_that_are_read(precision):
    scorer = Scorer(tiny_model("llama"))
    assert rows_seen(scorer, lambda: numbers(scorer, precision)) == [READ] * 3
    assert BATCH.tokens > READ


def test_what_comes_without_a_plan_is_computed_whole():
    scorer = Scorer(tiny_model("llama"))
    scorer(BATCH)
    ids = BATCH.input_ids[None]
    plain = tiny_model("llama")(input_ids=ids).logits
    scorer.set_layout("unshared")
    torch.testing.assert_close(scorer.language_model(input_ids=ids).logits, plain, rtol=0, atol=1e-5)
    assert set(rows_seen(scorer, lambda: scorer.language_model(input_ids=ids))) == {BATCH.tokens}


def test_a_row_that_is_read_everywhere_stays_as_it_is():
    scorer = Scorer(tiny_model("llama"))
    batch = make_batch([group(1, [7], seed=4)])
    assert rows_seen(scorer, lambda: scorer(batch)) == [batch.tokens] * 3


def test_two_scorers_of_one_model_do_not_disturb_each_other():
    model = tiny_model("gemma2")
    first, second = Scorer(model), Scorer(model)
    (sums, _), (again, _) = numbers(first), numbers(second)
    assert torch.equal(sums, again)
    assert first.language_model is second.language_model
    assert rows_seen(second, lambda: second(BATCH)) == [READ] * 3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_recomputed_layers_find_their_own_row_after_others_went_through():
    other = make_batch([group(7, [4, 9], seed=5)])
    scorer = Scorer(tiny_model("llama")).train()
    _, expected = numbers(scorer)
    scorer.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer.zero_grad(set_to_none=True)
    sums = scorer(BATCH).sums
    scorer(other)
    (sums * SLOPES).sum().backward()
    for name, p in scorer.language_model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_row_that_fails_inside_the_layer_leaves_no_plan_behind():
    scorer = Scorer(tiny_model("llama"))
    mlp = decoder_layers(scorer.language_model)[-1].mlp

    def fails(module, given, output):
        raise ZeroDivisionError

    handle = mlp.act_fn.register_forward_hook(fails)
    with pytest.raises(ZeroDivisionError):
        scorer(BATCH)
    handle.remove()
    hidden = torch.randn(1, BATCH.tokens, 32)
    assert rows_seen(scorer, lambda: mlp(hidden)) == [BATCH.tokens] * 3

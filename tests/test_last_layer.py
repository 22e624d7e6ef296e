"""The last layer computes what is read and nothing else, and nobody can tell from the numbers."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, group, tiny_model
from torch import nn

from prefopt.activations import decoder_layers
from prefopt.adapters import add_lora
from prefopt.attention import AttentionPlan
from prefopt.attention.products import product_attention
from prefopt.batching import RaggedBatch, make_batch
from prefopt.forward import Scorer, autocast
from prefopt.last_layer import parts_that_multiply
from prefopt.layout import LayoutChoice
from prefopt.models import switch_off_dropout
from prefopt.policy import Policy

BATCH = make_batch([group(11, [9, 5], seed=1), group(1, [1, 6, 3], seed=2), group(5, [12], seed=3)])
READ = 1 + 8 + 4 + 1 + 5 + 2 + 1 + 11
"""Of each tree its prompt's last position, and every computed one of its completions."""
SAME_SIZE = make_batch([group(20, [12, 17], seed=5)])
"""As many rows in all, of which others are read."""
SLOPES = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5, -1.0])
WHOLE = ("opt",)
"""Families that are computed whole: the two matrices of its MLP are parts of the layer itself."""


def whole(model) -> Scorer:
    scorer = Scorer(model)
    scorer.last_layer.compute_whole()
    return scorer


def numbers(
    scorer: Scorer, batch: RaggedBatch = BATCH, precision: str = "fp32"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and the gradient of every parameter that has one."""
    scorer.zero_grad(set_to_none=True)
    with autocast(torch.device("cpu"), precision):
        sums = scorer(batch).sums
    (sums * SLOPES[: len(sums)]).sum().backward()
    return sums.detach(), {name: p.grad for name, p in scorer.language_model.named_parameters() if p.grad is not None}


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)
    assert set(found[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def mlp_of(scorer: Scorer) -> nn.Module:
    (mlp,) = parts_that_multiply(decoder_layers(scorer.language_model)[-1])[1]
    return mlp


def rows_seen(scorer: Scorer, call) -> list[int]:
    """Rows that the last layer's parts beside its attention are given while something is called."""
    seen: list[int] = []
    parts = parts_that_multiply(decoder_layers(scorer.language_model)[-1])[1]
    hooks = [part.register_forward_hook(lambda part, given, out: seen.append(given[0].shape[-2])) for part in parts]
    call()
    for hook in hooks:
        hook.remove()
    return seen


def test_a_plan_reads_the_positions_that_predict_each_once():
    plan = AttentionPlan(BATCH.trees, torch.device("cpu"))
    assert plan.read_rows.tolist() == sorted(set(BATCH.predict_index.tolist()))
    assert (len(plan.read_rows), plan.tokens) == (READ, BATCH.tokens)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_family_multiplies_what_is_read_and_has_the_numbers_of_the_whole_row(family):
    scorer = Scorer(tiny_model(family))
    found = []
    rows = rows_seen(scorer, lambda: found.append(numbers(scorer)))
    assert rows == ([BATCH.tokens] * 2 if family in WHOLE else [READ])
    assert_same(found[0], numbers(whole(tiny_model(family))))


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - {"gemma2", "gpt_oss", *WHOLE}))
def test_whole_products_leave_the_attention_of_what_nobody_reads_out(family, recomputed, monkeypatch):
    asked = []

    def noted(*given, only_read, **named):
        asked.append(only_read)
        return product_attention(*given, only_read=only_read, **named)

    monkeypatch.setattr("prefopt.attention.registered.product_attention", noted)
    scorer = Scorer(tiny_model(family)).train()
    switch_off_dropout(scorer.language_model)
    scorer.set_layout("shared", "products")
    if recomputed:
        scorer.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    found = numbers(scorer)
    attending = [False] * (scorer.attention_calls - 1) + [True]
    assert asked[: len(attending)] == attending
    assert asked[len(attending) :] == (attending[::-1] if recomputed else [])
    assert_same(found, numbers(whole(tiny_model(family))))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_in_bf16_too(family):
    found, expected = (numbers(make(tiny_model(family)), precision="bf16") for make in (Scorer, whole))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0.05)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0.05, atol=0.05, msg=name)


def test_an_adapter_inside_the_mlp_gets_the_gradient_of_the_whole_row():
    def adapted(make):
        model = add_lora(tiny_model("llama"), rank=4, alpha=8.0, dropout=0.0, targets="all-linear")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(torch.linspace(-0.3, 0.3, weight.numel()).view_as(weight))
        return make(model)

    scorer = adapted(Scorer)
    found = []
    assert rows_seen(scorer, lambda: found.append(numbers(scorer))) == [READ]
    assert_same(found[0], numbers(adapted(whole)))


def test_what_comes_without_a_plan_is_computed_whole():
    scorer = Scorer(tiny_model("llama"))
    scorer(BATCH)
    ids, plain = BATCH.input_ids[None], tiny_model("llama")
    scorer.set_layout("unshared")
    logits = []
    rows = rows_seen(scorer, lambda: logits.append(scorer.language_model(input_ids=ids).logits))
    assert rows == [BATCH.tokens]
    torch.testing.assert_close(logits[0], plain(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_a_row_that_is_read_everywhere_stays_as_it_is():
    scorer = Scorer(tiny_model("llama"))
    batch = make_batch([group(1, [7], seed=4)])
    assert rows_seen(scorer, lambda: scorer(batch)) == [batch.tokens]


def test_two_scorers_of_one_model_do_not_disturb_each_other():
    model = tiny_model("gemma2")
    Scorer(model)
    second = Scorer(model)
    found = []
    assert rows_seen(second, lambda: found.append(numbers(second))) == [READ]
    assert_same(found[0], numbers(whole(tiny_model("gemma2"))))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_recomputed_layers_find_their_own_row_though_another_of_that_size_went_through(family):
    assert SAME_SIZE.tokens == BATCH.tokens
    expected = numbers(whole(tiny_model(family)))
    scorer = Scorer(tiny_model(family)).train()
    switch_off_dropout(scorer.language_model)
    scorer.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer.zero_grad(set_to_none=True)
    sums = scorer(BATCH).sums
    scorer(SAME_SIZE)
    (sums * SLOPES).sum().backward()
    assert_same((sums.detach(), {name: p.grad for name, p in scorer.language_model.named_parameters()}), expected)
    hidden = torch.randn(1, BATCH.tokens, 32)
    assert rows_seen(scorer, lambda: mlp_of(scorer)(hidden)) == [BATCH.tokens]  # no plan stays behind


def test_what_is_given_more_than_a_row_is_computed_whole():
    """An MLP that reads something else of every position (a router's earlier scores) would read the wrong ones."""
    scorer = Scorer(tiny_model("llama"))
    mlp = mlp_of(scorer)
    plain = mlp.forward
    mlp.forward = lambda hidden, beside=None: plain(hidden)
    rows = []
    mlp.gate_proj.register_forward_hook(lambda module, given, output: rows.append(given[0].shape[-2]))
    hooked = mlp.__class__.__call__

    class Beside(type(mlp)):
        def __call__(self, hidden):
            return hooked(self, hidden, hidden)

    mlp.__class__ = Beside
    scorer(BATCH)
    assert rows == [BATCH.tokens]


def test_experts_that_give_their_rows_without_a_batch_are_put_back():
    scorer = Scorer(tiny_model("llama"))
    mlp = mlp_of(scorer)
    plain = mlp.forward
    mlp.forward = lambda hidden: (plain(hidden)[0], None)
    outputs = []
    mlp.register_forward_hook(lambda module, given, output: outputs.append(output[0].shape) or output[0][None])
    assert torch.equal(scorer(BATCH).sums, Scorer(tiny_model("llama"))(BATCH).sums)
    assert outputs == [(BATCH.tokens, 32)]


def test_compiled_layers_compute_whole_rows(monkeypatch):
    scorer = Scorer(tiny_model("llama"))
    monkeypatch.setattr("prefopt.policy.compile_layers", lambda model, *, recomputed: None)
    policy = Policy(scorer, LayoutChoice("shared", 0.0, ""), 0, 0)
    policy.settle(recomputed=False, compiled=False)
    assert rows_seen(scorer, lambda: scorer(BATCH)) == [READ]
    policy.settle(recomputed=False, compiled=True)
    assert rows_seen(scorer, lambda: scorer(BATCH)) == [BATCH.tokens]


def test_a_stack_that_is_not_all_layers_is_computed_whole():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 3
    scorer = Scorer(model)
    model.config.num_hidden_layers = 2
    assert rows_seen(scorer, lambda: scorer(BATCH)) == [BATCH.tokens]

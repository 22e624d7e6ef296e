"""Head and embedding end with the gradients that autograd would have made, in memory that stays."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import ARCHITECTURES, group, tiny_model
from torch import nn
from world import train

from prefopt.batching import make_batch
from prefopt.forward import Scorer, autocast
from prefopt.kept_gradients import AddingEmbedding, KeptGradients, keeps_gradients, kept_layers

CPU = torch.device("cpu")
MICRO_BATCHES = [[group(5, [4, 3]), group(3, [2, 6], seed=1)], [group(4, [5, 2], seed=2)]]


def gradients(family: str, *, keeps: bool, precision: str = "fp32", steps: int = 1, **sizes) -> dict[str, torch.Tensor]:
    """Gradients of a model after the two micro-batches of each step."""
    scorer = Scorer(tiny_model(family, **sizes))
    if keeps:
        scorer.keep_gradients()
    for _ in range(steps):
        scorer.zero_grad(set_to_none=True)
        if scorer.kept is not None:
            scorer.kept.reset()
        found = after_a_step(scorer, precision)
    return found


def after_a_step(scorer: Scorer, precision: str = "fp32") -> dict[str, torch.Tensor | None]:
    """Gradients by name, after two micro-batches on top of what is there."""
    for groups in MICRO_BATCHES:
        with autocast(CPU, precision):
            scored = scorer(make_batch(groups))
        (scored.sums * torch.linspace(-1, 1, len(scored.sums))).sum().backward()
    return {name: each.grad for name, each in scorer.language_model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_family_has_the_gradients_that_autograd_makes(family, tied):
    expected, found = (gradients(family, keeps=keeps, tie_word_embeddings=tied) for keeps in (False, True))
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_autocast_changes_nothing_but_rounding():
    exact = gradients("llama", keeps=False, tie_word_embeddings=True)["model.embed_tokens.weight"]
    plain, kept = (
        gradients("llama", keeps=keeps, precision="bf16", tie_word_embeddings=True)["model.embed_tokens.weight"]
        for keeps in (False, True)
    )
    assert kept.dtype == torch.float32
    assert 0 < float((kept - exact).norm()) < 1.1 * float((plain - exact).norm())


def test_a_second_step_begins_at_zero_in_the_same_memory():
    once, twice = (gradients("llama", keeps=True, steps=steps) for steps in (1, 2))
    torch.testing.assert_close(twice, once)
    model = tiny_model("llama", tie_word_embeddings=True)
    kept = KeptGradients(model)
    weight = model.get_output_embeddings().weight
    there = kept.of(weight)
    assert weight.grad is there
    weight.grad += 1
    model.zero_grad(set_to_none=True)
    kept.reset()
    assert weight.grad is there
    assert not there.any()
    assert kept.of(model.model.norm.weight) is None


def test_padding_gets_no_gradient_as_with_torchs_own():
    torch.manual_seed(0)
    ids = torch.tensor([[0, 3, 3], [5, 0, 1]])
    weights = []
    for kind in (nn.Embedding, AddingEmbedding):
        layer = nn.Embedding(7, 4, padding_idx=0)
        layer.__class__ = kind
        layer.weight = nn.Parameter(torch.arange(28.0).reshape(7, 4))
        layer.weight.grad = torch.zeros(7, 4)
        (layer(ids) ** 2).sum().backward()
        weights.append(layer.weight.grad)
    torch.testing.assert_close(*weights)
    assert not weights[0][0].any()


def test_layers_that_are_frozen_in_16_bit_or_not_torchs_own_are_left_to_autograd():
    def kinds(model):
        return {type(layer) for layer in kept_layers(model)}

    assert kinds(tiny_model("llama")) == {nn.Linear, nn.Embedding}
    assert kinds(tiny_model("llama").bfloat16()) == set()
    assert kinds(tiny_model("llama").requires_grad_(False)) == set()
    assert len(kinds(tiny_model("gemma3_text"))) == 2  # its embedding scales what torch's looks up
    sparse = tiny_model("llama")
    sparse.model.embed_tokens.sparse = True
    assert kinds(sparse) == {nn.Linear}


@pytest.mark.parametrize("frozen", ["lm_head", "embed_tokens"])
def test_of_a_half_frozen_model_the_other_half_is_kept(frozen):
    found = []
    for keeps in (False, True):
        scorer = Scorer(tiny_model("llama"))
        scorer.language_model.get_parameter(f"{'model.' * (frozen != 'lm_head')}{frozen}.weight").requires_grad_(False)
        if keeps:
            scorer.keep_gradients()
        found.append(after_a_step(scorer))
    plain, kept = found
    assert [name for name, gradient in kept.items() if gradient is None] == [
        name for name, gradient in plain.items() if gradient is None
    ]
    for name, gradient in plain.items():
        torch.testing.assert_close(kept[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_kl_of_whole_distributions_adds_what_autograd_makes_of_it(tied):
    reference = Scorer(tiny_model("llama", seed=1))
    found = []
    for keeps in (False, True):
        scorer = Scorer(tiny_model("llama", tie_word_embeddings=tied))
        if keeps:
            scorer.keep_gradients()
        for groups in MICRO_BATCHES:
            batch = make_batch(groups)
            with torch.no_grad():
                against = reference(batch, distribution=True).distribution
            scored = scorer(batch, against=against)
            (scored.sums - scored.sequential_kl).sum().backward()
        found.append({name: each.grad for name, each in scorer.language_model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_gradients_that_were_taken_away_come_from_autograd():
    plain = gradients("llama", keeps=False, tie_word_embeddings=True)
    scorer = Scorer(tiny_model("llama", tie_word_embeddings=True))
    scorer.keep_gradients()
    scorer.zero_grad(set_to_none=True)
    for name, gradient in after_a_step(scorer).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-5, msg=name)


def test_without_a_gradient_the_embedding_is_torchs_own():
    layer = nn.Embedding(5, 3)
    layer.__class__ = AddingEmbedding
    layer(torch.tensor([1, 2])).sum().backward()
    assert layer.weight.grad[1].tolist() == [1.0, 1.0, 1.0]
    with torch.no_grad():
        assert not layer(torch.tensor([1])).requires_grad


def test_only_one_process_on_a_cpu_keeps_them():
    assert keeps_gradients(device="cpu", processes=1)
    assert not keeps_gradients(device="cuda", processes=1)
    assert not keeps_gradients(device="cpu", processes=2)


def test_a_run_keeps_them_and_trains_as_one_that_does_not(tmp_path, monkeypatch):
    began = []
    begin = KeptGradients.reset
    monkeypatch.setattr(KeptGradients, "reset", lambda kept: (began.append(len(kept._gradients)), begin(kept)))
    fast = {"max_steps": 3, "learning_rate": 1e-2, "warmup": 0}
    kept = train(tmp_path / "kept", train=fast)
    assert began == [2, 2, 2, 2]  # head and embedding, at the start and after each step
    monkeypatch.setattr("prefopt.run.keeps_gradients", lambda **_: False)
    plain = train(tmp_path / "plain", train=fast)
    assert len(began) == 4
    assert abs(plain["train"]["loss"] - math.log(2)) > 0.01  # it moved, or wrong gradients would not be seen
    assert kept["train"]["loss"] == pytest.approx(plain["train"]["loss"], abs=1e-5)

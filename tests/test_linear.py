"""A gradient that the product adds in place is the one that autograd adds up."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import nn
from world import make_recipe, train

from prefopt.activations import decoder_layers
from prefopt.linear import AddingLinear, add_in_place, adding_layers, adds_in_place


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(seed))


def layer(adding: bool, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(24, 40, bias=bias, dtype=dtype)
    if adding:
        made.__class__ = AddingLinear
    return made


def summed(made: nn.Linear, micro_batches: list[torch.Tensor], *, autocast: bool = False) -> list[torch.Tensor]:
    """The gradients of the weights, and of the last input, after all micro-batches."""
    for x in micro_batches:
        x = x.to(made.weight.dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = made(x)
        output.float().square().sum().backward()
    return [output.detach(), x.grad, *(each.grad for each in made.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_over_micro_batches_are_autograds_own(bias, count):
    micro_batches = [rows(number, 2, 5 + number) for number in range(count)]
    expected, found = (summed(layer(adding, bias=bias), micro_batches) for adding in (False, True))
    assert len(found) == 3 + bias
    for one, other in zip(expected, found):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_bf16_they_are_as_near_to_full_precision_as_autograds(dtype):
    """fp32 weights under autocast, and bf16 weights."""
    micro_batches = [rows(number, 64) for number in range(3)]
    exact = summed(layer(adding=False), micro_batches)
    errors = [
        [
            float((each.float() - full).norm() / full.norm())
            for each, full in zip(
                summed(layer(adding, dtype=dtype), micro_batches, autocast=dtype == torch.float32), exact
            )
        ]
        for adding in (False, True)
    ]
    for plain, own in zip(*errors):
        assert own < 1.25 * plain


def test_dtypes_of_outputs_and_gradients_stay():
    for autocast in (False, True):
        expected, found = (summed(layer(adding), [rows(1, 3)] * 2, autocast=autocast) for adding in (False, True))
        assert [each.dtype for each in found] == [each.dtype for each in expected]


def test_the_second_micro_batch_writes_into_the_sum_of_the_first():
    made = layer(adding=True)
    made(rows(1, 3)).sum().backward()
    there = made.weight.grad
    made(rows(2, 3)).sum().backward()
    assert made.weight.grad is there


def test_an_input_that_needs_no_gradient_gets_none_and_frozen_weights_stay_without():
    made = layer(adding=True)
    made(rows(1, 3)).sum().backward()
    assert made.weight.grad is not None
    made.weight.requires_grad_(False)
    made.weight.grad = None
    x = rows(1, 3).requires_grad_()
    made(x).sum().backward()
    assert made.weight.grad is None
    assert x.grad is not None


def test_recomputed_layers_come_to_the_same_gradients():
    expected, found = layer(adding=False), layer(adding=True)
    for made in (expected, found):
        for seed in (1, 2):
            x = rows(seed, 6).requires_grad_()
            torch.utils.checkpoint.checkpoint(made, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(found.weight.grad, expected.weight.grad)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "mixtral"])
def test_a_whole_model_has_the_gradients_that_it_had(family):
    ids = torch.randint(2, 40, (2, 3, 9), generator=torch.Generator().manual_seed(0))
    gradients = []
    for adding in (False, True):
        model = tiny_model(family)
        names = set(model.state_dict())
        if adding:
            add_in_place(model)
            assert any(isinstance(module, AddingLinear) for module in model.modules())
            assert set(model.state_dict()) == names
        for micro in ids:
            model(micro, labels=micro).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_only_trained_linear_layers_of_the_decoder_are_changed():
    model = tiny_model("llama")
    frozen = next(module for module in decoder_layers(model)[0].modules() if isinstance(module, nn.Linear))
    frozen.weight.requires_grad_(False)
    add_in_place(model)
    assert type(frozen) is nn.Linear
    assert type(model.get_output_embeddings()) is nn.Linear
    assert len(adding_layers(model)) == 7 * len(decoder_layers(model)) - 1


def test_where_gradients_go_another_way_they_are_left_to_autograd(tmp_path):
    plain = make_recipe(tmp_path).train
    assert adds_in_place(plain, device="cpu", processes=1)
    assert not adds_in_place(plain, device="cuda", processes=1)
    assert not adds_in_place(plain, device="cpu", processes=2)
    assert not adds_in_place(make_recipe(tmp_path, train={"compile": True}).train, device="cpu", processes=1)


def test_a_run_on_a_cpu_trains_such_layers(tmp_path, monkeypatch):
    changed = []

    def noted(model):
        add_in_place(model)
        changed.append([module for module in model.modules() if isinstance(module, AddingLinear)])

    monkeypatch.setattr("prefopt.policy.add_in_place", noted)
    train(tmp_path, train={"max_steps": 1})
    (layers,) = changed
    assert layers

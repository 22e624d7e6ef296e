"""The adapter's product is peft's own, forward and back, and what it does not know it leaves to peft."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prefopt.lora import LoraLinear, fuse_adapters, hold_bases_in


class Two(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(24, 40, bias=False), nn.Linear(40, 24)

    def forward(self, x):
        return self.other(torch.tanh(self.one(x)))


def adapted(fused: bool, **config: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["one", "other"], "init_lora_weights": False, **config}
    model = get_peft_model(Two(), LoraConfig(**settings))
    if fused:
        fuse_adapters(model)
        assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 2
    return model


def results(model: nn.Module, x: torch.Tensor, *, autocast: bool = False) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    output.float().square().sum().backward()
    return [output.detach(), x.grad, *(each.grad for each in model.parameters() if each.requires_grad)]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_output_and_every_gradient_are_pefts_own(shape):
    expected, found = (results(adapted(fused), tokens(*shape)) for fused in (False, True))
    assert len(found) == 6
    for one, other in zip(expected, found):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_under_bf16_it_is_as_near_to_full_precision_as_peft_is():
    exact = results(adapted(fused=False), tokens(64))
    errors = [
        [float((each.float() - full).norm() / full.norm())
         for each, full in zip(results(adapted(fused), tokens(64), autocast=True), exact)]
        for fused in (False, True)
    ]  # fmt: skip
    for of_peft, own in zip(*errors):
        assert own < 1.25 * of_peft


def test_dtypes_of_outputs_and_gradients_are_pefts_own():
    for autocast in (False, True):
        expected, found = (results(adapted(fused), tokens(3), autocast=autocast) for fused in (False, True))
        assert [each.dtype for each in found] == [each.dtype for each in expected]


@pytest.mark.parametrize("state", ["disabled", "merged", "dropout", "two adapters", "dora", "bias", "mixed dtypes"])
def test_what_it_does_not_know_is_left_to_peft(state):
    config = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(state, {})
    outputs = []
    for fused in (False, True):
        model = adapted(fused, **config)
        if state == "two adapters":
            torch.manual_seed(2)
            model.add_adapter("second", model.peft_config["default"])
            model.base_model.set_adapter(["default", "second"])
        if state == "merged":
            model.merge_adapter()
        if state == "mixed dtypes":
            model.base_model.model.one.base_layer.double()
        torch.manual_seed(3)
        if state == "disabled":
            with model.disable_adapter():
                outputs.append(model(tokens(5)))
        elif state == "mixed dtypes":
            outputs.append(model.base_model.model.one(tokens(5).double()))
        else:
            outputs.append(model(tokens(5)))
    assert torch.equal(*outputs)


def test_a_layer_whose_input_needs_no_gradient_computes_none():
    model = adapted(fused=True)
    model(tokens(5)).sum().backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_layers_are_recomputed_to_the_same_gradients():
    model = adapted(fused=True)
    plain = results(model, tokens(6))
    model.zero_grad()
    x = tokens(6).requires_grad_()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).float().square().sum().backward()
    assert torch.equal(x.grad, plain[1])


def test_bases_held_in_16_bit_give_the_same_numbers_under_autocast():
    expected, model = results(adapted(fused=True), tokens(9), autocast=True), adapted(fused=True)
    hold_bases_in(model, torch.bfloat16)
    frozen = [parameter for name, parameter in model.named_parameters() if "base_layer.weight" in name]
    assert [each.dtype for each in frozen] == [torch.bfloat16] * 2
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
    for one, other in zip(expected, results(model, tokens(9), autocast=True), strict=True):
        assert torch.equal(one, other)
    with model.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        alone = model(tokens(9))
    plain = adapted(fused=True)
    with plain.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(alone, plain(tokens(9)))


def test_a_base_that_is_an_embedding_too_leaves_the_embedding_alone():
    model = adapted(fused=True)
    embedding = nn.Embedding(40, 24)
    model.base_model.model.one.base_layer.weight = embedding.weight.requires_grad_(False)
    hold_bases_in(model, torch.bfloat16)
    assert embedding.weight.dtype == torch.float32


def test_nothing_of_a_mapped_file_stays_behind(tmp_path):
    from safetensors.torch import load_file, save_file

    model = adapted(fused=True)
    save_file({"bias": model.base_model.model.other.base_layer.bias.detach()}, tmp_path / "bias.safetensors")
    mapped = load_file(tmp_path / "bias.safetensors")["bias"]
    model.base_model.model.other.base_layer.bias.data = mapped
    hold_bases_in(model, torch.bfloat16)
    found = model.base_model.model.other.base_layer.bias
    assert found.data_ptr() != mapped.data_ptr()
    assert torch.equal(found, mapped)

"""Linear layers that multiply by another library are torch's own in everything else."""

from __future__ import annotations

import pytest
import torch
from test_activations import some_batch, tiny_scorer
from tiny import tiny_model
from torch import Tensor, nn

import prefopt.linear_layers
from prefopt.activations import decoder_layers
from prefopt.forward import Scorer, autocast
from prefopt.linear_layers import FastLinear, is_plain, multiply_faster
from prefopt_losses import products

CPU = torch.device("cpu")


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let oneDNN be the faster library, for matrices of any size; the right factors that it multiplied."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    calls: list[Tensor] = []
    own = products._by_onednn

    def noted(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(right)
        return own(left, right, bias)

    for room in (products, prefopt.linear_layers):
        monkeypatch.setattr(room, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_by_onednn", noted)
    monkeypatch.setattr(products, "FEWEST_ROWS", 1)
    monkeypatch.setattr(products, "LEAST_WEIGHT", 1)
    return calls


def outcome(name: str, **options: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients of one pass."""
    torch.manual_seed(0)
    scorer = tiny_scorer(name, "fp32", **options)
    sums = scorer(some_batch()).sums
    sums.square().mean().backward()
    return sums.detach(), {name: p.grad for name, p in scorer.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ("llama", "qwen2", "gemma2", "phi3", "gpt_neox", "mixtral")]
    + [("llama", {"lora": True}), ("gemma2", {"recomputed": True})],
)
def test_log_probs_and_gradients_are_those_of_torchs_layers(name, options, onednn, monkeypatch):
    sums, gradients = outcome(name, **options)
    assert onednn
    for room in (products, prefopt.linear_layers):
        monkeypatch.setattr(room, "onednn_is_faster", lambda: False)
    del onednn[:]
    expected, own = outcome(name, **options)
    assert not onednn
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)
    assert gradients.keys() == own.keys()
    for each, gradient in own.items():
        assert (gradients[each] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, each


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_a_batch_of_rows_has_all_its_gradients(bias, onednn):
    torch.manual_seed(0)
    own, given = nn.Linear(8, 6, bias=bias), torch.randn(2, 5, 8)
    fast = nn.Linear(8, 6, bias=bias)
    fast.load_state_dict(own.state_dict())
    multiply_faster([nn.ModuleList([fast])])
    assert type(fast) is FastLinear
    found = []
    for layer in (own, fast):
        x = given.clone().requires_grad_()
        layer(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    assert len(onednn) == 2
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("frozen", "kept"), [(True, {(6, 8)}), (False, {(6, 8), (10, 8)})])
def test_a_frozen_layer_keeps_no_input(frozen, kept, onednn):
    """As torch's own does: what is kept is what a gradient will be made of."""
    layer, x = nn.Linear(8, 6), torch.randn(2, 5, 8, requires_grad=True)
    layer.requires_grad_(not frozen)
    multiply_faster([nn.ModuleList([layer])])
    found = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: found.add(tuple(each.shape)) or each, lambda each: each):
        output = layer(x)
    assert found == kept
    output.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))


def test_a_decoders_layers_are_taken_and_its_head_is_not(onednn):
    model = Scorer(tiny_model("llama")).language_model
    of_layers = [each for layer in decoder_layers(model) for each in layer.modules() if isinstance(each, nn.Linear)]
    assert of_layers
    assert {type(each) for each in of_layers} == {FastLinear}
    assert type(model.get_output_embeddings()) is nn.Linear
    assert all(is_plain(each) for each in [*of_layers, model.get_output_embeddings()])


def test_adapters_keep_their_one_product_over_a_base_that_was_taken(onednn):
    scorer = tiny_scorer("llama", "fp32", lora=True)
    bases = {name: each for name, each in scorer.named_modules() if name.endswith("base_layer")}
    assert {type(each) for each in bases.values()} == {FastLinear}
    scorer(some_batch()).sums.sum().backward()
    weights = {each.weight.data_ptr() for each in bases.values()}
    assert {right.data_ptr() for right in onednn} >= weights


def test_autocast_and_other_dtypes_are_torchs(onednn):
    layer = nn.Linear(8, 6)
    multiply_faster([nn.ModuleList([layer])])
    rows = torch.randn(4, 8)
    with autocast(CPU, "bf16"):
        assert torch.equal(layer(rows), nn.functional.linear(rows, layer.weight, layer.bias))
    assert layer.double()(rows.double()).dtype == torch.float64
    assert not onednn


def test_elsewhere_layers_stay_torchs(monkeypatch):
    monkeypatch.setattr(prefopt.linear_layers, "onednn_is_faster", lambda: False)
    layer = nn.Linear(8, 6)
    multiply_faster([nn.ModuleList([layer])])
    assert type(layer) is nn.Linear

"""Norms and gates keep less, compute the same, and are taken for what they compute."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from test_activations import WIDE, kept_bytes, some_batch, tiny_scorer
from tiny import tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from world import train

import prefopt.forward
from prefopt.adapters import add_lora
from prefopt.errors import ModelError
from prefopt.forward import Scorer, autocast
from prefopt.lean_layers import _Lean, keep_less

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "mixtral"]
WAYS = [(name, {}) for name in FAMILIES] + [("llama", {"lora": True}), ("gemma2", {"recomputed": True})]


def outcome(name: str, precision: str, **options: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs and gradients of one pass."""
    torch.manual_seed(0)
    scorer = tiny_scorer(name, precision, **options)
    assert bool(lean(scorer)) == (prefopt.forward.keep_less is keep_less)
    with autocast(CPU, precision):
        sums = scorer(some_batch()).sums
    sums.square().mean().backward()
    return sums.detach(), {name: p.grad for name, p in scorer.named_parameters() if p.grad is not None}


def as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefopt.forward, "keep_less", lambda model: None)


def lean(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, _Lean)}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("bf16", 2e-2), ("bf16-pure", 5e-2)])
@pytest.mark.parametrize(("name", "options"), WAYS, ids=lambda each: each if isinstance(each, str) else "-".join(each))
def test_log_probs_are_the_same_to_the_bit_and_gradients_up_to_rounding(name, precision, close, options, monkeypatch):
    sums, gradients = outcome(name, precision, **options)
    as_they_are(monkeypatch)
    expected, own = outcome(name, precision, **options)
    assert torch.equal(sums, expected)
    assert gradients.keys() == own.keys()
    for each, gradient in own.items():
        assert (gradients[each] - gradient).norm() <= close * gradient.norm() + 1e-7, each


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_a_norms_gradient_in_16_bit_is_nearer_to_the_exact_one(weights, seed):
    """What transformers' own norm rounds on the way back is not rounded here."""
    torch.manual_seed(seed)
    own = LlamaRMSNorm(64)
    nn.init.normal_(own.weight)
    x, slopes = torch.randn(50, 64).to(weights), torch.randn(50, 64).to(weights)
    own = own.to(weights)
    exact, mine = copy.deepcopy(own).double(), copy.deepcopy(own)
    keep_less(mine)
    assert isinstance(mine, _Lean)

    def gradients(norm: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        given = x.to(dtype).requires_grad_()
        norm(given).backward(slopes.to(dtype))
        return [given.grad.double(), norm.weight.grad.double()]

    truth = gradients(exact, torch.float64)
    for known, here, there in zip(truth, gradients(mine, weights), gradients(own, weights), strict=True):
        assert (here - known).norm() <= 1.1 * (there - known).norm() + 1e-6


def test_a_gates_gradient_is_the_same_to_the_bit():
    torch.manual_seed(0)
    own = tiny_model("llama").model.layers[0].mlp
    mine = copy.deepcopy(own)
    keep_less(mine)
    assert isinstance(mine, _Lean)
    x = torch.randn(7, own.hidden_size)
    for mlp in (own, mine):
        mlp(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(own.parameters(), mine.parameters(), strict=True))


@pytest.mark.parametrize(
    ("precision", "norms", "gate"), [("fp32", 4, 4), ("bf16", 4, 2), ("bf16-pure", 4, 2)], ids=lambda each: str(each)
)
def test_what_is_no_longer_kept(precision, norms, gate, monkeypatch):
    def kept() -> float:
        scorer = tiny_scorer("llama", precision)
        scorer.last_layer.compute_whole()
        return kept_bytes(scorer, some_batch(), precision)

    now = kept()
    as_they_are(monkeypatch)
    layers, hidden, inner = WIDE["num_hidden_layers"], WIDE["hidden_size"], WIDE["intermediate_size"]
    # Of every norm its normalised input (16-bit weights: its input in fp32), of every gate its activation.
    spared = norms * hidden * (2 * layers + 1) + gate * inner * layers
    assert kept() - now == pytest.approx(spared, rel=0.2)


class Centred(LlamaRMSNorm):
    """Has all that an RMS norm has, and subtracts the mean."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Doubled(LlamaMLP):
    """Has all that a gated MLP has, and doubles its output."""

    def forward(self, x):
        return 2 * super().forward(x)


class Clamped(LlamaMLP):
    """A gated MLP until a gate is large, as of DeepSeek V4."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=100.0)) * self.up_proj(x))


class Scaled(LlamaMLP):
    """A gated MLP until its factor learns."""

    def __init__(self, config):
        super().__init__(config)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.factor * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Within(LlamaRMSNorm):
    """An RMS norm until its weights differ: it scales what it norms."""

    def forward(self, x):
        x = x * (1 + self.weight)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def test_what_computes_something_else_stays():
    config = tiny_model("llama").config
    within = Within(32)
    nn.init.zeros_(within.weight)
    others = nn.ModuleList(
        [Centred(32), Doubled(config), Clamped(config), Scaled(config), within, nn.LayerNorm(32), nn.SiLU()]
    )
    keep_less(others)
    assert lean(others) == set()
    assert torch.equal(within.weight, torch.zeros(32))


@pytest.mark.parametrize(
    ("name", "changes"), [("seed_oss", {}), ("llama", {"hidden_act": "xielu"}), ("apertus", {}), ("phi3", {})]
)
def test_a_gate_that_drops_or_learns_or_is_written_otherwise_stays(name, changes):
    model = tiny_model(name, **changes)
    keep_less(model)
    assert not {name for name in lean(model) if name.endswith("mlp")}


def test_a_learning_activation_gets_its_gradient():
    scorer = Scorer(tiny_model("llama", hidden_act="xielu"))
    scorer(some_batch()).sums.sum().backward()
    learning = [p for name, p in scorer.named_parameters() if "act_fn" in name]
    assert learning
    assert all(p.grad is not None and bool(p.grad.abs().sum()) for p in learning)


def test_training_that_computes_something_else_is_refused_before_the_first_update(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.lean_layers._Gate.forward", staticmethod(lambda ctx, gate, up, act: gate * up))
    with pytest.raises(ModelError, match="the same log-probs in training and evaluation mode"):
        train(tmp_path)


def test_layers_without_numbers_stay():
    with torch.device("meta"):
        model = tiny_model("llama")
    keep_less(model)
    assert not {name for name in lean(model) if "norm" in name}


def test_a_layer_that_is_taken_is_still_what_it_was():
    model = tiny_model("qwen3")
    before = list(model.state_dict()), str(model)
    keep_less(model)
    taken = lean(model)
    keep_less(model)
    assert lean(model) == taken
    assert len(taken) == 4 * 2 + 1 + 2  # norms of layers, queries and keys, the last one, and MLPs
    assert (list(model.state_dict()), str(model)) == before


def test_dropout_of_an_adapter_hides_no_gate_and_stays_on():
    model = add_lora(tiny_model("llama"), rank=2, alpha=4.0, dropout=0.5, targets="all-linear").train()
    drawn = torch.get_rng_state()
    keep_less(model)
    assert sum(name.endswith("mlp") for name in lean(model)) == 2
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_nothing_holds_itself():
    scorer = Scorer(tiny_model("llama"))
    told = weakref.ref(scorer.model)
    scorer(some_batch()).sums.sum().backward()
    del scorer
    assert told() is None


def test_a_compiled_layer_decides_for_itself():
    torch.manual_seed(0)
    mlp = tiny_model("llama").model.layers[0].mlp
    x = torch.randn(5, mlp.hidden_size)
    plain = mlp(x)
    keep_less(mlp)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain)

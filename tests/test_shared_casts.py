"""Linear layers that read the same tensor share its 16-bit copy, and nothing else changes."""

from __future__ import annotations

import weakref

import pytest
import torch
from test_activations import kept_bytes, some_batch, tiny_scorer
from tiny import tiny_model
from torch import nn

import prefopt.lora
import prefopt.shared_casts
from prefopt.forward import Scorer, autocast
from prefopt.shared_casts import cast_once

CPU = torch.device("cpu")


def without_sharing(monkeypatch) -> None:
    for module in (prefopt.lora, prefopt.shared_casts):
        monkeypatch.setattr(module, "cast_once", lambda x: x)


def outcome(scorer: nn.Module) -> list[torch.Tensor]:
    """Log-probs and gradients of one bf16 pass."""
    with autocast(CPU, "bf16"):
        sums = scorer(some_batch()).sums
    sums.square().sum().backward()
    return [sums.detach(), *(p.grad for p in scorer.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "mixtral"])
def test_log_probs_and_gradients_are_autocasts_to_the_bit(name, lora, recomputed, monkeypatch):
    torch.manual_seed(0)
    shared = outcome(tiny_scorer(name, "bf16", lora=lora, recomputed=recomputed))
    without_sharing(monkeypatch)
    torch.manual_seed(0)
    own = outcome(tiny_scorer(name, "bf16", lora=lora, recomputed=recomputed))
    assert len(shared) == len(own)
    assert all(torch.equal(one, other) for one, other in zip(shared, own, strict=True))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_three_of_five_copies_are_spared(name, lora, monkeypatch):
    shared = kept_bytes(tiny_scorer(name, "bf16", lora=lora), some_batch(), "bf16")
    without_sharing(monkeypatch)
    scorer = tiny_scorer(name, "bf16", lora=lora)
    config = scorer.language_model.config
    spared = 3 * 2 * config.hidden_size * config.num_hidden_layers
    # The last layer's gate and up read fewer rows: of those they share, all other positions of a prompt are left out.
    assert 0.9 * spared < kept_bytes(scorer, some_batch(), "bf16") - shared <= spared


def test_a_changed_tensor_is_cast_again():
    x = torch.randn(4, 8)
    with autocast(CPU, "bf16"):
        before, again = cast_once(x), cast_once(x)
        assert before.data_ptr() == again.data_ptr()
        x.add_(1)
        assert torch.equal(cast_once(x), x.bfloat16())


def test_a_copy_that_nobody_keeps_is_gone():
    x = torch.randn(4, 8, requires_grad=True)
    with autocast(CPU, "bf16"):
        alive = weakref.ref(cast_once(x))
    assert alive() is None


@pytest.mark.parametrize("x", [torch.randn(2, 3).bfloat16(), torch.randn(2, 3).double(), torch.arange(3)])
def test_what_autocast_leaves_stays(x):
    with autocast(CPU, "bf16"):
        assert cast_once(x) is x
        with torch.no_grad():
            assert cast_once(x.float()).dtype == torch.float32
    assert cast_once(x) is x


def test_gradients_are_added_in_32_bits():
    x = torch.zeros(1, requires_grad=True)
    with autocast(CPU, "bf16"):
        first, second = cast_once(x), cast_once(x)
    (first * 256 + second).backward()
    assert x.grad.item() == 257  # 256 in 16 bits


def test_two_scorers_of_a_model_hook_it_once():
    model = tiny_model("llama")
    Scorer(model), Scorer(model)
    hooks = [len(m._forward_pre_hooks) for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert set(hooks) == {1}

"""The bytes that a decoder is said to keep per token are those that autograd keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import ARCHITECTURES, UNSHARED, group, tiny_model

from prefopt.activations import DecoderShape, _inner_width, activation_bytes, decoder_layers, layer_bytes, shape_of
from prefopt.adapters import add_lora
from prefopt.batching import make_batch
from prefopt.forward import Scorer, autocast
from prefopt.memory_plan import probabilities_kept
from prefopt.models import switch_off_dropout

PROMPT, COMPLETIONS = 20, (12, 15)
WIDE = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 176, "head_dim": 16}
SIZES = {"gpt2": {"n_layer": 4, "n_embd": 64}}


def kept_bytes(scorer, batch, precision) -> float:
    """Bytes per token of what autograd saves: each storage once, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in scorer.parameters()}
    kept: dict[int, torch.Tensor] = {}  # held, so that no address is used twice

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with autocast(torch.device("cpu"), precision), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        scorer(batch)
    sizes = [one.untyped_storage().nbytes() for address, one in kept.items() if address not in weights]
    return sum(sizes) / batch.tokens


def tiny_scorer(name, precision, *, lora=False, recomputed=False):
    model = tiny_model(name, **SIZES.get(name, WIDE))
    switch_off_dropout(model)
    if precision == "bf16-pure":
        model = model.bfloat16()
    adapted = add_lora(model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear") if lora else model
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return Scorer(adapted).train()


def some_batch():
    return make_batch([group(PROMPT, list(COMPLETIONS), seed=seed) for seed in range(20)])


def context() -> float:
    """Tokens that a token attends to, on average over both segments of a tree."""
    first, second = PROMPT + COMPLETIONS[0] - 1, COMPLETIONS[1] - 1
    return (first * first + second * (PROMPT + second)) / (first + second)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_what_is_counted_is_what_autograd_keeps(name, precision, lora):
    scorer = tiny_scorer(name, precision, lora=lora)
    scorer.last_layer.compute_whole()
    measured = kept_bytes(scorer, some_batch(), precision)
    predicted = activation_bytes(shape_of(scorer.language_model), precision, recomputed=False, context=context())
    assert 0.9 * measured < predicted < 1.4 * measured


@pytest.mark.parametrize("limit", [512, 128])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_what_whole_products_keep_is_counted(name, precision, limit, monkeypatch):
    monkeypatch.setattr("prefopt.attention.products.KEPT_KEYS", limit)
    lengths, completions = (100, 70), (60, 40, 30)
    batch = make_batch([group(prompt, list(completions), seed=prompt) for prompt in lengths])
    scorer = tiny_scorer(name, precision)
    scorer.last_layer.compute_whole()
    shape = shape_of(scorer.language_model)
    scorer.set_layout("shared", "products")
    measured = kept_bytes(scorer, batch, precision)
    kept = probabilities_kept([(prompt, [one - 1 for one in completions]) for prompt in lengths])
    without, predicted = (
        activation_bytes(shape, precision, recomputed=False, probabilities=count) for count in (0.0, kept)
    )
    assert 0.9 * measured < predicted < 1.4 * measured
    monkeypatch.setattr("prefopt.attention.products.KEPT_KEYS", 0)
    assert measured - kept_bytes(scorer, batch, precision) == pytest.approx(predicted - without, rel=0.02)


def test_a_tensor_of_queries_keys_and_values_stays_whole_and_a_window_keeps_less():
    scorer = tiny_scorer("phi3", "fp32")
    scorer.last_layer.compute_whole()
    scorer.set_layout("shared", "products")
    kept = probabilities_kept([(PROMPT, [one - 1 for one in COMPLETIONS])])
    predicted = activation_bytes(shape_of(scorer.language_model), "fp32", recomputed=False, probabilities=kept)
    assert 0.9 * kept_bytes(scorer, some_batch(), "fp32") < predicted < 1.2 * kept_bytes(scorer, some_batch(), "fp32")


def test_the_last_mlp_keeps_less_by_the_rows_that_nobody_reads():
    narrow, whole = tiny_scorer("llama", "fp32"), tiny_scorer("llama", "fp32")
    whole.last_layer.compute_whole()
    less = kept_bytes(whole, some_batch(), "fp32") - kept_bytes(narrow, some_batch(), "fp32")
    # Three tensors inside the MLP for every other position of a prompt; not its input, of which a copy is kept.
    inside = 3 * 4 * WIDE["intermediate_size"] * (PROMPT - 1) / some_batch().tokens * 20
    assert 0.8 * inside < less < 1.1 * inside


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_recomputed_layers_keep_a_hidden_state_each(name):
    """The one layer that is recomputed at a time is not there after a forward pass; the rest is."""
    scorer = tiny_scorer(name, "fp32", recomputed=True)
    measured, shape = kept_bytes(scorer, some_batch(), "fp32"), shape_of(scorer.language_model)
    whole = activation_bytes(shape, "fp32", recomputed=True, context=context())
    predicted = whole - layer_bytes(shape, "fp32", context=context())
    assert 0.9 * measured < predicted < 1.5 * measured


@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNSHARED])
def test_every_architecture_has_a_shape_and_layers(name):
    model = tiny_model(name)
    shape = shape_of(model)
    assert shape.layers == len(decoder_layers(model)) == (64 if name == "mamba2" else 2)
    assert shape.hidden == 32
    assert activation_bytes(shape, "bf16", recomputed=False) > activation_bytes(shape, "bf16", recomputed=True) > 0


def test_an_eight_billion_model_keeps_seven_megabytes_a_token_and_half_of_one_recomputed():
    llama = DecoderShape(layers=32, hidden=4096, queries=4096, keys=1024, inner=14336, gated=True)
    kept, again = (activation_bytes(llama, "bf16-pure", recomputed=recomputed) for recomputed in (False, True))
    assert kept / 2**20 == pytest.approx(7, rel=0.2)  # MiB per token
    assert kept / again > 12


def test_layers_of_several_widths_count_as_the_widest():
    shape = SimpleNamespace(intermediate_size=[64, 128], hidden_size=32)
    assert _inner_width(shape) == 128

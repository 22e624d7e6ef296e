"""The token budget is what fits and what is of use, and recomputation only where it is needed."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from tiny import tiny_model
from world import make_recipe, quiet, train

import prefopt.run as run_room
from prefopt.errors import RecipeError
from prefopt.memory_plan import GRAIN, Demand, Rows, demand_of, plan_memory, weights_bytes
from prefopt.models import ModelSource
from prefopt.preflight import check_recipe
from prefopt.train import run_training
from prefopt_losses.head import CPU_TILE_BYTES

GIB = 2**30
SCARCE = int((3 * CPU_TILE_BYTES + 2**20) / 0.6)
"""Free bytes that leave a megabyte for activations on a CPU."""
# Llama 8B with LoRA in 16 bit: the adapter's 40 M parameters, tiles, and MiB of activations.
LORA_8B = Demand(160 * 2**20, 320 * 2**20, 0, 3 * GIB // 2, 0, per_token=7 * 2**20, per_token_recomputed=2**19,
                 useful=65536)  # fmt: skip
ROWS = Rows(longest=3000, step=90_000)


@pytest.fixture
def recipe(tmp_path):
    return lambda **train: make_recipe(tmp_path, train=train)


def planned(recipe, free, *, demand=LORA_8B, rows=ROWS, device="cuda", processes=1):
    return plan_memory(recipe, demand, rows, free=int(free), device=device, processes=processes)


def test_an_h100_takes_all_that_fits_without_recomputing(recipe):
    plan = planned(recipe(), 62 * GIB)  # what 16 GiB of weights leave of 78
    assert not plan.gradient_checkpointing
    assert plan.fits
    assert 7000 < plan.token_budget < 8200
    assert plan.token_budget % GRAIN == 0
    assert "what fits" in plan.reason
    assert "62.0 GiB free" in plan.reason


def test_a_small_card_recomputes_and_says_why(recipe):
    plan = planned(recipe(), 10 * GIB)
    assert plan.gradient_checkpointing
    assert plan.fits
    assert plan.token_budget > 4096
    assert re.search(r"recomputed, for only 1,\d{3} tokens would fit", plan.reason)


def test_a_model_that_cannot_recompute_is_not_asked_to(recipe):
    def plan(**train):
        return plan_memory(recipe(**train), LORA_8B, ROWS, free=10 * GIB, device="cuda", recomputable=False)

    assert not plan().gradient_checkpointing
    assert "which this model cannot recompute" in plan().reason
    with pytest.raises(RecipeError, match=r"train\.gradient_checkpointing: auto or false"):
        plan(gradient_checkpointing=True)


def test_more_than_fills_the_device_is_of_no_use(recipe):
    tiny = replace(LORA_8B, per_token=1000.0, per_token_recomputed=100.0, head=0)
    for device, most in (("cpu", 8192), ("cuda", 65536)):
        plan = planned(recipe(), 70 * GIB, demand=replace(tiny, useful=most), device=device)
        assert plan.token_budget == most
        assert "fills the device" in plan.reason


def useful(recipe, model, *, device="cpu", kept=False, rows=ROWS):
    return demand_of(recipe, model, model, rows, device=device, kept=kept).useful


def test_micro_batches_on_a_cpu_are_as_small_as_costs_little_time(recipe):
    """29 M parameters: what is summed beside the products decides, and what they multiply."""
    model = tiny_model("llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=8, vocab_size=4096)
    whole = useful(recipe(), model)
    assert 512 < whole < 1024
    assert useful(recipe(precision="bf16"), model) == pytest.approx(3 * whole, rel=0.01)
    assert useful(recipe(), model, device="cuda") == 65536
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.model.norm.weight)
    assert 512 <= useful(recipe(), model) < whole  # an adapter has few to sum


def test_small_models_and_large_vocabularies_get_large_ones(recipe):
    assert useful(recipe(), tiny_model("llama"), kept=True) == 8192
    wide = tiny_model("llama", hidden_size=512, intermediate_size=864, num_hidden_layers=4, vocab_size=32_000)
    apart, kept = useful(recipe(), wide), useful(recipe(), wide, kept=True)
    assert apart > 2500  # every further micro-batch makes 131 MB of gradients anew
    assert kept < apart / 3


def test_with_tied_weights_each_use_counts_that_autograd_makes_anew(recipe):
    sizes = {"hidden_size": 512, "intermediate_size": 864, "num_hidden_layers": 4, "vocab_size": 32_000}
    tied = tiny_model("llama", **sizes, tie_word_embeddings=True)
    kept = useful(recipe(), tied, kept=True)
    tied.model.embed_tokens.sparse = True  # left to autograd
    half = useful(recipe(), tied, kept=True)
    assert kept < half < useful(recipe(), tied)
    demand = demand_of(recipe(), tied, tied, ROWS, device="cpu", kept=True)
    assert demand.head == 3 * CPU_TILE_BYTES + 4 * tied.lm_head.weight.numel()


def test_kept_gradients_need_no_sum_of_their_own(recipe):
    model = tiny_model("llama")
    apart, kept = (demand_of(recipe(), model, model, ROWS, device="cpu", kept=kept) for kept in (False, True))
    assert apart.head - kept.head == 4 * model.lm_head.weight.numel()
    assert apart.gradients == kept.gradients


def test_whole_products_ask_for_the_probabilities_that_stay(recipe):
    model, rows = tiny_model("llama"), replace(ROWS, probabilities=100.0)
    plain, more, most = (
        demand_of(recipe(), model, model, each, device="cpu", backend=backend).per_token
        for backend, each in (("sdpa", rows), ("products", rows), ("products", replace(rows, probabilities=200.0)))
    )
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    assert most - more == 4 * heads * layers * 100
    assert plain < more
    # Rows that are too long for products are computed by SDPA, so its need is the least that is planned.
    none = demand_of(recipe(), model, model, replace(rows, probabilities=0.0), device="cpu", backend="products")
    assert none.per_token == plain


def test_a_run_plans_with_the_attention_that_its_policy_has(recipe, monkeypatch):
    asked = []

    def noted(recipe, model, base, rows, **named):
        asked.append((rows, named))
        return demand_of(recipe, model, base, rows, **named)

    monkeypatch.setattr(run_room, "demand_of", noted)
    run_training(recipe(max_steps=1), quiet())
    ((rows, named),) = asked
    assert named["backend"] == "products"
    assert rows.probabilities > 0


def test_a_step_that_fits_whole_is_not_recomputed_for_a_larger_budget(recipe):
    room = LORA_8B.fixed + 1000 * LORA_8B.per_token
    small = planned(recipe(), room / 0.9 + 1, rows=Rows(longest=300, step=900))
    assert not small.gradient_checkpointing
    assert small.token_budget == 768
    assert planned(recipe(), room / 0.9 + 1, rows=Rows(longest=300, step=1100)).gradient_checkpointing


def test_a_comparison_is_never_cut_even_where_it_does_not_fit(recipe):
    plan = planned(recipe(), 3 * GIB, rows=Rows(longest=30_000, step=90_000))
    assert plan.token_budget == 30_000
    assert plan.gradient_checkpointing
    assert not plan.fits
    assert "never cut" in plan.reason


def test_what_the_recipe_fixes_stays(recipe):
    fixed = planned(recipe(token_budget=16_000), 62 * GIB)
    assert (fixed.token_budget, fixed.gradient_checkpointing) == (16_000, True)  # 16,000 need 109 GiB otherwise
    asked = planned(recipe(token_budget=16_000, gradient_checkpointing=False), 62 * GIB)
    assert (asked.token_budget, asked.gradient_checkpointing, asked.fits) == (16_000, False, False)
    assert "as train.gradient_checkpointing says" in asked.reason
    assert planned(recipe(gradient_checkpointing=True), 62 * GIB).token_budget == 65536


def test_processes_share_a_step_instead_of_one_taking_it_all(recipe):
    tiny = replace(LORA_8B, per_token=1000.0, per_token_recomputed=100.0)
    plan = planned(recipe(), 70 * GIB, demand=tiny, rows=Rows(longest=500, step=20_000), processes=4)
    assert 4500 < plan.token_budget <= 5000
    assert "a process's part of a step" in plan.reason


def test_a_few_bytes_more_or_less_change_nothing(recipe):
    free = 62 * GIB
    assert planned(recipe(), free) == replace(planned(recipe(), free + 2**20), reason=planned(recipe(), free).reason)


@pytest.mark.parametrize(("optimizer", "each"), [("adamw", 8), ("adamw_8bit", 2), ("paged_adamw_8bit", 2)])
def test_what_is_allocated_beside_activations_is_counted(recipe, optimizer, each):
    model = tiny_model("llama")
    count = sum(parameter.numel() for parameter in model.parameters())
    demand = demand_of(recipe(optimizer=optimizer), model, model, ROWS, device="cpu", second_model=1000)
    assert (demand.gradients, demand.optimizer, demand.casts) == (4 * count, each * count, 0)
    assert demand.fixed == demand.gradients + demand.optimizer + demand.head + 1000
    twice = demand_of(recipe(optimizer=optimizer), model, model, ROWS, device="cuda", processes=2)
    assert twice.gradients == 8 * count
    assert twice.optimizer == (0 if optimizer.startswith("paged") else each * count)


def test_an_adapter_has_gradients_and_moments_of_its_own_only(recipe):
    model = tiny_model("llama").bfloat16().requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    demand = demand_of(recipe(precision="bf16-pure"), model, model, ROWS, device="cpu")
    assert (demand.gradients, demand.optimizer) == (2 * 32 * 48, 4 * 32 * 48)


def test_autocast_keeps_a_16_bit_copy_of_every_matrix_of_the_layers(recipe):
    model = tiny_model("llama")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    demand = demand_of(recipe(precision="bf16"), model, model, ROWS, device="cpu")
    assert demand.casts == 2 * sum(p.numel() for p in matrices) - 2 * model.model.embed_tokens.weight.numel()


def test_padded_rows_hold_more_tokens_than_are_planned(recipe):
    model, rows = tiny_model("llama"), replace(ROWS, unshared=2.5)
    shared, apart = (demand_of(recipe(), model, model, rows, device="cpu", shared=shared) for shared in (True, False))
    assert apart.per_token == pytest.approx(2.5 * shared.per_token)


def test_a_model_is_weighed_by_its_configuration(tmp_path):
    make_recipe(tmp_path)
    count = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    folder = str(tmp_path / "base")
    assert weights_bytes(ModelSource(folder)) == 4 * count
    assert weights_bytes(ModelSource(folder, dtype=torch.bfloat16)) == 2 * count
    assert weights_bytes(ModelSource(folder, quantization="nf4")) == int(0.6 * count)


def test_a_run_and_its_check_state_the_same_plan(tmp_path, monkeypatch):
    for room in ("prefopt.run", "prefopt.preflight"):
        monkeypatch.setattr(f"{room}.free_memory", lambda device: 160 * 2**20)
    recipe, said = make_recipe(tmp_path, train={"max_steps": 2}), []
    for command in (check_recipe, run_training):
        screen = StringIO()
        command(recipe, Console(file=screen, width=400))
        said.append([line for line in screen.getvalue().splitlines() if line.startswith("memory")])
    assert said[0] == said[1]
    assert "0.2 GiB free" in said[0][0]


def test_little_memory_leads_to_smaller_micro_batches_and_the_same_weights(tmp_path, monkeypatch):
    plenty = train(tmp_path)["train"]
    assert plenty["token_budget"] == 8192
    assert plenty["gradient_checkpointing"] is False
    monkeypatch.setattr(run_room, "free_memory", lambda device: SCARCE)
    scarce = train(tmp_path, output=str(tmp_path / "scarce"))["train"]
    assert scarce["token_budget"] < 512
    assert scarce["memory"].startswith(f"{scarce['token_budget']:,} tokens (")
    assert scarce["loss"] == pytest.approx(plenty["loss"], abs=1e-5)


def test_a_resumed_run_keeps_the_plan_it_began_with(tmp_path, monkeypatch):
    def crash(run, step, *rest):
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_room, "free_memory", lambda device: SCARCE)
    with monkeypatch.context() as patch:
        patch.setattr("prefopt.train._log", crash)
        with pytest.raises(KeyboardInterrupt):
            run_training(make_recipe(tmp_path), quiet())
    monkeypatch.setattr(run_room, "free_memory", lambda device: 64 * GIB)
    assert train(tmp_path)["train"]["token_budget"] < 512

"""Speed changes nothing: what is shared, rounded, recomputed or skipped gives the numbers of the plain way.

`test_forward` says so in fp32 to rounding; here are bf16, the mistakes that the start-up comparison exists for, and
whole runs.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import ARCHITECTURES, MIXTURES, UNSHARED, group, tiny_model
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from world import make_model, make_recipe, train

import prefopt.probe
from prefopt.adapters import add_lora
from prefopt.attention import ARGUMENT, NAME
from prefopt.batching import make_batch
from prefopt.errors import ModelError
from prefopt.forward import TOLERANCE, Scorer, autocast
from prefopt.layout import choose_layout
from prefopt.models import switch_off_dropout
from prefopt.probe import BEYOND, beyond_windows, plain_logps
from prefopt.train import run_training

GROUPS = [group(11, [9, 5], seed=1), group(1, [1, 6, 3], seed=2), group(5, [12], seed=3)]
BATCH = make_batch(GROUPS)
WEIGHTS = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5, -1.0])
"""Slopes of a loss by the six completions' log-probs."""

BF16 = ["bf16", "bf16-pure"]
"""Autocast over fp32 weights; bf16 weights."""


# ---------------------------------------------------------------------------------------------------------- in bf16

# Nats per sqrt(token) between two ways of computing a completion in bf16: 0.018 was the most (gpt_oss, whose plain
# attention rounds its softmax to bf16 and ours does not). The start-up comparison allows models of full size more.
APART = 0.05
# A token whose two best experts are nearly tied goes to another one after rounding. That is no mistake of sharing.
APART_WHERE_TOKENS_ARE_SENT = TOLERANCE[torch.bfloat16]

# Gradients: L2 distance relative to the fp32 gradient, and cosine. Seen: at most 0.047 and 0.9989 (OPT), 0.18 and
# 0.984 where tokens are sent (mixtral), shared and unshared alike; between these two at most 0.018.
FROM_FP32, COSINE = 0.10, 0.995
FROM_FP32_WHERE_TOKENS_ARE_SENT, COSINE_WHERE_TOKENS_ARE_SENT = 0.40, 0.92
BETWEEN_LAYOUTS = 0.04


def in_precision(name: str, precision: str) -> torch.nn.Module:
    return tiny_model(name).bfloat16() if precision == "bf16-pure" else tiny_model(name)


def measured(model, layout: str, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (completions,) and the whole gradient as one vector, in fp32."""
    scorer = Scorer(model, layout=layout)
    scorer.zero_grad(set_to_none=True)
    with autocast(torch.device("cpu"), precision):
        sums = scorer(BATCH).sums
    (sums * WEIGHTS).sum().backward()
    assert sums.dtype == torch.float32
    return sums.detach(), torch.cat([p.grad.flatten().float() for p in scorer.parameters() if p.grad is not None])


def distance(gradient: torch.Tensor, exact: torch.Tensor) -> float:
    return float((gradient - exact).norm() / exact.norm())


@pytest.mark.parametrize("precision", BF16)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_bf16_layouts_differ_by_rounding_and_are_equally_near_the_exact_gradient(name, precision):
    sent = name in MIXTURES
    model = in_precision(name, precision)
    with autocast(torch.device("cpu"), precision):
        plain = torch.cat([plain_logps(model, one) for one in GROUPS])
    _, exact = measured(tiny_model(name), "unshared", "fp32")
    shared, gradient = measured(model, "shared", precision)
    rows, gradient_of_rows = measured(model, "unshared", precision)

    root = BATCH.completion_lengths.sqrt()
    limit = APART_WHERE_TOKENS_ARE_SENT if sent else APART
    assert float(((shared - plain).abs() / root).max()) < limit
    assert float(((rows - plain).abs() / root).max()) < limit
    assert float(((shared - rows).abs() / root).max()) < limit

    off, off_in_rows = distance(gradient, exact), distance(gradient_of_rows, exact)
    assert off < (FROM_FP32_WHERE_TOKENS_ARE_SENT if sent else FROM_FP32)
    assert float(F.cosine_similarity(gradient, exact, dim=0)) > (COSINE_WHERE_TOKENS_ARE_SENT if sent else COSINE)
    if not sent:
        assert off < 1.25 * off_in_rows
        assert distance(gradient, gradient_of_rows) < BETWEEN_LAYOUTS


# ------------------------------------------------------------------------------------------- who sees whom, in fp32


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_asks_for_attention_once(name):
    scorer = Scorer(tiny_model(name))
    scorer(BATCH)
    assert scorer.attention_calls == scorer.language_model.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_gradient_flows_from_a_completion_to_its_neighbours_or_to_another_tree(name):
    """Every row of the batch whose gradient is not exactly zero is one that the completion may read."""
    scorer = Scorer(tiny_model(name))
    embedded = []
    scorer.language_model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1]))
    sums = scorer(BATCH).sums
    (states,) = embedded
    completion = 0
    for tree in BATCH.trees:
        for begin, count in tree.branches:
            readable = {*range(tree.start, tree.start + tree.prompt), *range(begin, begin + count)}
            (gradient,) = torch.autograd.grad(sums[completion], states, retain_graph=True)
            assert set(gradient[0].abs().sum(-1).nonzero().flatten().tolist()) == readable
            completion += 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recomputed_activations_give_the_same_bits(name):
    model = tiny_model(name)
    switch_off_dropout(model.train())
    _, plain = measured(model, "shared", "fp32")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, recomputed = measured(model, "shared", "fp32")
    assert torch.equal(recomputed, plain)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "qwen3_moe"])
def test_an_adapter_gets_the_same_gradient_from_a_shared_prompt(name):
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = add_lora(tiny_model(name), rank=4, alpha=8, dropout=0.0, targets=targets)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(key)))
    (shared, gradient), (rows, gradient_of_rows) = (measured(model, which, "fp32") for which in ("shared", "unshared"))
    torch.testing.assert_close(shared, rows, rtol=0, atol=1e-4)
    assert distance(gradient, gradient_of_rows) < 1e-5


# ------------------------------------------------------------- mistakes, each silent without the start-up comparison


def places(batch) -> SimpleNamespace:
    """Tree, branch (-1 for the prompt), position and row of every token, and the prompt length of its tree."""
    tree, branch, prompt = (torch.full((batch.tokens,), -1) for _ in range(3))
    for number, one in enumerate(batch.trees):
        end = max(begin + count for begin, count in one.branches)
        tree[one.start : end], prompt[one.start : end] = number, one.prompt
        for index, (begin, count) in enumerate(one.branches):
            branch[begin : begin + count] = index
    return SimpleNamespace(
        tree=tree, branch=branch, prompt=prompt, position=batch.position_ids, row=torch.arange(len(tree))
    )


def right(q, k, window):
    seen = (q.tree == k.tree) & ((k.branch == -1) | (k.branch == q.branch)) & (k.position <= q.position)
    return seen & (k.row <= q.row) & (k.position > q.position - window)


def sees_its_neighbour(q, k, window):
    return (q.tree == k.tree) & (k.row <= q.row) & (k.position > q.position - window)


def sees_the_tree_before(q, k, window):
    own_branch = (k.branch == -1) | (k.branch == q.branch) | (q.tree != k.tree)
    return own_branch & (k.row <= q.row) & (k.position > q.position - window)


def window_counts_rows(q, k, window):
    return right(q, k, 10**6) & (k.row > q.row - window)


def no_window(q, k, window):
    return right(q, k, 10**6)


def aligned_to_the_upper_left(q, k, window):
    return right(q, k, window) & ((q.branch < 1) | (k.position <= q.position - q.prompt))


def blind_to_the_prompt(q, k, window):
    return right(q, k, window) & ((q.branch < 1) | (k.branch == q.branch))


def attending(mask, batches):
    """An attention function over the whole row of the last batch, with a mask of (query, key, window)."""

    def attend(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        kwargs[ARGUMENT].calls += 1
        here = vars(places(batches[-1]))
        q = SimpleNamespace(**{name: each[:, None] for name, each in here.items()})
        k = SimpleNamespace(**{name: each[None, :] for name, each in here.items()})
        seen = mask(q, k, sliding_window or 10**6)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None

    return attend


@pytest.fixture
def batches(monkeypatch):
    """The batches that the start-up comparison makes, as it makes them."""
    made = []

    def record(groups):
        made.append(make_batch(groups))
        return made[-1]

    monkeypatch.setattr(prefopt.probe, "make_batch", record)
    return made


def probe(name: str, dtype: torch.dtype):
    return choose_layout(Scorer(tiny_model(name).to(dtype)), group(40, [30, 25], seed=4), dtype=dtype)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "cohere2"])
def test_a_mask_written_out_gives_what_prompt_trees_give(monkeypatch, name):
    found = Scorer(tiny_model(name))(BATCH).sums
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, attending(right, [BATCH]))
    torch.testing.assert_close(Scorer(tiny_model(name))(BATCH).sums, found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("llama", sees_its_neighbour),
        ("llama", sees_the_tree_before),
        ("llama", aligned_to_the_upper_left),
        ("llama", blind_to_the_prompt),
        ("mistral", window_counts_rows),
        ("mistral", no_window),
        ("gemma3_text", window_counts_rows),
        ("gemma3_text", no_window),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_start_up_comparison_finds_a_wrong_mask(monkeypatch, batches, name, mistake, dtype):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, attending(right, batches))
    assert probe(name, dtype).layout == "shared"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, attending(mistake, batches))
    choice = probe(name, dtype)
    assert choice.layout == "unshared"
    assert "differ by" in choice.reason or "move another one's" in choice.reason


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_the_start_up_comparison_finds_positions_that_run_on(monkeypatch, name):
    def running_on(groups):
        batch = make_batch(groups)
        return replace(batch, position_ids=torch.arange(batch.tokens))

    monkeypatch.setattr(prefopt.probe, "make_batch", running_on)
    assert "differ by" in probe(name, torch.float32).reason


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_local_experts": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 28, "shared_expert_intermediate_size": 24}),
        ("phimoe", {}),
        ("doge", {}),
    ],
)
def test_a_window_that_is_in_the_mask_alone_is_found_where_rows_can_be_longer(name, changes, dtype):
    probe = group(40, [30, 25], seed=4)
    for longest, expected in ((100, "shared"), (256, "unshared")):
        model = tiny_model(name, **EXPERTS, **changes, sliding_window=150).to(dtype)
        choice = choose_layout(Scorer(model), probe, dtype=dtype, longest=longest)
        assert choice.layout == expected, choice
    assert "differ by" in choice.reason or "window of 150 tokens in their mask alone" in choice.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_window_that_is_left_over_in_a_configuration_means_nothing(dtype):
    model = tiny_model("llama", sliding_window=64).to(dtype)
    assert choose_layout(Scorer(model), group(40, [30, 25], seed=4), dtype=dtype, longest=256).layout == "shared"


def test_a_probe_is_put_behind_a_prompt_beyond_the_windows_only_where_rows_can_be_so_long():
    model, probe = tiny_model("mistral", sliding_window=150), group(40, [30, 25], seed=4)
    assert beyond_windows(model, probe, 150) is probe
    longer = beyond_windows(model, probe, 2048)
    assert len(longer.prompt) == 150 + BEYOND
    assert longer.prompt[-40:].tolist() == probe.prompt.tolist()
    assert longer.completions == probe.completions
    assert len(beyond_windows(model, probe, 200).prompt) == 200 - 30
    assert beyond_windows(tiny_model("llama"), probe, 2048) is probe


def test_a_leak_that_rounding_would_hide_is_found():
    """A hybrid whose attention is right and whose state runs on from completion to completion, in 16 bit."""
    state = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    model = tiny_model("falcon_h1", mamba_chunk_size=8, **state).to(torch.bfloat16)
    choice = choose_layout(Scorer(model), group(80, [60, 65], seed=99), dtype=torch.bfloat16)
    assert choice.layout == "unshared"
    assert "move another one's log-prob" in choice.reason


def test_rows_that_would_change_an_attention_temperature_are_not_shared():
    model = tiny_model("llama4_text", **EXPERTS, intermediate_size_mlp=48, attention_chunk_size=64)
    choice = choose_layout(Scorer(model), group(80, [60, 65], seed=1), longest=256)
    assert choice.layout == "unshared"
    assert "temperature" in choice.reason


@pytest.mark.parametrize("precision", ["fp32", "bf16-pure"])
def test_what_a_model_does_at_random_and_cannot_be_switched_off_is_refused(tmp_path, precision):
    with pytest.raises(ModelError, match="at random"):
        screen_of(tmp_path, "phimoe", model_changes={**EXPERTS, "router_jitter_noise": 0.3}, precision=precision)


@pytest.mark.parametrize("name", ["kimi_linear"])
def test_a_model_with_a_norm_that_asks_for_more_is_left_as_it_is(name):
    model = tiny_model(name, **EXPERTS)
    assert choose_layout(Scorer(model), group(8, [6, 5], seed=1)).layout == "unshared"


def test_the_start_up_comparison_finds_a_layer_with_an_attention_of_its_own():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.config = type(model.config)(attn_implementation="sdpa")
    choice = choose_layout(Scorer(model), GROUPS[0])
    assert choice.layout == "unshared"
    assert "only 1 of 2 layers" in choice.reason


# -------------------------------------------------------------------------------------------------------- whole runs


def screen_of(folder, architecture: str, model_changes=None, precision="fp32", **changes) -> str:
    """What a run of one step says."""
    make_model(folder / "base", architecture, num_hidden_layers=2, **(model_changes or {}))
    shown = io.StringIO()
    train = {"max_steps": 1, "precision": precision}
    recipe = make_recipe(folder, train=train, eval={"samples": 0}, checkpoint={"every": 1}, **changes)
    run_training(recipe, Console(file=shown, width=400))
    return " ".join(shown.getvalue().split())


REASONS = {
    "bloom": "only 0 of 2 layers call the registered attention function",
    "falcon": "only 0 of 2 layers call the registered attention function",
    "mpt": "only 0 of 2 layers call the registered attention function",
    "stablelm": "shared prompts do not run here",
    "qwen3_next": "only 1 of 2 layers call the registered attention function",
    "mamba2": "only 0 of 2 layers call the registered attention function",
}


@pytest.mark.parametrize("name", UNSHARED)
def test_a_run_says_that_it_falls_back_and_why(tmp_path, name):
    said = screen_of(tmp_path, name)
    assert "layout unshared (" in said
    assert REASONS[name] in said
    assert json.loads((tmp_path / "run" / "result.json").read_text())["train"]["layout"] == "unshared"


def test_a_run_says_that_it_shares(tmp_path):
    assert "layout shared by products (agrees with the model's plain logits" in screen_of(tmp_path, "llama")


KEYS_WITH_BIAS = ("gpt2", "gpt_neox", "opt")
"""Softmax does not feel a bias of keys: its gradient is rounding, and Adam takes that at full length."""
NOT_HERE = ("qwen2",)
"""transformers reads a Qwen 2 tokenizer out of such a folder, whatever was saved there."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("gemma2", "mixtral", "gpt_neox") else pytest.mark.slow)
        for name in ARCHITECTURES
        if name not in NOT_HERE
    ],
)
def test_shared_and_unshared_runs_take_the_same_way(tmp_path, name):
    """What a run of 6 steps moved, compared between the layouts in L2: 1e-4 was the most, 4e-3 with biases of keys."""
    base = make_model(tmp_path / "base", name)
    for layout in ("shared", "unshared"):
        model = {"path": str(base), "attention": layout}
        train(tmp_path, model=model, eval={"samples": 0}, output=str(tmp_path / layout))
    start, shared, rows = (
        torch.cat([weight.flatten() for _, weight in sorted(load_file(folder / "model.safetensors").items())])
        for folder in (base, tmp_path / "shared" / "model", tmp_path / "unshared" / "model")
    )
    assert distance(shared - start, rows - start) < (2e-2 if name in KEYS_WITH_BIAS else 1e-3)


# -------------------------------------------------------------------------------------- what a router's loss asks for


@pytest.mark.parametrize("name", MIXTURES)
def test_a_router_loss_that_would_not_be_added_is_refused(tmp_path, name):
    make_model(tmp_path / "base", name, output_router_logits=True)
    with pytest.raises(ModelError) as refusal:
        train(tmp_path)
    (problem,) = refusal.value.problems
    assert "auxiliary loss" in str(problem)
    assert "output_router_logits" in problem.fix

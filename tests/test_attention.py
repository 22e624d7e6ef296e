"""Every back end of the attention over prompt trees computes what the model computes of each completion alone."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny import group, tiny_model

from prefopt.attention import AttentionPlan, plan
from prefopt.attention.choice import backends
from prefopt.attention.products import _Products, kept_probabilities, product_attention
from prefopt.attention.registered import tree_attention
from prefopt.attention.varlen import gathered_attention, torch_flash
from prefopt.batching import make_batch
from prefopt.errors import ModelError, RecipeError
from prefopt.forward import Scorer
from prefopt.layout import choose_layout
from prefopt.probe import plain_logps
from prefopt.run import _refuse_context_parallelism

GROUPS = [
    group(11, [9, 5], seed=1),
    group(1, [1, 6, 3], seed=2),
    group(5, [12], seed=3),
    group(8, [1, 1, 7, 4], seed=4),
]
CPU = torch.device("cpu")
# Without a soft-cap or sinks, which torch's flash kernel does not know.
FLASH = ["llama", "qwen3", "mistral", "gemma3_text", "cohere2", "phi3", "mixtral", "gpt2", "gpt_neox"]
FLEX = [*FLASH, "gemma2"]


def flash_by_hand(queries, keys, values, query_starts, key_starts, most_queries, most_keys, *, scale, window):
    """Flash attention as its documentation describes it: per segment, lower-right causal, `window` keys back."""
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert most_queries == int(query_starts.diff().max())
    assert most_keys == int(key_starts.diff().max())
    times = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for number in range(len(query_starts) - 1):
        q = queries[query_starts[number] : query_starts[number + 1]]
        k = keys[key_starts[number] : key_starts[number + 1]]
        v = values[key_starts[number] : key_starts[number + 1]]
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        before = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))[None]
        hidden = (before < 0) | (before > window if window >= 0 else torch.zeros_like(before, dtype=torch.bool))
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(parts)


@pytest.fixture
def flash(monkeypatch):
    """Let the variable-length back end run here, on the flash attention above."""
    monkeypatch.setattr("prefopt.attention.registered.DTYPES", (torch.float32,))
    monkeypatch.setattr("prefopt.attention.varlen.torch_flash", lambda: flash_by_hand)


def scores_and_gradients(model, backend):
    scorer = Scorer(model)
    scorer.set_layout("shared", backend)
    sums = scorer(make_batch(GROUPS)).sums
    weights = torch.linspace(-1, 1, len(sums))
    named = dict(model.named_parameters())
    return sums.detach(), dict(zip(named, torch.autograd.grad((sums * weights).sum(), list(named.values()))))


@pytest.mark.parametrize("name", FLASH)
def test_one_variable_length_call_gives_log_probs_and_gradients_of_segments(flash, name):
    model = tiny_model(name)
    expected, slopes = scores_and_gradients(model, "sdpa")
    found, gradients = scores_and_gradients(model, "varlen")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(found, torch.cat([plain_logps(model, one) for one in GROUPS]), rtol=0, atol=2e-4)
    for parameter, slope in slopes.items():
        scale = max(float(slope.abs().max()), 1)
        torch.testing.assert_close(gradients[parameter], slope, rtol=0, atol=2e-5 * scale, msg=parameter)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed_again"])
@pytest.mark.parametrize("name", FLASH)
def test_whole_products_give_log_probs_and_gradients_of_segments(monkeypatch, name, kept):
    monkeypatch.setattr("prefopt.attention.products.BLOCK", 4)  # else no segment here has two blocks
    monkeypatch.setattr("prefopt.attention.products.KEPT_KEYS", 10 if kept else 0)
    model = tiny_model(name)
    expected, slopes = scores_and_gradients(model, "sdpa")
    found, gradients = scores_and_gradients(model, "products")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    for parameter, slope in slopes.items():
        scale = max(float(slope.abs().max()), 1)
        torch.testing.assert_close(gradients[parameter], slope, rtol=0, atol=2e-5 * scale, msg=parameter)


@pytest.mark.parametrize("window", [None, 3, 6, 100])
@pytest.mark.parametrize("only_read", [False, True])
def test_products_attend_as_plain_softmax_does(monkeypatch, window, only_read):
    monkeypatch.setattr("prefopt.attention.products.BLOCK", 4)
    monkeypatch.setattr("prefopt.attention.products.KEPT_KEYS", 9)  # of some blocks the probabilities stay
    batch = make_batch(GROUPS)
    plan = AttentionPlan(batch.trees, CPU)
    sizes = ((4, 8), (2, 8), (2, 6))  # heads, and numbers of each: two queries' heads share one of the keys'
    given = [torch.randn(1, batch.tokens, heads, size, dtype=torch.float64) for heads, size in sizes]
    query, key, value = (each.transpose(1, 2).requires_grad_() for each in given)
    seen = plan.block_mask(window).mask_mod(
        None, None, *torch.meshgrid(*[torch.arange(batch.tokens)] * 2, indexing="ij")
    )
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
    found = product_attention(plan, query, key, value, scaling=0.3, window=window, only_read=only_read)
    read = torch.zeros(batch.tokens, dtype=torch.bool)
    read[plan.read_rows] = True
    weights = torch.randn_like(expected) * (read if only_read else torch.ones_like(read))[None, :, None, None]
    if only_read:
        assert not bool(found[0, ~read].any())
        torch.testing.assert_close(found[0, read], expected[0, read])
    else:
        torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for slope, gradient in zip(slopes, torch.autograd.grad((found * weights).sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("autocast", [False, True])
def test_products_of_16_bit_numbers_are_rounded_at_their_ends_only(autocast):
    """Values of 16 bit decide; queries and keys that were rotated in fp32 stay what they are."""
    plan = AttentionPlan(make_batch(GROUPS).trees, CPU)
    dtypes = (torch.float32, torch.float32, torch.bfloat16) if autocast else (torch.bfloat16,) * 3
    given = [torch.randn(1, 2, plan.tokens, 8).to(dtype).requires_grad_() for dtype in dtypes]
    exact = [each.detach().float().requires_grad_() for each in given]
    weights = torch.randn(1, plan.tokens, 2, 8).bfloat16()
    expected = product_attention(plan, *exact, scaling=None, window=None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = product_attention(plan, *given, scaling=None, window=None)
        slopes = torch.autograd.grad((found * weights).sum(), given)
    assert torch.equal(found, expected.bfloat16())
    for slope, own, full in zip(slopes, given, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert slope.dtype == own.dtype
        # the output was rounded before it went into the gradients
        assert float((slope.float() - full).norm()) < 0.004 * float(full.norm())


@pytest.fixture
def given(monkeypatch):
    """What the products were asked for, call by call."""
    calls = []
    apply = _Products.apply
    monkeypatch.setattr(_Products, "apply", lambda *given: calls.append(given) or apply(*given))
    return calls


def test_products_keep_probabilities_up_to_a_number_of_keys(monkeypatch):
    plan = AttentionPlan(make_batch([group(300, [100, 50])]).trees, CPU)
    query = torch.randn(1, 2, plan.tokens, 4, requires_grad=True)

    def kept(limit: int) -> int:
        monkeypatch.setattr("prefopt.attention.products.KEPT_KEYS", limit)
        output = product_attention(plan, query, query.detach(), query.detach(), scaling=None, window=None)
        held = sum(each.numel() for each in output.grad_fn.saved_tensors if each.ndim == 3)
        assert held == 2 * sum(kept_probabilities(*sizes) for sizes in ((0, 399), (300, 49)))
        return held

    assert kept(10**6) == 2 * (96 * (96 + 192 + 288 + 384) + 15 * 399 + 49 * 349)
    assert kept(348) == 2 * 96 * (96 + 192 + 288)
    assert kept(0) == 0


def test_nothing_is_kept_where_nothing_is_learned(given):
    plan = AttentionPlan(make_batch(GROUPS).trees, CPU)
    query = torch.randn(1, 2, plan.tokens, 4, requires_grad=True)
    product_attention(plan, query, query, query, scaling=None, window=None)
    with torch.no_grad():
        product_attention(plan, query, query, query, scaling=None, window=None)
    product_attention(plan, query.detach(), query.detach(), query.detach(), scaling=None, window=None)
    assert [call[-1] for call in given] == [True, False, False]


def test_what_products_cannot_do_goes_segment_by_segment(monkeypatch):
    batch = make_batch(GROUPS)

    def never(*given, **named):
        raise AssertionError

    monkeypatch.setattr("prefopt.attention.registered.product_attention", never)
    plan = AttentionPlan(batch.trees, CPU, backend="products")
    query = torch.randn(1, 2, batch.tokens, 4)
    for given, named in (
        (query, {"dropout": 0.5}),
        (query, {"softcap": 3.0}),
        (query, {"s_aux": torch.zeros(2)}),
    ):
        output, _ = tree_attention(torch.nn.Identity(), given, given, given, None, prefopt_plan=plan, **named)
        assert output.shape == (1, batch.tokens, 2, 4)
    with pytest.raises(AssertionError):
        tree_attention(torch.nn.Identity(), query, query, query, None, prefopt_plan=plan)
    monkeypatch.setattr("prefopt.attention.registered.MOST_KEYS", plan.most_keys - 1)
    tree_attention(torch.nn.Identity(), query, query, query, None, prefopt_plan=plan)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FLEX)
def test_a_block_mask_gives_the_log_probs_of_segments(name):
    model = tiny_model(name)
    scorer = Scorer(model)
    expected = torch.cat([plain_logps(model, one) for one in GROUPS])
    scorer.set_layout("shared", "flex")
    with torch.no_grad():
        torch.testing.assert_close(scorer(make_batch(GROUPS)).sums, expected, rtol=0, atol=2e-4)


def flex_by_hand(query, key, value, *, score_mod, block_mask, scale, enable_gqa, return_aux):
    """FlexAttention as its documentation describes it, with a gradient and the log-sum-exp on a CPU too."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if score_mod is not None:
        scores = score_mod(scores, None, None, None, None)
    rows = torch.arange(query.shape[2])
    scores = scores.masked_fill(~block_mask.mask_mod(None, None, rows[:, None], rows[None]), -torch.inf)
    return scores.softmax(-1) @ value, SimpleNamespace(lse=scores.logsumexp(-1))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_block_masks_soft_caps_and_sinks_give_log_probs_and_gradients_of_segments(monkeypatch, name):
    monkeypatch.setattr("prefopt.attention.flex._flex", lambda compiled: flex_by_hand)
    model = tiny_model(name)
    expected, slopes = scores_and_gradients(model, "sdpa")
    found, gradients = scores_and_gradients(model, "flex")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    for parameter, slope in slopes.items():
        scale = max(float(slope.abs().max()), 1)
        torch.testing.assert_close(gradients[parameter], slope, rtol=0, atol=2e-5 * scale, msg=parameter)


def test_the_keys_of_a_completion_are_its_prompt_and_itself():
    plan = AttentionPlan(make_batch([group(3, [4, 3, 1]), group(2, [2])]).trees, CPU)
    segments = plan.gathered  # rows: prompt 0-2, completions 3-5, 6-7, none; prompt 8-9, completion 10
    assert segments.keys.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8, 9, 10]
    assert segments.query_starts.tolist() == [0, 6, 8, 11]
    assert segments.key_starts.tolist() == [0, 6, 11, 14]
    assert (segments.most_queries, segments.most_keys) == (6, 6)


def test_what_a_plan_makes_it_makes_once_for_all_layers(flash):
    made = []
    model = tiny_model("llama", num_hidden_layers=3)
    scorer = Scorer(model)
    scorer.set_layout("shared", "varlen")
    with mock.patch.object(plan, "moved", lambda each, device: made.append(each) or each.to(device)):
        scorer(make_batch(GROUPS))
    assert len(made) == 4  # keys, where queries and where keys begin, and the rows that are read
    assert scorer.attention_calls == 3


def test_a_back_end_that_is_wrong_is_passed_over_and_the_run_says_so(flash, monkeypatch):
    def upper_left(queries, *given, window, **named):
        return flash_by_hand(queries, *given, window=0, **named)  # sees nothing but itself

    monkeypatch.setattr("prefopt.attention.varlen.torch_flash", lambda: upper_left)
    monkeypatch.setattr("prefopt.layout.backends", lambda *_, **__: (["varlen", "sdpa"], {}))
    choice = choose_layout(Scorer(tiny_model("llama")), GROUPS[0])
    assert (choice.layout, choice.backend) == ("shared", "sdpa")
    assert "varlen was not taken: shared prompts differ by" in choice.reason


def test_a_right_back_end_is_taken(flash, monkeypatch):
    monkeypatch.setattr("prefopt.layout.backends", lambda *_, **__: (["varlen", "sdpa"], {}))
    scorer = Scorer(tiny_model("llama"))
    assert choose_layout(scorer, GROUPS[0]).backend == scorer.backend == "varlen"


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("llama", torch.float32, ["products", "sdpa"]),
        ("mistral", torch.float32, ["products", "sdpa"]),
        ("llama", torch.bfloat16, ["products", "sdpa"]),
        ("gemma2", torch.float32, ["sdpa"]),
        ("gpt_oss", torch.float32, ["sdpa"]),
    ],
)
def test_a_cpu_tries_what_the_model_can_use_and_says_why_nothing_else(monkeypatch, name, dtype, expected):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    able, reasons = backends(tiny_model(name), dtype)
    assert able == expected
    assert set(reasons) == {"varlen", "flex", "products"} - set(able)


def test_a_cpu_with_tiles_for_16_bit_leaves_16_bit_to_torch(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    assert backends(tiny_model("llama"), torch.float32)[0] == ["products", "sdpa"]
    able, reasons = backends(tiny_model("llama"), torch.bfloat16)
    assert able == ["sdpa"]
    assert "AMX" in reasons["products"]


def test_a_back_end_that_is_asked_for_and_cannot_be_had_is_refused():
    with pytest.raises(ModelError, match=r"model\.attention_backend"):
        choose_layout(Scorer(tiny_model("llama")), GROUPS[0], backend="varlen")


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("llama", torch.bfloat16, ["varlen", "flex", "sdpa"]),
        ("llama", torch.float32, ["flex", "sdpa"]),
        ("gemma2", torch.bfloat16, ["flex", "sdpa"]),
        ("gpt_oss", torch.bfloat16, ["flex", "sdpa"]),
        ("mistral", torch.float16, ["varlen", "flex", "sdpa"]),
    ],
)
def test_an_accelerator_tries_what_the_model_can_use(name, dtype, expected):
    own = tiny_model(name)
    model = SimpleNamespace(device=torch.device("cuda"), config=own.config, named_parameters=own.named_parameters)
    assert backends(model, dtype)[0] == expected


def test_torchs_kernel_has_the_arguments_that_are_given_to_it():
    from torch.nn.attention.varlen import varlen_attn

    known = list(inspect.signature(varlen_attn).parameters)
    assert known[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "scale" in known
    assert "window_size" in known or "is_causal" in known
    assert callable(torch_flash())


@pytest.mark.parametrize("way", ["CP", "SP"])
def test_context_parallelism_is_refused_with_the_reason(way):
    with pytest.raises(RecipeError, match="replaces all masks"):
        _refuse_context_parallelism(
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", f"PARALLELISM_CONFIG_{way}_SIZE": "2"}
        )
    _refuse_context_parallelism({f"PARALLELISM_CONFIG_{way}_SIZE": "2"})
    _refuse_context_parallelism({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", f"PARALLELISM_CONFIG_{way}_SIZE": "1"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", [None, 7])
def test_flash_attention_on_the_device_is_the_one_by_hand_forward_and_back(window, size):
    torch.manual_seed(0)
    trees, device = make_batch(GROUPS).trees, torch.device("cuda")
    rows = sum(AttentionPlan(trees, CPU).sizes)
    given = [torch.randn(1, heads, rows, size).bfloat16() for heads in (4, 2, 2)]
    slopes = torch.randn(1, rows, 4, size).bfloat16()

    def outcome(plan: AttentionPlan, moved: list[torch.Tensor], **kernel) -> list[torch.Tensor]:
        own = [each.requires_grad_() for each in moved]
        found = gathered_attention(plan, *own, scaling=None, window=window, **kernel)
        found.backward(slopes.to(found))
        return [each.float().cpu() for each in (found.detach(), *(each.grad for each in own))]

    expected = outcome(AttentionPlan(trees, CPU), [each.float() for each in given], flash=flash_by_hand)
    found = outcome(AttentionPlan(trees, device), [each.to(device) for each in given])
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0.03)
    for here, there in zip(found, expected, strict=True):
        assert (here - there).norm() <= 0.02 * there.norm()


def test_a_model_that_drops_keyword_arguments_is_named_as_such():
    layer = torch.nn.Identity()
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="do not hand the model's keyword arguments on"):
        tree_attention(layer, query, query, query, None)

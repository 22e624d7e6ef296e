"""fp32 products are the same by either library, and each gets what it is faster at."""

from __future__ import annotations

from itertools import product as every

import pytest
import torch
from torch import Tensor

from prefopt_losses import products
from prefopt_losses.logps import token_logps_from_hidden
from prefopt_losses.products import FEWEST_ROWS, LEAST_WEIGHT, SLAB, linear, matmul, matmul_into, onednn_is_faster

INNER, COLUMNS = 512, LEAST_WEIGHT // 512
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let oneDNN be the faster library, whatever this CPU is; what it multiplied, as (rows, inner, columns)."""
    calls: list[tuple[int, ...]] = []
    own = products._by_onednn

    def noted(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append((*left.shape, right.shape[1]))
        return own(left, right, bias)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_by_onednn", noted)
    return calls


def random(*shape: int, transposed: bool = False) -> Tensor:
    made = torch.randn(shape[::-1] if transposed else shape)
    return made.t() if transposed else made


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_the_exact_one_up_to_rounding_whatever_the_right_factors_layout(onednn, transposed):
    torch.manual_seed(0)
    left, right = random(FEWEST_ROWS, INNER), random(INNER, COLUMNS, transposed=transposed)
    exact = left.double() @ right.double()
    out = torch.empty(FEWEST_ROWS, COLUMNS)
    matmul_into(out, left, right)
    for found in (matmul(left, right), out, products.product(left, right)):
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    assert len(onednn) == 3


@needs_onednn
def test_many_columns_are_written_slab_by_slab_into_memory_that_is_there(onednn):
    columns = 2 * SLAB + 3
    left, weight = random(FEWEST_ROWS, 32), random(columns, 32)
    out = torch.empty(FEWEST_ROWS, columns)
    matmul_into(out, left, weight.t())
    torch.testing.assert_close(out, left @ weight.t(), rtol=1e-5, atol=1e-4)
    assert len(onednn) == 3
    assert max(columns for _, _, columns in onednn) <= SLAB


@needs_onednn
def test_a_bias_is_added(onednn):
    rows, weight, bias = random(FEWEST_ROWS, INNER), random(COLUMNS, INNER), random(COLUMNS)
    expected = torch.nn.functional.linear(rows, weight, bias)
    torch.testing.assert_close(linear(rows, weight, bias), expected, rtol=1e-5, atol=1e-4)
    assert onednn


NOT_FOR_ONEDNN = {
    "few rows": (random(FEWEST_ROWS - 1, INNER), random(INNER, COLUMNS)),
    "a small weight": (random(FEWEST_ROWS, INNER), random(INNER, COLUMNS - 1)),
    "a left factor that is transposed": (random(FEWEST_ROWS, INNER, transposed=True), random(INNER, COLUMNS)),
    "a right factor with holes": (random(FEWEST_ROWS, INNER), random(INNER, 2 * COLUMNS)[:, ::2]),
    "fp64": (random(FEWEST_ROWS, INNER).double(), random(INNER, COLUMNS).double()),
    "16 bit": (random(FEWEST_ROWS, INNER).bfloat16(), random(INNER, COLUMNS).bfloat16()),
    "what autograd follows": (random(FEWEST_ROWS, INNER).requires_grad_(), random(INNER, COLUMNS)),
}


@pytest.mark.parametrize("name", NOT_FOR_ONEDNN)
def test_everything_else_is_torchs(name, onednn):
    left, right = NOT_FOR_ONEDNN[name]
    assert torch.equal(matmul(left, right), left @ right)
    out = torch.empty(len(left), right.shape[1], dtype=left.dtype)
    with torch.no_grad():
        if name != "what autograd follows":
            matmul_into(out, left, right)
            assert torch.equal(out, left @ right)
    assert not onednn


def test_who_switches_onednn_off_gets_none_of_it(onednn):
    with torch.backends.mkldnn.flags(enabled=False):
        matmul(random(FEWEST_ROWS, INNER), random(INNER, COLUMNS))
    assert not onednn


@pytest.mark.parametrize(
    ("capability", "mkl", "amd", "expected"),
    [("AVX512", True, True, True), ("AVX2", True, True, False), ("AVX512", False, True, False),
     ("AVX512", True, False, False)],
)  # fmt: skip
def test_onednn_is_for_amds_cpus_with_avx512_where_torch_has_mkl(capability, mkl, amd, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"sse4a": amd}, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", object(), raising=False)
    assert onednn_is_faster.__wrapped__() is expected


@needs_onednn
@pytest.mark.parametrize(("frozen", "bias"), every([True, False], [True, False]))
def test_a_heads_log_probs_and_gradients_are_the_same_by_either_library(frozen, bias, onednn, monkeypatch):
    torch.manual_seed(0)
    hidden, targets = torch.randn(150, 64), torch.randint(LEAST_WEIGHT // 64, (150,))
    weight, shift = torch.randn(LEAST_WEIGHT // 64, 64) / 8, torch.randn(LEAST_WEIGHT // 64)

    def outcome() -> list[Tensor | None]:
        given = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        added = shift.clone().requires_grad_(not frozen) if bias else None
        logps = token_logps_from_hidden(given[0], given[1], targets, bias=added, chunk_size=70)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        return [logps.detach(), *(each.grad for each in given), None if added is None else added.grad]

    by_onednn = outcome()
    assert onednn
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    for here, there in zip(by_onednn, outcome(), strict=True):
        assert (here is None) == (there is None)
        if here is not None:
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)

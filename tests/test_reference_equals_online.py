"""A cached reference is the online one, for every architecture, precision and quantization; and so are its margins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import ARCHITECTURES, UNSHARED
from world import make_model, make_pairs, make_recipe, quiet

from prefopt.forward import TOLERANCE, compute_dtype
from prefopt.invariant import step_zero
from prefopt.prepare import prepare, reference_source
from prefopt.probe import probe_group
from prefopt.reference.opening import cached_reference, reference_in_memory


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with pairs and, made when asked for, one model of each architecture."""
    folder = tmp_path_factory.mktemp("architectures")
    make_pairs(folder / "pairs.jsonl", 12)
    return folder


def world_prepared(world):
    """The data in the tokens of one model: some architectures bring a tokenizer class that does not know our words."""
    return prepare(make_recipe(world, data={"eval_fraction": 0}), quiet=True)


def log_ratios(world, architecture, precision, quantization):
    """Online minus cached, computed in batches of other sizes and orders."""
    model = world / architecture
    if not model.exists():
        make_model(model, architecture)
    recipe = make_recipe(
        world,
        model=str(model),
        data={"eval_fraction": 0},
        train={"precision": precision},
        reference={"quantization": quantization, "token_budget": 40},
    )
    prepared = replace(world_prepared(world), recipe=recipe)
    reference = cached_reference(prepared, quiet())
    train = prepared.data.train
    with reference_in_memory(reference_source(recipe), recipe, probe_group(train)) as online:
        return step_zero(online, train, reference.logps["train"], precision=precision)


def assert_equal(found, precision):
    limit = TOLERANCE[compute_dtype(precision)]
    assert len(found.logratios) == 24
    assert found.per_root_token <= limit
    both = np.sqrt(found.lengths[0::2]) + np.sqrt(found.lengths[1::2])
    assert (np.abs(found.margins) <= limit * both.max()).all()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *UNSHARED])
def test_cached_is_online(world, architecture):
    assert_equal(log_ratios(world, architecture, "fp32", "none"), "fp32")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "bloom"])  # mamba2 takes its time in bf16: below
@pytest.mark.parametrize(("precision", "quantization"), [("bf16", "nf4")])
def test_cached_is_online_in_4_bits(world, architecture, precision, quantization):
    assert_equal(log_ratios(world, architecture, precision, quantization), precision)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *UNSHARED])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp4"])
def test_cached_is_online_in_every_combination(world, architecture, precision, quantization):
    assert_equal(log_ratios(world, architecture, precision, quantization), precision)


def test_another_reference_would_be_noticed(world):
    """The tolerance is far below what any quantization does to these models."""
    exact = log_ratios(world, "llama", "fp32", "none")
    make_model(world / "other", "llama", seed=1)
    recipe = make_recipe(world, model=str(world / "other"), data={"eval_fraction": 0})
    prepared = prepare(recipe, quiet=True)
    train = prepared.data.train
    cached = cached_reference(prepared, quiet()).logps["train"]
    llama = make_recipe(world, model=str(world / "llama"), data={"eval_fraction": 0})
    with reference_in_memory(reference_source(llama), llama, probe_group(train)) as online:
        found = step_zero(online, train, cached, precision="fp32")
    assert found.per_root_token > 100 * max(exact.per_root_token, TOLERANCE[compute_dtype("fp32")])

"""Every loss of TRL's DPOTrainer has a method here that names it."""

import re

import pytest

pytest.importorskip("trl")

from trl import DPOConfig

from prefopt_losses import METHODS

DPO = {
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
}


def named(trainer):
    said = [method.trl for method in METHODS.values()]
    return {each.split(": ")[1].split(",")[0] for each in said if each.startswith(f"{trainer}: ")}


def test_all_fifteen_are_named():
    assert named("DPO") == DPO
    undocumented = {name for name in DPO if not re.search(rf"\b{name}\b", DPOConfig.__doc__)}
    assert not undocumented


def test_its_other_offline_trainers_are_named():
    assert {"sigmoid", "simpo", "alphapo"} <= named("CPO")
    assert {"kto"} <= named("KTO")
    assert {"sigmoid", "tpo-l"} <= named("TPO")
    assert "ORPO" in {method.trl for method in METHODS.values()}

"""Between two logs a step asks the device for nothing: an accelerator would be waited for at every answer.

There is no accelerator here, so two steps run on the CPU as they would on one (no look for NaN), and everything is
counted that reads a tensor's value into Python or needs one to know a shape.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from world import make_pairs, make_recipe, quiet

import prefopt.gradients as gradients_room
import prefopt.train as loop
from prefopt.planning import Step
from prefopt.train import run_training
from prefopt_losses import logps

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,  # item, float, int, bool, index
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.equal.default,
    aten.bincount.default,
}


class Counter(TorchDispatchMode):
    """Notes the operations whose results Python or an allocation waits for."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = function is aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")
        if function in WAITS or by_mask or repeats:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def as_on_an_accelerator(monkeypatch):
    """Count in every optimizer step, with what a CPU looks at on the way switched off."""
    found: list[str] = []
    monkeypatch.setattr(gradients_room, "looks_at_once", lambda run: False)
    monkeypatch.setattr(loop, "looks_at_once", lambda run: False)
    monkeypatch.setattr(logps, "answers_at_once", lambda device: False)
    take = loop._optimizer_step

    def counted(run, plan: Step, rate, sums):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "numpy", "cpu"):  # these read memory without a call that a mode sees
                plain = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda self, *a, _p=plain, _n=name: found.append(_n) or _p(self, *a))
            with Counter() as counter:
                norm = take(run, plan, rate, sums)
        found.extend(counter.found)
        return norm

    monkeypatch.setattr(loop, "_optimizer_step", counted)
    return found


def test_the_counter_sees_what_waits(monkeypatch):
    values = torch.arange(4.0)
    for read in (
        lambda: values.sum().item(),
        lambda: float(values[0]),
        lambda: bool(values.any()),
        lambda: int(values.max()),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: values.repeat_interleave(torch.tensor([1, 2, 3, 4])),
    ):
        with Counter() as counter:
            read()
        assert counter.found


LOSSES = [
    *("dpo", "ipo", "orpo", "kto", "bco", "beta_dpo", "aot", "plackett_luce_dpo", "sft"),
    *("tdpo2", "sampo", "ld_dpo"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("budget", ["auto", 60])
def test_two_steps_ask_the_device_for_nothing(tmp_path, monkeypatch, loss, budget):
    found = as_on_an_accelerator(monkeypatch)
    settings = {"max_steps": 2, "batch_size": 8, "token_budget": budget}
    recipe = make_recipe(tmp_path, loss=loss, train=settings, eval={"samples": 0, "every": 2})
    run_training(recipe, quiet())
    assert not found


def test_labels_ask_for_nothing_either(tmp_path, monkeypatch):
    make_pairs(tmp_path / "pairs.jsonl", 80, unpaired=True)
    found = as_on_an_accelerator(monkeypatch)
    run_training(make_recipe(tmp_path, loss="kto", train={"max_steps": 2}, eval={"samples": 0, "every": 2}), quiet())
    assert not found


IN_MEMORY = [
    {"adapter": {"rank": 4}, "reference": {"cache": "off"}},
    {"reference": {"cache": "off"}},
    {"train": {"precision": "bf16", "gradient_checkpointing": True, "max_steps": 2}},
]


@pytest.mark.parametrize("changes", IN_MEMORY, ids=str)
def test_references_in_memory_and_recomputed_layers_ask_for_nothing(tmp_path, monkeypatch, changes):
    found = as_on_an_accelerator(monkeypatch)
    run_training(
        make_recipe(tmp_path, **{"train": {"max_steps": 2}, "eval": {"samples": 0, "every": 2}, **changes}), quiet()
    )
    assert not found


@pytest.mark.parametrize("adapter", [None, {"rank": 4, "dropout": 0.1}])
def test_one_row_per_completion_asks_for_nothing_but_what_transformers_asks(tmp_path, monkeypatch, adapter):
    """It looks for packed rows wherever no mask is given, and at the mask where one is: once a pass."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    found = as_on_an_accelerator(monkeypatch)
    changes = {"train": {"max_steps": 2}, "eval": {"samples": 0, "every": 2}, "adapter": adapter}
    recipe = make_recipe(tmp_path, **changes)
    alone = recipe.model.model_copy(update={"attention": "unshared"})
    run_training(recipe.model_copy(update={"model": alone}), quiet())
    assert not found

"""The policy of a run: its model with adapter, layout and memory choices, ready to be trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from prefopt.acceleration import compile_layers
from prefopt.adapters import MOVING, add_lora, keep_frozen, load_adapter
from prefopt.forward import Scorer
from prefopt.layout import LayoutChoice, settle_layout
from prefopt.models import load_model, switch_off_dropout
from prefopt.prepare import adapter_source, policy_source
from prefopt.probe import ProbeText
from prefopt.recipe import Recipe


@dataclass(frozen=True)
class Policy:
    """A scorer to train, and what was decided about it."""

    scorer: Scorer
    layout: LayoutChoice
    trainable: int
    """Parameters that move."""
    total: int
    """Parameters in all."""

    def settle(self, *, recomputed: bool, compiled: bool) -> None:
        """Do as planned: recompute layers in the backward pass, compile them.

        Raises:
            RecipeError: this machine cannot compile.
        """
        if recomputed:
            self._recompute_activations()
        if compiled:
            self.scorer.last_layer.compute_whole()  # how many rows are read would be another program for every batch
            compile_layers(self.scorer.language_model, recomputed=recomputed)

    def _recompute_activations(self) -> None:
        model = self.scorer.language_model
        if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.20
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()


def load_policy(recipe: Recipe, probe: ProbeText) -> Policy:
    """Load the policy as the recipe says: full or with an adapter, dropout off, layout compared.

    Raises:
        ModelError: it cannot be loaded, or no layout gives its own log-probs.
    """
    base = load_model(policy_source(recipe))
    if not recipe.train.dropout:
        switch_off_dropout(base)
    model = _adapted(base, recipe)
    scorer = Scorer(model).train()
    if recipe.model.kernels:  # in training mode, for kernels without a backward pass are not taken then
        base.set_use_kernels(True)
    layout = settle_layout(scorer, recipe, probe)
    if recipe.adapter is not None and recipe.train.precision == "bf16":
        from prefopt.lora import hold_bases_in  # peft, which only adapters need

        hold_bases_in(model, torch.bfloat16)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Policy(scorer, layout, trainable, sum(p.numel() for p in model.parameters()))


def _adapted(base: PreTrainedModel, recipe: Recipe) -> nn.Module:
    """Put the recipe's adapter on the base: a fresh one, or the one that training goes on from."""
    adapter = recipe.adapter
    if adapter is None:
        return base
    pretrained = adapter_source(recipe)
    if pretrained is not None:
        model = load_adapter(base, pretrained, trainable=True, dropout=adapter.dropout)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            model = add_lora(
                base, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, targets=adapter.targets
            )
    if recipe.reference.sync is not None:  # before a checkpoint replaces it: the moving reference starts where we do
        keep_frozen(model, MOVING)
    return model

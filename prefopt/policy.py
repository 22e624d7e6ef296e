"""The policy of a run: its model with adapter, layout and memory choices, ready to be trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from prefopt.adapters import MOVING, add_lora, keep_frozen, load_adapter
from prefopt.data.groups import PromptGroup
from prefopt.forward import Scorer
from prefopt.layout import LayoutChoice, settle_layout
from prefopt.models import load_model, switch_off_dropout
from prefopt.prepare import adapter_source, policy_source
from prefopt.recipe import Recipe

ACTIVATION_BYTES = 34
"""Bytes per token, layer and hidden unit that a decoder layer keeps for its backward pass, in 16 bit."""


@dataclass(frozen=True)
class Policy:
    """A scorer to train, and what was decided about it."""

    scorer: Scorer
    layout: LayoutChoice
    trainable: int
    """Parameters that move."""
    total: int
    """Parameters in all."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""


def load_policy(recipe: Recipe, probe: PromptGroup, *, token_budget: int) -> Policy:
    """Load the policy as the recipe says: full or with an adapter, dropout off, layout compared.

    Raises:
        ModelError: it cannot be loaded, or no layout gives its own log-probs.
    """
    base = load_model(policy_source(recipe))
    if not recipe.train.dropout:
        switch_off_dropout(base)
    model = _adapted(base, recipe)
    scorer = Scorer(model)
    layout = settle_layout(scorer, recipe, probe)
    checkpointing = _wants_checkpointing(recipe, base, token_budget)
    if checkpointing:
        _recompute_activations(base)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Policy(scorer.train(), layout, trainable, sum(p.numel() for p in model.parameters()), checkpointing)


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


def _recompute_activations(model: PreTrainedModel) -> None:
    """Switch gradient checkpointing on, under the name that this version of transformers gives it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()


def _wants_checkpointing(recipe: Recipe, model: PreTrainedModel, token_budget: int) -> bool:
    """Follow the recipe; `auto` recomputes only where the budget's activations would not fit the accelerator."""
    if recipe.train.gradient_checkpointing != "auto":
        return bool(recipe.train.gradient_checkpointing)
    if not torch.cuda.is_available():
        return False
    config = model.config.get_text_config()
    activations = ACTIVATION_BYTES * config.hidden_size * config.num_hidden_layers * token_budget
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = 0 if recipe.adapter is not None else 12 * parameters
    free, _ = torch.cuda.mem_get_info()
    return activations + optimizer > 0.8 * free

"""AdamW, fused; or its 8-bit and paged forms by bitsandbytes."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from prefopt.errors import Problem, RecipeError
from prefopt.quantization import import_bitsandbytes
from prefopt.recipe import TrainRecipe

VALUE_LEARNING_RATE = 1e-3
"""Peak learning rate of a value head: it starts at zero and is linear, so it may move as fast as Adam's usual rate,
while a policy's would leave it where it is."""


def make_optimizer(model: nn.Module, settings: TrainRecipe) -> torch.optim.Optimizer:
    """Make the recipe's optimizer over the trainable parameters; biases and norms do not decay.

    Raises:
        RecipeError: bitsandbytes' optimizers do not run on this machine.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    values = [named.pop(name) for name in list(named) if name.startswith("value_head.")]
    trainable = list(named.values())
    groups = [
        {
            "params": [parameter for parameter in trainable if parameter.ndim > 1],
            "weight_decay": settings.optimizer.weight_decay,
        },
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
        {"params": values, "weight_decay": 0.0, "faster": VALUE_LEARNING_RATE / settings.learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.optimizer.betas,
        "eps": settings.optimizer.eps,
    }
    if settings.optimizer.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **arguments)
    names = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
    try:
        import_bitsandbytes()
        optimizers = importlib.import_module("bitsandbytes.optim")
        return getattr(optimizers, names[settings.optimizer.name])(groups, **arguments)
    except (ImportError, RuntimeError, NotImplementedError) as error:
        raise RecipeError(
            Problem("train.optimizer", "an optimizer that runs on this machine",
                    f"{settings.optimizer.name}: {error}", "train.optimizer=adamw")
        ) from error  # fmt: skip

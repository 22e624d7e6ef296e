"""AdamW, fused; or its 8-bit and paged forms by bitsandbytes."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from prefopt.errors import Problem, RecipeError
from prefopt.models import import_bitsandbytes
from prefopt.recipe import TrainRecipe


def make_optimizer(model: nn.Module, settings: TrainRecipe) -> torch.optim.Optimizer:
    """Make the recipe's optimizer over the trainable parameters; biases and norms do not decay.

    Raises:
        RecipeError: bitsandbytes' optimizers do not run on this machine.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in trainable if parameter.ndim > 1],
            "weight_decay": settings.optimizer.weight_decay,
        },
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
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

"""`prefopt export`: a run's model as one plain folder, its adapter merged, in the dtype asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from prefopt.errors import ModelError, Problem
from prefopt.models import (
    DTYPES,
    ModelSource,
    load_model,
    load_tokenizer,
    mend_generation_settings,
    quiet_transformers,
)
from prefopt.prepare import policy_source, with_sandbox
from prefopt.quantization import ready_for_peft
from prefopt.recipe import Recipe, load_recipe
from prefopt.run_folder import RECIPE


def export_run(
    folder: Path, *, output: Path | None = None, dtype: str | None = None, push_to_hub: str | None = None
) -> Path:
    """Write a run's final model as plain weights.

    Args:
        folder: the run folder.
        output: where to; None is ``RUN/export``.
        dtype: float32, bfloat16 or float16; None keeps what was trained.
        push_to_hub: ``owner/name`` of a hub repository to push to as well.

    Raises:
        ModelError: the run has no model yet.
    """
    model_folder = folder / "model"
    if not model_folder.is_dir():
        raise ModelError(Problem(str(folder), "a finished run with model/", "no model/ in it",
                                 f"finish it: prefopt train {folder / RECIPE}"))  # fmt: skip
    target = output or folder / "export"
    recipe = with_sandbox(load_recipe(str(folder / RECIPE), check_files=False), quiet=True)
    if recipe.adapter is not None:
        merge_adapter(recipe, model_folder, target, dtype=dtype)
    else:
        source = ModelSource(str(model_folder), dtype=DTYPES[dtype or _saved_dtype(model_folder)])
        model = load_model(source)
        mend_generation_settings(model)
        with quiet_transformers():
            model.save_pretrained(target)
    tokenizer = load_tokenizer(ModelSource(str(model_folder)))
    tokenizer.save_pretrained(target)
    card = model_folder / "README.md"
    if card.exists():
        (target / "README.md").write_text(card.read_text(encoding="utf-8"), encoding="utf-8")
    if push_to_hub is not None:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=target)
    return target


def _saved_dtype(folder: Path) -> str:
    return str(AutoConfig.from_pretrained(folder).dtype or torch.float32).removeprefix("torch.")


def merge_adapter(recipe: Recipe, adapter: Path, target: Path, *, dtype: str | None) -> None:
    """Merge an adapter into the unquantized base model and save the result with its tokenizer.

    Merging into 4-bit weights would round the update away, so the base is always loaded in full precision. An adapter
    on the head alone, or on the embedding alone, ends what ties the two.
    """
    ready_for_peft()
    from peft import PeftConfig, PeftModel

    trained_in = policy_source(recipe).dtype
    base = load_model(ModelSource(recipe.model.path, recipe.model.revision, DTYPES[dtype] if dtype else trained_in))
    settings = PeftConfig.from_pretrained(str(adapter))
    if reaches_tied_weights(base, settings):
        untie(base)
    with quiet_transformers():
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        mend_generation_settings(merged)
        merged.save_pretrained(target)
    load_tokenizer(ModelSource(str(adapter))).save_pretrained(target)


def reaches_tied_weights(base: PreTrainedModel, settings: Any) -> bool:
    """Whether an adapter changes the head or the embedding of a model whose weights they share."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    targets = settings.target_modules or ()
    names = {name for name, module in base.named_modules() if module in (head, embedding)}
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in names)
    return any(name == target or name.endswith(f".{target}") for name in names for target in targets)


def untie(model: PreTrainedModel) -> None:
    """Give a model's head weights of its own."""
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False

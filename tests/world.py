"""A model folder and a preference file small enough to train on in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

from rich.console import Console
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefopt.recipe import Recipe, recipe_from_mapping
from prefopt.train import run_training

WORDS = [f"w{number}" for number in range(57)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 2,
        "<unk>": 3,
        **{word: i + 4 for i, word in enumerate(WORDS)},
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_model(folder: Path, architecture: str = "llama", **changes: object) -> Path:
    tiny_model(architecture, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_pairs(file: Path, rows: int = 60, *, seed: int = 0, unpaired: bool = False, **columns: object) -> Path:
    """Chosen answers use early words, rejected ones late words: there is something to learn."""
    generator = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(generator.choice(WORDS[low:high]) for _ in range(generator.randint(2, 12)))

    lines = []
    for number in range(rows):
        row = {"prompt": text(0, 57), "chosen": text(0, 35), "rejected": text(20, 57), **columns}
        if unpaired:
            side = "chosen" if number % 2 else "rejected"
            row = {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))
    return file


def make_recipe(folder: Path, **changes: object) -> Recipe:
    """A recipe on a model and data in the folder, with sections updated by keyword."""
    model, pairs = folder / "base", folder / "pairs.jsonl"
    if not model.exists():
        make_model(model)
    if not pairs.exists():
        make_pairs(pairs)
    mapping: dict = {
        "model": str(model),
        "data": {"train": str(pairs), "eval_fraction": 0.2, "max_length": 64, "processes": 1},
        "loss": "dpo",
        "train": {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"},
        "eval": {"every": 3, "samples": 4, "max_new_tokens": 8, "show": 0},
        "checkpoint": {"every": 2, "keep": 2},
        "output": str(folder / "run"),
    }
    for section, value in changes.items():
        merged = isinstance(value, dict) and isinstance(mapping.get(section), dict)
        mapping[section] = {**mapping[section], **value} if merged else value
    return recipe_from_mapping(mapping, name="test")


def quiet() -> Console:
    return Console(quiet=True)


def train(folder: Path, **changes: object) -> dict:
    return run_training(make_recipe(folder, **changes), quiet())

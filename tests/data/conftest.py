"""Small tokenizers, settings and files for the data tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prefopt.data import load_data

CORPUS = [
    "What color is the sky? The sky is blue. It is green, I think that is wrong.",
    "Name a fruit. An apple is a fruit; a stone is not. Yes, no, maybe.",
    "one two three four five six seven eight nine ten",
] * 5
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class OneSource:
    path: str
    weight: float = 1.0
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    train: Any
    eval: Any = None
    eval_fraction: float = 0.0
    held_out_seed: int = 0
    max_length: int = 256
    columns: dict[str, str] = field(default_factory=dict)
    group_by_prompt: bool = False
    eos: str = "auto"
    chat_template: str = "auto"
    split: str | None = None
    filter: dict[str, Any] = field(default_factory=dict)
    truncation: str = "completion"
    processes: int | None = 1


def train_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def trained():
    return train_bpe().to_str()


@pytest.fixture
def make_tokenizer(trained):
    """Make a tokenizer; `bos` and `eos` say what it puts around plain text by itself."""

    def make(*, bos=False, eos=False, chat_template=None, eos_token="</s>", **special):
        backend = Tokenizer.from_str(trained)
        if bos or eos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}",
                special_tokens=[("<s>", 1), ("</s>", 2)],
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token=eos_token, pad_token="<pad>", **special
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture
def plain(make_tokenizer):
    """A tokenizer without chat template that adds nothing by itself."""
    return make_tokenizer()


@pytest.fixture
def chat(make_tokenizer):
    """A tokenizer whose template ends a turn with <|end|>, which is also its EOS."""
    return make_tokenizer(chat_template=CHAT_TEMPLATE, eos_token="<|end|>")


@pytest.fixture
def settings():
    return Settings


@pytest.fixture
def one_source():
    return OneSource


@pytest.fixture
def write(tmp_path):
    """Write rows as JSON Lines (or the given text or bytes) and return the path as a string."""

    def write_file(content, name="pairs.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


@pytest.fixture
def load(write, plain, monkeypatch, tmp_path):
    """Load rows (or a path) with a tokenizer and settings, in a cache of the test's own."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))

    def load_rows(rows, tokenizer=None, *, seed=0, **changes):
        train = write(rows) if isinstance(rows, list) and rows and isinstance(rows[0], dict) else rows
        return load_data(Settings(train, **changes), tokenizer or plain, seed=seed, quiet=True)

    return load_rows


@pytest.fixture
def shown():
    """Decode a group: (prompt text, completion texts)."""

    def decode(group, tokenizer):
        return tokenizer.decode(group.prompt), [tokenizer.decode(ids) for ids in group.completions]

    return decode


PAIR = {"prompt": "What color is the sky?", "chosen": " It is blue.", "rejected": " It is green."}


@pytest.fixture
def pair():
    return dict(PAIR)


@pytest.fixture
def pairs():
    """Make n pairs with n different prompts."""
    return lambda n: [{"prompt": f"Question {i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(n)]

"""The models and pairs on which two trainers are timed: random weights, words that are one token each."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cost_model import Pair, Shape
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPREAD = 0.5
"""Lengths are uniform within so much of their mean."""
BATCH = 4
"""Pairs per step."""


@dataclass(frozen=True)
class Workload:
    """A model and the lengths of its pairs."""

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    prompt: int
    completion: int
    lora: bool = False

    @property
    def shape(self) -> Shape:
        """Its matrix products."""
        per_layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate
        return Shape(self.layers * per_layer, self.layers, self.hidden, self.vocab, self.hidden)


WORKLOADS = {
    "reference": Workload(4, 512, 864, 32_000, 256, 128),
    "body-512-64": Workload(8, 512, 1408, 4096, 512, 64),
    "body-256-128": Workload(8, 512, 1408, 4096, 256, 128),
    "body-64-256": Workload(8, 512, 1408, 4096, 64, 256),
    "lora": Workload(8, 512, 1408, 4096, 256, 128, lora=True),
    "alpaca": Workload(4, 512, 864, 32_000, 0, 0),
    "small": Workload(2, 64, 128, 512, 24, 12),
}


def make_model(folder: Path, workload: Workload, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save random weights and the tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=workload.vocab, hidden_size=workload.hidden, intermediate_size=workload.intermediate,
        num_hidden_layers=workload.layers, num_attention_heads=workload.hidden // 64 or 1,
        num_key_value_heads=workload.hidden // 64 or 1, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words w2, w3, ...: what a pair says is how long it is."""
    words = {"<pad>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def bpe_tokenizer(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    special = ["<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def write_random_pairs(file: Path, workload: Workload, count: int) -> list[Pair]:
    """Write pairs of random words; returns their lengths, completions with their end of sequence."""
    generator = random.Random(0)
    lengths: list[Pair] = []

    def text(tokens: int) -> str:
        return " ".join(f"w{generator.randrange(2, workload.vocab)}" for _ in range(tokens))

    def around(mean: int) -> int:
        return generator.randint(max(2, round(mean * (1 - SPREAD))), round(mean * (1 + SPREAD)))

    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            p, c, r = around(workload.prompt), around(workload.completion), around(workload.completion)
            row = {"prompt": text(p), "chosen": " " + text(c - 1), "rejected": " " + text(r - 1)}
            stream.write(json.dumps(row) + "\n")
            lengths.append((p, c, r))
    return lengths


def read_real_pairs(file: Path) -> list[dict[str, str]]:
    """Read prompt, chosen and rejected of a gzipped JSON-lines file, in a random order."""
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines() if line]
    random.Random(0).shuffle(rows)
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def write_real_pairs(
    file: Path, rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerFast, count: int, max_length: int
) -> list[Pair]:
    """Write the first pairs that fit `max_length` and have two different answers; returns their lengths."""
    lengths: list[Pair] = []
    with file.open("w", encoding="utf-8") as stream:
        for row in rows:
            p, c, r = (len(tokenizer(row[name])["input_ids"]) for name in ("prompt", "chosen", "rejected"))
            if p + max(c, r) + 1 <= max_length and row["chosen"] != row["rejected"] and min(p, c, r) > 0:
                stream.write(json.dumps(row) + "\n")
                lengths.append((p, c + 1, r + 1))
            if len(lengths) == count:
                break
    return lengths

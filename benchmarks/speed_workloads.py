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
        mlp = 3 * self.hidden * self.intermediate
        per_layer = 4 * self.hidden**2 + mlp
        return Shape(self.layers * per_layer, self.layers, self.hidden, self.vocab, self.hidden, last_mlp=mlp)


WORKLOADS = {
    "reference": Workload(4, 512, 864, 32_000, 256, 128),
    "body-512-64": Workload(8, 512, 1408, 4096, 512, 64),
    "body-256-128": Workload(8, 512, 1408, 4096, 256, 128),
    "body-64-256": Workload(8, 512, 1408, 4096, 64, 256),
    "lora": Workload(8, 512, 1408, 4096, 256, 128, lora=True),
    "alpaca": Workload(4, 512, 864, 32_000, 0, 0),
    "small": Workload(2, 64, 128, 512, 24, 12),
    "small-lora": Workload(2, 64, 128, 512, 24, 12, lora=True),
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


def random_lengths(workload: Workload, count: int) -> list[Pair]:
    """Draw the lengths of pairs, completions with their end of sequence."""
    generator = random.Random(0)

    def around(mean: int) -> int:
        return generator.randint(max(2, round(mean * (1 - SPREAD))), round(mean * (1 + SPREAD)))

    sizes = (workload.prompt, workload.completion, workload.completion)
    return [tuple(map(around, sizes)) for _ in range(count)]  # type: ignore[misc]


def write_random_pairs(file: Path, workload: Workload, count: int) -> list[Pair]:
    """Write pairs of random words; returns their lengths, completions with their end of sequence."""
    generator = random.Random(1)
    lengths = random_lengths(workload, count)

    def text(tokens: int) -> str:
        return " ".join(f"w{generator.randrange(2, workload.vocab)}" for _ in range(tokens))

    with file.open("w", encoding="utf-8") as stream:
        for p, c, r in lengths:
            row = {"prompt": text(p), "chosen": " " + text(c - 1), "rejected": " " + text(r - 1)}
            stream.write(json.dumps(row) + "\n")
    return lengths


def read_real_pairs(file: Path) -> list[dict[str, str]]:
    """Read prompt, chosen and rejected of a JSON-lines file, plain or gzipped, in a random order.

    A prompt gets a line feed at its end: words do not grow together with the answer's there.
    """
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    random.Random(0).shuffle(rows)
    return [
        {"prompt": row["prompt"].rstrip() + "\n", "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows
    ]


def write_real_pairs(
    file: Path, rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerFast, count: int, max_length: int
) -> list[Pair]:
    """Write the first pairs that no trainer cuts or tokenizes in its own way; returns their lengths."""
    lengths: list[Pair] = []
    with file.open("w", encoding="utf-8") as stream:
        for row in rows:
            if len(lengths) == count:
                break
            prompt, *answers = (tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected"))
            p, c, r = len(prompt), len(answers[0]) + 1, len(answers[1]) + 1
            together = [tokenizer(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")]
            split_alike = together == [prompt + answer for answer in answers]
            if split_alike and p + max(c, r) <= max_length and min(c, r) > 1 and row["chosen"] != row["rejected"]:
                stream.write(json.dumps(row) + "\n")
                lengths.append((p, c, r))
    if len(lengths) < count:
        raise SystemExit(f"expected {count} pairs of at most {max_length} tokens, found {len(lengths)}")
    return lengths

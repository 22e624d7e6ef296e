"""The models and pairs on which two trainers are timed: random weights, words that are one token each."""

from __future__ import annotations

import gc
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cost_model import Pair, Shape, padded, shared, unshared
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SPREAD = 0.5
"""Lengths are uniform within so much of their mean."""
BATCH = 4
"""Pairs per step."""
DRAWS = 200
"""From so many draws of pairs the one is taken that is most like all pairs."""
POPULATION = 4000
"""Pairs of random lengths that stand for all."""


@dataclass(frozen=True)
class Workload:
    """A Llama's shape, and the lengths of its pairs."""

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    prompt: int
    completion: int
    lora: bool = False
    quantization: str = "none"
    """Of the frozen base: a word of bitsandbytes."""
    heads: int = 0
    """0: of 64 numbers each."""
    key_heads: int = 0
    """0: as many."""
    tied: bool = True
    large: bool = False
    """For an accelerator."""

    @property
    def all_heads(self) -> tuple[int, int]:
        """Heads of queries, and of keys and values."""
        heads = self.heads or self.hidden // 64 or 1
        return heads, self.key_heads or heads

    @property
    def shape(self) -> Shape:
        """Its matrix products."""
        mlp, (heads, key_heads) = 3 * self.hidden * self.intermediate, self.all_heads
        per_layer = 2 * self.hidden**2 * (1 + key_heads / heads) + mlp
        return Shape(self.layers * per_layer, self.layers, self.hidden, self.vocab, self.hidden, last_mlp=mlp)


LLAMA_8B = Workload(
    32, 4096, 14336, 128_256, 2048, 512, lora=True, heads=32, key_heads=8, tied=False, large=True
)  # fmt: skip
QWEN_7B = Workload(
    28, 3584, 18944, 152_064, 512, 256, lora=True, heads=28, key_heads=4, tied=False, large=True
)  # fmt: skip
QWEN_HALF_B = Workload(24, 896, 4864, 151_936, 2048, 512, heads=14, key_heads=2, large=True)


WORKLOADS = {
    "reference": Workload(4, 512, 864, 32_000, 256, 128),
    "body-512-64": Workload(8, 512, 1408, 4096, 512, 64),
    "body-256-128": Workload(8, 512, 1408, 4096, 256, 128),
    "body-64-256": Workload(8, 512, 1408, 4096, 64, 256),
    "lora": Workload(8, 512, 1408, 4096, 256, 128, lora=True),
    "alpaca": Workload(4, 512, 864, 32_000, 0, 0),
    "small": Workload(2, 64, 128, 512, 24, 12),
    "small-lora": Workload(2, 64, 128, 512, 24, 12, lora=True),
    "small-qlora": Workload(2, 64, 128, 512, 24, 12, lora=True, quantization="nf4", heads=4, key_heads=2),
    "llama-8b-lora": LLAMA_8B,
    "llama-8b-qlora": replace(LLAMA_8B, quantization="nf4"),
    "qwen-7b-lora": QWEN_7B,
    "qwen-7b-qlora": replace(QWEN_7B, quantization="nf4"),
    "qwen-0.5b": QWEN_HALF_B,
    "qwen-0.5b-lora": replace(QWEN_HALF_B, lora=True),
}


def make_model(folder: Path, workload: Workload, tokenizer: PreTrainedTokenizerFast, *, device: str = "cpu") -> None:
    """Save random weights and the tokenizer; weights that an accelerator holds frozen are saved in 16 bit."""
    heads, key_heads = workload.all_heads
    config = LlamaConfig(
        vocab_size=workload.vocab, hidden_size=workload.hidden, intermediate_size=workload.intermediate,
        num_hidden_layers=workload.layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        max_position_embeddings=4096, tie_word_embeddings=workload.tied, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=held_in(workload, device))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if device == "cuda":  # those who are measured need its memory
        del model
        gc.collect()
        torch.cuda.empty_cache()


def held_in(workload: Workload, device: str) -> torch.dtype:
    """Return the dtype of a workload's weights: what trains is fp32."""
    return torch.bfloat16 if device == "cuda" and workload.lora else torch.float32


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


def waste(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Tokens with padding over those without, and tokens with every prompt twice over those with each once."""
    ragged = unshared(pairs).tokens
    return padded(pairs, BATCH, compact=True).tokens / ragged, ragged / shared(pairs).tokens


def most_typical(draws: Sequence[Sequence[Pair]], every: Sequence[Pair]) -> int:
    """Which draw's `waste` is nearest to that of all pairs.

    A few steps are padded by a fifth or by half of their tokens, as luck has it, and with them what there is to gain:
    three steps of one draw at 256:128 had TRL's operations at 2.5 times ours, 400 steps 2.8. Only lengths decide here.
    """
    aim = waste(every)
    return min(
        range(len(draws)),
        key=lambda number: max(abs(own / all_ - 1) for own, all_ in zip(waste(draws[number]), aim, strict=True)),
    )


def random_lengths(workload: Workload, count: int, *, seed: int = 0) -> list[Pair]:
    """Draw the lengths of pairs, completions with their end of sequence."""
    generator = random.Random(seed)

    def around(mean: int) -> int:
        return generator.randint(max(2, round(mean * (1 - SPREAD))), round(mean * (1 + SPREAD)))

    sizes = (workload.prompt, workload.completion, workload.completion)
    return [tuple(map(around, sizes)) for _ in range(count)]  # type: ignore[misc]


def write_random_pairs(
    file: Path, workload: Workload, count: int, *, uncounted: int = 0
) -> tuple[tuple[float, float], list[Pair]]:
    """Write pairs of random words.

    Args:
        file: where to.
        workload: the means of their lengths.
        count: how many.
        uncounted: so many at the front need not be typical.

    Returns:
        the `waste` of all such pairs, and the lengths of these, completions with their end of sequence.
    """
    every = random_lengths(workload, POPULATION, seed=DRAWS)
    draws = [random_lengths(workload, count, seed=seed) for seed in range(DRAWS)]
    lengths = draws[most_typical([draw[uncounted:] for draw in draws], every)]
    generator = random.Random(1)

    def text(tokens: int) -> str:
        return " ".join(f"w{generator.randrange(2, workload.vocab)}" for _ in range(tokens))

    with file.open("w", encoding="utf-8") as stream:
        for p, c, r in lengths:
            row = {"prompt": text(p), "chosen": " " + text(c - 1), "rejected": " " + text(r - 1)}
            stream.write(json.dumps(row) + "\n")
    return waste(every), lengths


def read_real_pairs(file: Path) -> list[dict[str, str]]:
    """Read prompt, chosen and rejected of a JSON-lines file, plain or gzipped.

    A prompt gets a line feed at its end: words do not grow together with the answer's there.
    """
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    return [
        {"prompt": row["prompt"].rstrip() + "\n", "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows
    ]


def write_real_pairs(
    file: Path,
    rows: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    max_length: int,
    *,
    uncounted: int = 0,
) -> tuple[tuple[float, float], list[Pair]]:
    """Write pairs that no trainer cuts or tokenizes in its own way; returns what `write_random_pairs` does."""
    usable = [(row, pair) for row in rows if (pair := alike_in_all(row, tokenizer, max_length)) is not None]
    if len(usable) < count:
        raise SystemExit(f"expected {count} pairs of at most {max_length} tokens, found {len(usable)}")
    every = [pair for _, pair in random.Random(DRAWS).sample(usable, len(usable))]  # a file can be in some order
    draws = [random.Random(seed).sample(usable, count) for seed in range(DRAWS)]
    taken = draws[most_typical([[pair for _, pair in draw[uncounted:]] for draw in draws], every)]
    file.write_text("".join(json.dumps(row) + "\n" for row, _ in taken), encoding="utf-8")
    return waste(every), [pair for _, pair in taken]


def alike_in_all(row: dict[str, str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> Pair | None:
    """Return a pair's lengths, or None where trainers could differ in what they make of it."""
    prompt, *answers = (tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected"))
    p, c, r = len(prompt), len(answers[0]) + 1, len(answers[1]) + 1
    together = [tokenizer(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")]
    split_alike = together == [prompt + answer for answer in answers]
    whole = p + max(c, r) <= max_length and min(c, r) > 1
    return (p, c, r) if split_alike and whole and row["chosen"] != row["rejected"] else None

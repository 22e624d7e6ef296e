"""A tiny random model, data and settings for TRL's trainers, and how two losses are compared: value and gradient."""

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt_losses import token_logps_from_logits

WORDS = [f"w{index}" for index in range(40)]


def make_tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(seed, layers=2):
    """A random Llama whose weights are large enough that policy and reference disagree by several nats."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=44,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_pairs(rows=6, **more):
    choose = random.Random(0)

    def text(low, high):
        return " ".join(choose.choices(WORDS, k=choose.randint(low, high)))

    texts = {
        "prompt": [text(3, 6) for _ in range(rows)],
        "chosen": [" " + text(2, 9) for _ in range(rows)],
        "rejected": [" " + text(4, 12) for _ in range(rows)],
    }
    return Dataset.from_dict(texts | more)


def settings(folder):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "max_length": 64,
    }


def scored(model, input_ids, attention_mask, scored_tokens):
    """Return log-probs summed over the scored tokens, and their number, each (rows,)."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    mask = scored_tokens[:, 1:]
    return (token_logps_from_logits(logits, input_ids[:, 1:]) * mask).sum(-1), mask.sum(-1)


def gradient(value, model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    slopes = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([slope.flatten() for slope in slopes if slope is not None])


def assert_same(theirs, ours, model):
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    expected, given = gradient(theirs, model), gradient(ours, model)
    assert expected.norm() > 0
    assert (given - expected).norm() <= 2e-5 * expected.norm()

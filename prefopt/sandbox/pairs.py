"""Preference pairs of the small world: two samples of the policy, and a judge who follows the gold reward."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.sandbox.policy import Track, sample
from prefopt.sandbox.reward import gold_reward

Row = dict[str, Any]
"""One comparison in the conversational format, with its gold rewards."""

SPARE = 1.05
"""Pairs sampled for each pair asked for; the few that are equal or empty are left out."""


def conversation(prompt: str) -> list[dict[str, str]]:
    """Return the conversation that asks `prompt`."""
    return [{"role": "user", "content": prompt}]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt, up to where the assistant begins to write."""
    conversations = [conversation(prompt) for prompt in prompts]
    texts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def sample_pairs(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    count: int,
    max_new_tokens: int,
    rng: random.Random,
    generator: torch.Generator,
    track: Track,
    title: str,
) -> list[Row]:
    """Sample two completions for prompts in turn and label them, until there are `count` pairs.

    Args:
        policy: the model that writes both completions
        tokenizer: its tokenizer
        prompts: each is asked equally often, to within one pair
        count: number of pairs
        max_new_tokens: where a completion is cut if the policy does not end it
        rng: order of the prompts and draws of the judge
        generator: draws of the policy
        track: shows the progress
        title: what it shows
    """
    rounds = math.ceil(count * SPARE / len(prompts))
    asked = [prompt for _ in range(rounds) for prompt in rng.sample(prompts, k=len(prompts))]
    asked = asked[: math.ceil(count * SPARE)]
    forbidden = [token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id]
    written = sample(
        policy,
        [ids for ids in prompt_ids(tokenizer, asked) for _ in range(2)],
        forbidden=forbidden,
        max_new_tokens=max_new_tokens,
        generator=generator,
        track=track,
        title=title,
    )
    texts = tokenizer.batch_decode(written)
    candidates = zip(asked, texts[::2], texts[1::2])
    usable = (pair for pair in candidates if pair[1] != pair[2] and all(pair))
    return list(islice((label(*pair, rng=rng) for pair in usable), count))


def label(prompt: str, first: str, second: str, *, rng: random.Random) -> Row:
    """Let a Bradley-Terry judge choose: the first wins with probability sigmoid(r(first) - r(second)).

    The row states the probability that its chosen completion is chosen; it is below 1/2 where the judge erred.
    """
    rewards = gold_reward(prompt, first), gold_reward(prompt, second)
    first_wins = rng.random() < 1.0 / (1.0 + math.exp(rewards[1] - rewards[0]))
    chosen, rejected = (first, second) if first_wins else (second, first)
    chosen_reward, rejected_reward = rewards if first_wins else rewards[::-1]
    return {
        "prompt": conversation(prompt),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "preference_probability": 1.0 / (1.0 + math.exp(rejected_reward - chosen_reward)),
        "chosen_gold_reward": chosen_reward,
        "rejected_gold_reward": rejected_reward,
    }


def gold_statistics(rows: Iterable[Row]) -> dict[str, float]:
    """Return mean and standard deviation of the gold reward, and the accuracy of the best possible judge."""
    rows = list(rows)
    rewards = [row[key] for row in rows for key in ("chosen_gold_reward", "rejected_gold_reward")]
    probabilities = [row["preference_probability"] for row in rows]
    mean = math.fsum(rewards) / len(rewards)
    return {
        "mean": mean,
        "standard_deviation": math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)),
        "bayes_accuracy": math.fsum(max(p, 1.0 - p) for p in probabilities) / len(probabilities),
    }

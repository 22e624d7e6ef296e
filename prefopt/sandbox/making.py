"""How the small world is made: reviews, then a policy that writes them, then pairs of what it writes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from prefopt.sandbox.pairs import Row, gold_statistics, prompt_ids, sample_pairs
from prefopt.sandbox.policy import Track, new_policy, teach
from prefopt.sandbox.settings import WorldSettings
from prefopt.sandbox.text import Subject, prompts_about, subjects, write_review
from prefopt.sandbox.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Made:
    """The parts of a world in memory."""

    policy: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    train: list[Row]
    eval: list[Row]
    gold_reward: dict[str, float]
    """Statistics over both completions of the training pairs."""

    def save_model(self, folder: Path) -> None:
        """Write policy and tokenizer for `from_pretrained`, without transformers' progress bar."""
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            self.policy.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        finally:
            if shown:
                transformers_logging.enable_progress_bar()


def make_world(settings: WorldSettings, seed: int, track: Track) -> Made:
    """Make a world from nothing; every draw comes from generators of its own."""
    seen, unseen = _divide(subjects(), settings.held_out_subjects, random.Random(f"{seed} subjects"))
    reviews = _write_reviews(seen, settings.reviews, random.Random(f"{seed} reviews"), track)
    every_prompt = [prompt for subject in subjects() for prompt in prompts_about(subject)]
    tokenizer = build_tokenizer([*every_prompt, *(review for _, review in reviews)], max_length=settings.max_length)
    policy = _teach_policy(tokenizer, reviews, settings, seed, track)
    pairs = {
        split: sample_pairs(
            policy,
            tokenizer,
            [prompt for subject in about for prompt in prompts_about(subject)],
            count=count,
            max_new_tokens=settings.max_new_tokens,
            rng=random.Random(f"{seed} {split} pairs"),
            generator=_generator(seed, split),
            track=track,
            title=title,
        )
        for split, about, count, title in (
            ("train", seen, settings.train_pairs, "sampling pairs"),
            ("eval", unseen, settings.eval_pairs, "and held-out pairs"),
        )
    }
    return Made(policy, tokenizer, pairs["train"], pairs["eval"], gold_statistics(pairs["train"]))


def _divide(everything: Sequence[Subject], share: float, rng: random.Random) -> tuple[list[Subject], list[Subject]]:
    """Return subjects to learn from and a share of subjects to hold out."""
    shuffled = rng.sample(everything, k=len(everything))
    held_out = round(share * len(shuffled))
    return shuffled[held_out:], shuffled[:held_out]


def _write_reviews(about: Sequence[Subject], count: int, rng: random.Random, track: Track) -> list[tuple[str, str]]:
    """Return (prompt, review) pairs."""
    written = []
    for _ in track(range(count), "writing reviews"):
        subject = rng.choice(about)
        written.append((rng.choice(prompts_about(subject)), write_review(subject, rng)))
    return written


def _teach_policy(
    tokenizer: PreTrainedTokenizerFast,
    reviews: Sequence[tuple[str, str]],
    settings: WorldSettings,
    seed: int,
    track: Track,
) -> LlamaForCausalLM:
    prompts = prompt_ids(tokenizer, [prompt for prompt, _ in reviews])
    completions = tokenizer([review for _, review in reviews], add_special_tokens=False)["input_ids"]
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the accelerators, whose state is not restored here.
        torch.default_generator.manual_seed(_number(seed, "weights"))
        policy = new_policy(tokenizer, hidden=settings.hidden, layers=settings.layers, max_length=settings.max_length)
    teach(
        policy,
        [(prompt, [*ids, tokenizer.eos_token_id]) for prompt, ids in zip(prompts, completions)],
        steps=settings.steps,
        batch_size=settings.batch_size,
        generator=_generator(seed, "batches"),
        track=track,
    )
    return policy


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(_number(seed, purpose))


def _number(seed: int, purpose: str) -> int:
    """Return a seed for one purpose, so that no two purposes share their draws."""
    return random.Random(f"{seed} {purpose}").getrandbits(63)

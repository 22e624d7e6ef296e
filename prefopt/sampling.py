"""A model writes completions: the same prompts and the same random numbers every time it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from prefopt.acceleration import eager
from prefopt.attention import attention
from prefopt.data.groups import GroupDataset, PromptGroup
from prefopt.forward import Scorer, autocast, plain_attention
from prefopt.run_folder import read_json_lines

ROWS_PER_BATCH = 64
"""Prompts that are continued together; a key-value cache holds all of them."""


@dataclass(frozen=True)
class Sample:
    """One completion that a model wrote for a held-out prompt."""

    prompt: str
    completion: str
    tokens: int
    finished: bool
    """Whether it ended with the end-of-sequence token."""
    gold_reward: float | None
    group: PromptGroup

    def as_dict(self) -> dict[str, object]:
        """Return what is stored of it: all but the token ids."""
        return {name: value for name, value in vars(self).items() if name != "group"}


def read_samples(file: Path) -> list[Sample]:
    """Return stored samples, without their token ids."""
    empty = PromptGroup(np.zeros(0, np.int64), (), ())
    return [Sample(**row, group=empty) for row in read_json_lines(file)]


def distinct_prompts(dataset: GroupDataset, count: int) -> list[np.ndarray]:
    """Return the first ``count`` different prompts of a dataset, as token ids."""
    prompts: dict[bytes, np.ndarray] = {}
    for number in range(len(dataset)):
        if len(prompts) == count:
            break
        prompt = dataset[number].prompt
        prompts.setdefault(prompt.tobytes(), prompt)
    return list(prompts.values())


@torch.no_grad()
def sample(
    scorer: Scorer,
    prompts: Sequence[np.ndarray],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    precision: str,
) -> list[PromptGroup]:
    """Let the model write one completion per prompt, by plain sampling (no top-k, no top-p).

    Args:
        scorer: the model.
        prompts: token ids.
        tokenizer: its end-of-sequence token ends a completion.
        max_new_tokens: longest completion.
        temperature: 1 samples the model itself.
        seed: of the random numbers; the global generators are left as they were.
        precision: as in `train.precision`.

    Returns:
        Groups of one prompt and one completion, which includes the end-of-sequence token where it was written.
    """
    was_training = scorer.training
    scorer.eval()
    device = next(scorer.parameters()).device
    groups: list[PromptGroup] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with (
            eager(scorer.language_model),
            attention(scorer.language_model, plain_attention(scorer.language_model)),
            autocast(device, precision),
        ):
            for start in range(0, len(prompts), ROWS_PER_BATCH):
                rows = prompts[start : start + ROWS_PER_BATCH]
                groups += _continue(scorer, rows, tokenizer, max_new_tokens, temperature, device)
    scorer.train(was_training)
    return groups


def _continue(
    scorer: Scorer,
    prompts: Sequence[np.ndarray],
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float,
    device: torch.device,
) -> list[PromptGroup]:
    longest = max(map(len, prompts))
    end = tokenizer.eos_token_id
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    ids = torch.full((len(prompts), longest), filler if filler is not None else 0)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    plain = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=filler,
        eos_token_id=end,
    )
    with _own_generation_settings(scorer.language_model, plain):
        written = scorer.language_model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=plain
        )
    completions = written[:, longest:].cpu().numpy()
    return [PromptGroup(prompt, (_until_end(completion, end),), ()) for prompt, completion in zip(prompts, completions)]


@contextmanager
def _own_generation_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Keep the model's generation_config (min_p, penalties, ...) from being merged into ours."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def _until_end(ids: np.ndarray, end: int | None) -> np.ndarray:
    ends = np.flatnonzero(ids == end) if end is not None else np.empty(0, dtype=int)
    return ids[: ends[0] + 1] if len(ends) else ids

"""How large a small world is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorldSettings:
    """How large a world is; the defaults make fluent reviews in about 20 seconds on one core."""

    reviews: int = 8000
    """Reviews that the grammar writes for the policy to learn from."""
    hidden: int = 96
    """Width of the policy, a multiple of 32."""
    layers: int = 2
    steps: int = 300
    """Optimizer steps of the policy's training."""
    batch_size: int = 16
    train_pairs: int = 2000
    eval_pairs: int = 400
    held_out_subjects: float = 0.2
    """Share of the subjects that neither the policy nor the training pairs ever see in a prompt."""
    max_new_tokens: int = 96
    """Longest completion; the policy's own average is 33 tokens."""
    max_length: int = 256
    """Longest sequence the policy is made for."""

"""A reference that follows the policy (TR-DPO): every so many steps, ref <- mix * policy + (1 - mix) * ref.

With all weights in training it is a second model; with an adapter it is the policy's own base with a second, frozen
adapter, whose factors are mixed. The training loss reads it, so no cache can hold its log-probs; what is measured on
held-out data is measured against the initial reference.

A checkpoint's moving reference stands beside the checkpoints, in one file per sync, for it moves more rarely:

    moving_reference/step-00000512.safetensors

Source: Gorbatovski et al. 2024, Learn Your Reference Model for Real Good Alignment, arXiv 2404.09656.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefopt.adapters import acting_with
from prefopt.batching import RaggedBatch
from prefopt.errors import ModelError, Problem
from prefopt.forward import CompletionLogProbs, Scorer
from prefopt.recipe.schema import SyncRecipe
from prefopt.reference.source import OnlineLogps

FOLDER = "moving_reference"


class AdapterLogps:
    """Log-probs by the policy's own base: with another adapter in the trained one's place, or alone."""

    def __init__(self, policy: Scorer, *, adapter: str | None, precision: str, distribution: bool = False) -> None:
        self.adapter = adapter
        self._online = OnlineLogps(policy, precision=precision, distribution=distribution)

    @property
    def tokens(self) -> int:
        """Completion tokens scored so far."""
        return self._online.tokens

    def __call__(self, batch: RaggedBatch) -> CompletionLogProbs:
        """Return the log-probs under the reference, in eval mode."""
        with self._acting():
            return self._online(batch)

    @contextmanager
    def reference(self) -> Iterator[Scorer]:
        """Give the scorer as the reference, in eval mode."""
        with self._acting(), self._online.reference() as scorer:
            yield scorer

    def _acting(self) -> AbstractContextManager[None]:
        return acting_with(self._online.scorer.model, self.adapter)


@dataclass(frozen=True)
class MovingReference:
    """The reference of the training data, and how it moves."""

    logps: OnlineLogps | AdapterLogps
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Each tensor of the reference that moves, with the policy's, by the policy's name."""
    sync: SyncRecipe

    def after_step(self, step: int) -> None:
        """Mix the policy into the reference where the step is one of a sync."""
        if step % self.sync.every == 0:
            mix_in(self.pairs, mix=self.sync.mix)

    def save(self, run: Path, step: int) -> None:
        """Write the reference as it is after a step, whole, unless it stands there since its last sync.

        Raises:
            ModelError: the disk is full or refuses.
        """
        target = self._file(run, step)
        if target is None or target.exists():
            return
        partial = target.with_suffix(".partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: moving.detach().contiguous() for name, (moving, _) in self.pairs.items()}, partial)
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, target)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise ModelError(
                Problem(f"moving reference {target}", "room to write it", str(error).splitlines()[0],
                        "free space and run the same command again: it goes on from the last checkpoint")
            ) from error  # fmt: skip

    def load(self, run: Path, step: int) -> None:
        """Put the reference back as it was after a step.

        Raises:
            ModelError: its file is gone, damaged, or of another model.
        """
        file = self._file(run, step)
        if file is None:
            return
        try:
            stored = load_file(file)
            if stored.keys() != self.pairs.keys():
                raise SafetensorError(f"{len(stored.keys() ^ self.pairs.keys())} names differ from this model's")
        except (OSError, SafetensorError) as error:
            raise ModelError(
                Problem(f"moving reference {file}", f"the moving reference of the checkpoint of step {step}",
                        str(error).splitlines()[0][:200],
                        f"remove {run / 'checkpoints'} and {run / FOLDER}: the run then starts again")
            ) from error  # fmt: skip
        with torch.no_grad():
            for name, (moving, _) in self.pairs.items():
                moving.copy_(stored[name])

    def forget(self, run: Path, steps: list[int]) -> None:
        """Remove the files that no checkpoint of these steps needs."""
        needed = {self._file(run, step) for step in steps}
        for file in (run / FOLDER).glob("step-*"):
            if file not in needed:
                file.unlink()

    def _file(self, run: Path, step: int) -> Path | None:
        """Where the reference after a step is kept: under the step of its last sync; None before the first."""
        synced = step - step % self.sync.every
        return run / FOLDER / f"step-{synced:08d}.safetensors" if synced else None


@torch.no_grad()
def mix_in(pairs: Mapping[str, tuple[Tensor, Tensor]], *, mix: float) -> None:
    """Ref <- mix * policy + (1 - mix) * ref, tensor by tensor, in 32 bit; mix 1 copies.

    Args:
        pairs: tensors of the reference and of the policy, by name.
        mix: share of the policy.
    """
    for moving, policy in pairs.values():
        if mix == 1:
            moving.copy_(policy)
        else:
            moving.copy_(torch.lerp(moving.float(), policy.to(moving.device).float(), mix))


def model_pairs(policy: Scorer, reference: Scorer) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights of a second model and of the policy, by name."""
    moving = dict(reference.model.named_parameters())
    return {name: (moving[name], weight) for name, weight in policy.model.named_parameters()}

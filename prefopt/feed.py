"""One dataset on its way into a loss: which completions are computed, and everything that is computed of them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from prefopt.batching import RaggedBatch, Slice, make_batch
from prefopt.data.groups import GroupDataset
from prefopt.forward import ReferenceLogps, Scorer, autocast, evaluating
from prefopt.memory import Trimmer
from prefopt.objective import Scored
from prefopt.planning import Step, Unit, every_comparison, pack_slices
from prefopt.prefetch import Ahead
from prefopt_losses import Needs


@dataclass(frozen=True)
class Partners:
    """A mismatched completion for every group: its prompt, and a completion of another prompt after it."""

    dataset: GroupDataset
    """Group g belongs to group g of the data."""
    reference: ReferenceLogps


@dataclass(frozen=True)
class Feed:
    """A dataset, and what a loss needs of it."""

    dataset: GroupDataset
    needs: Needs
    reference: ReferenceLogps | None
    """None where neither loss nor metrics read one."""
    partners: Partners | None
    precision: str

    @property
    def rejected(self) -> bool:
        """Whether rejected completions are computed."""
        return self.needs.rejected or not self.dataset.paired

    @property
    def unit(self) -> Unit:
        """What the loss has one value for."""
        return "list" if self.needs.lists else "comparison"

    def policy_only(self) -> Feed:
        """Return the feed without what is a constant to the policy's gradient."""
        return replace(self, partners=None, reference=self.reference if self.needs.sequential_kl else None)

    def batch(self, micro: Sequence[Slice], device: torch.device, *, both_sides: bool = False) -> RaggedBatch:
        """Lay a micro-batch out, on the device; `both_sides` computes rejected completions that the loss leaves out."""
        return self._laid_out(micro, both_sides=both_sides).to(device)

    def batches(
        self,
        micros: Iterable[Sequence[Slice]],
        device: torch.device,
        *,
        both_sides: bool = False,
        ahead: bool | None = None,
    ) -> Generator[RaggedBatch, None, None]:
        """Lay micro-batches out one after another, on the device.

        On an accelerator the next one is laid out and pinned in a thread while this one is computed, and moves without
        anybody waiting. On a CPU there is nothing to hide: laying one out is 1.5 ms of numpy beside seconds of
        products, and a thread would take them from the very cores that multiply. `ahead` decides for itself.
        """
        if not (device.type != "cpu" if ahead is None else ahead):
            for micro in micros:
                yield self.batch(micro, device, both_sides=both_sides)
            return

        def make(micro: Sequence[Slice]) -> RaggedBatch:
            laid_out = self._laid_out(micro, both_sides=both_sides)
            return laid_out.pinned() if device.type == "cuda" else laid_out

        with closing(iter(Ahead(make, micros))) as ready:
            for batch in ready:
                yield batch.to(device)

    def _laid_out(self, micro: Sequence[Slice], *, both_sides: bool) -> RaggedBatch:
        groups = [self.dataset[part.group] for part in micro]
        rejected = both_sides or self.rejected
        return make_batch(groups, micro, rejected=rejected, gold=self.needs.gold, lists=self.needs.lists)

    def scored(self, module: nn.Module, micro: Sequence[Slice], batch: RaggedBatch) -> Scored:
        """Compute what the loss reads of a micro-batch; gradient flows as the caller has it."""
        device = batch.input_ids.device
        mismatched = self._mismatched(module, micro, device) if self.partners else None
        reference = self.reference(batch) if self.reference else None
        against = reference.distribution if reference is not None and self.needs.sequential_kl else None
        with autocast(device, self.precision):
            policy = module(batch, relative=self.needs.relative, against=against)
        return Scored(batch, policy, reference, mismatched)

    def evaluated(self, scorer: Scorer, token_budget: int) -> Iterator[tuple[Scored, Step, Sequence[Slice]]]:
        """Compute everything in eval mode, without gradient, each micro-batch with the plan of all and its own part."""
        device = next(scorer.parameters()).device
        # Both sides are computed for the metrics, also where the loss reads only one.
        everything = every_comparison(self.dataset)
        plan = pack_slices(self.dataset, everything, token_budget=token_budget, gold=self.needs.gold, unit=self.unit)
        trimmer = Trimmer(device)
        with evaluating(scorer):
            batches = self.batches(plan.micro_batches, device, both_sides=True)
            for micro, batch in zip(plan.micro_batches, batches):
                yield self.scored(scorer, micro, batch), plan, micro
                trimmer.after_step()

    @torch.no_grad()
    def _mismatched(self, module: nn.Module, micro: Sequence[Slice], device: torch.device) -> tuple[Tensor, Tensor]:
        """Sums of the groups' partners under policy and reference, once per comparison."""
        assert self.partners is not None
        slices = [Slice(part.group, (0,)) for part in micro]
        batch = make_batch([self.partners.dataset[part.group] for part in micro], slices).to(device)
        with autocast(device, self.precision):
            policy = module(batch).sums
        times = np.repeat(np.arange(len(micro)), [len(part.comparisons) for part in micro])
        place = torch.from_numpy(times).to(device, non_blocking=True)
        reference = self.partners.reference(batch).sums
        return policy[place], reference[place]

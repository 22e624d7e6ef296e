"""The reference during a run: its log-probs of the data, and the model itself when it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from rich.console import Console

from prefopt.adapters import FROZEN, MOVING, forget, keep_initial, pairs
from prefopt.batching import RaggedBatch
from prefopt.data.groups import GroupDataset
from prefopt.feed import Feed, Partners
from prefopt.forward import CompletionLogProbs, ReferenceLogps, Scorer, Settled
from prefopt.memory import return_memory, unload
from prefopt.models import ModelSource
from prefopt.prepare import Prepared, reference_source
from prefopt.probe import probe_group
from prefopt.reference.build import BuildReport
from prefopt.reference.certificate import Certificate
from prefopt.reference.identity import ReferenceIdentity
from prefopt.reference.moving import AdapterLogps, MovingReference, model_pairs
from prefopt.reference.opening import cached_reference, load_reference, reference_in_memory
from prefopt.reference.source import OnlineLogps


@dataclass
class RunReference:
    """The reference of one run: cached or online, and where it follows the policy, as it started and as it moves."""

    prepared: Prepared
    source: ModelSource
    identity: ReferenceIdentity | None
    """None for an online reference, which needs none."""
    report: BuildReport
    logps: dict[str, ReferenceLogps]
    """By data: `train` and `eval`, and `train_partners` and `eval_partners` of losses that read mismatched ones."""
    online: OnlineLogps | AdapterLogps | None = None
    """The initial reference where it is not cached."""
    certificate: Certificate | None = None
    """What is known of a quantized reference's error."""
    _policy: Scorer | None = None
    _settled: Settled | None = None

    @property
    def is_policys_base(self) -> bool:
        """Whether the reference is the policy's base, alone or with another adapter: no second model is needed."""
        recipe = self.prepared.recipe
        same = recipe.reference.quantization == recipe.model.quantization
        return recipe.adapter is not None and recipe.reference.model is None and same

    def use_policy(self, scorer: Scorer) -> None:
        """Take note of the policy; a reference that is its base computes on it from now on."""
        self._policy = scorer
        if self.is_policys_base and self.source.adapter is not None:
            keep_initial(scorer.model, self.source.adapter)
        if not self.prepared.cached:
            self.online = self._on_policys_base() if self.is_policys_base else self._second_model()
            self.logps = dict.fromkeys((name for name, _ in self.prepared.read_by_reference()), self.online)
        moving = [name for name, _ in self.prepared.read_by_moving_reference()]
        self.logps |= dict.fromkeys(moving, self._by_moving)

    def _on_policys_base(self) -> AdapterLogps:
        """Let the policy's base act, with the frozen copy of its adapter where training went on from one."""
        assert self._policy is not None
        prepared, adapter = self.prepared, FROZEN if self.source.adapter is not None else None
        precision, whole = prepared.recipe.train.precision, prepared.loss.needs.sequential_kl
        return AdapterLogps(self._policy, adapter=adapter, precision=precision, distribution=whole)

    def _second_model(self) -> OnlineLogps:
        """Load the reference as a model of its own."""
        prepared = self.prepared
        probe = probe_group(prepared.data.train, prepared.data.eval)
        with torch.random.fork_rng():
            reference = load_reference(self.source, prepared.recipe, probe)
        precision, whole = prepared.recipe.train.precision, prepared.loss.needs.sequential_kl
        return OnlineLogps(reference, precision=precision, distribution=whole)

    @cached_property
    def moving(self) -> MovingReference | None:
        """The reference that follows the policy; a second model is loaded when it is first asked for."""
        recipe, sync, policy = self.prepared.recipe, self.prepared.recipe.reference.sync, self._policy
        if sync is None or policy is None:
            return None
        if recipe.adapter is None:
            second = self._second_model()
            return MovingReference(second, model_pairs(policy, second.scorer), sync)
        precision, whole = recipe.train.precision, self.prepared.loss.needs.sequential_kl
        logps = AdapterLogps(policy, adapter=MOVING, precision=precision, distribution=whole)
        return MovingReference(logps, pairs(policy.model, MOVING), sync)

    def _by_moving(self, batch: RaggedBatch) -> CompletionLogProbs:
        assert self.moving is not None  # the data are read by a moving reference
        return self.moving.logps(batch)

    def release(self) -> None:
        """Let go of the models and adapters that only training needed."""
        if self._policy is not None:
            forget(self._policy.model, MOVING)
            forget(self._policy.model, FROZEN)
        moving = self.__dict__.pop("moving", None)
        if moving is not None and isinstance(moving.logps, OnlineLogps):  # a second model
            unload(moving.logps.scorer)
        self.logps, self._policy = {}, None
        return_memory()

    def sync_facts(self, steps: int) -> dict[str, Any] | None:
        """Say how the reference moved in so many steps, for the record; None where it stayed."""
        sync = self.prepared.recipe.reference.sync
        if sync is None:
            return None
        return {"every": sync.every, "mix": sync.mix, "syncs": steps // sync.every, "evaluated_against": "initial"}

    @property
    def remark(self) -> str:
        """What a person should know of a reference that moves; empty for others."""
        sync = self.prepared.recipe.reference.sync
        if sync is None:
            return ""
        held = "a second model" if self.prepared.recipe.adapter is None else "a second, frozen adapter"
        return (
            f"the reference moves every {sync.every} steps: its log-probs are computed in every step and not cached "
            f"({held}); held-out data are measured against the initial reference"
        )

    def first_read(self) -> tuple[GroupDataset, ReferenceLogps] | None:
        """Return the first data that a reference reads, and what it says of them; None where it reads none."""
        data = dict([*self.prepared.read_by_moving_reference(), *self.prepared.read_by_reference()])
        return next(((groups, self.logps[name]) for name, groups in data.items() if name in self.logps), None)

    def feed(self, name: str) -> Feed:
        """Return the data `train` or `eval` on their way into the loss."""
        prepared = self.prepared
        datasets = {"train": prepared.data.train, "eval": prepared.data.eval, **prepared.partners}
        dataset, partners = datasets[name], datasets.get(f"{name}_partners")
        assert dataset is not None
        return Feed(
            dataset=dataset,
            needs=prepared.loss.needs,
            reference=self.logps.get(name),
            partners=None if partners is None else Partners(partners, self.logps[f"{name}_partners"]),
            precision=prepared.recipe.train.precision,
        )

    @contextmanager
    def open(self) -> Iterator[Scorer]:
        """Give the reference model itself: the online one, the policy's base, or loaded for as long as it is used."""
        recipe = self.prepared.recipe
        if self.online is not None:
            with self.online.reference() as scorer:
                yield scorer
        elif self.is_policys_base and self._policy is not None:
            with self._on_policys_base().reference() as scorer:
                yield scorer
        else:
            probe = probe_group(self.prepared.data.train, self.prepared.data.eval)
            with reference_in_memory(self.source, recipe, probe, settled=self._settled) as scorer:
                self._settled = scorer.layout, scorer.backend
                yield scorer


def open_reference(prepared: Prepared, console: Console, *, only: Collection[str] | None = None) -> RunReference:
    """Make the reference of a run ready before the policy is loaded; `only` names the data that will be read."""
    source = reference_source(prepared.recipe)
    if not prepared.cached:
        return RunReference(prepared, source, None, BuildReport(0, 0, 0, 0, 0.0), {})
    cached = cached_reference(prepared, console, only=only)
    logps = dict[str, ReferenceLogps](cached.logps)
    return RunReference(prepared, source, cached.identity, cached.report, logps, certificate=cached.certificate)

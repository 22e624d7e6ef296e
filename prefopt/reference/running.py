"""The reference during a run: its log-probs of the data, and the model itself when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from prefopt.forward import Layout, Scorer
from prefopt.layout import probe_group
from prefopt.models import ModelSource
from prefopt.prepare import Prepared, reference_source
from prefopt.recipe import Recipe
from prefopt.reference.build import BuildReport
from prefopt.reference.identity import ReferenceIdentity
from prefopt.reference.opening import cached_reference, load_reference, reference_in_memory
from prefopt.reference.source import OnlineLogps, ReferenceLogps


@dataclass
class RunReference:
    """The reference of one run, cached or online."""

    prepared: Prepared
    source: ModelSource
    identity: ReferenceIdentity | None
    """None for an online reference, which needs none."""
    report: BuildReport
    train: ReferenceLogps | None
    eval: ReferenceLogps | None
    online: OnlineLogps | None = None
    _policy: Scorer | None = None
    _layout: Layout | None = None

    @property
    def is_policy_without_adapter(self) -> bool:
        """Whether the reference is the policy with its adapter switched off: no second model is needed."""
        recipe = self.prepared.recipe
        same = recipe.reference.quantization == recipe.model.quantization
        return recipe.adapter is not None and recipe.reference.model is None and same

    def use_policy(self, scorer: Scorer) -> None:
        """Take note of the policy; an online reference that is its base computes on it from now on."""
        self._policy = scorer
        recipe, data = self.prepared.recipe, self.prepared.data
        if recipe.reference.cache != "off":
            return
        if self.is_policy_without_adapter:
            self.online = OnlineLogps(scorer, precision=recipe.train.precision, adapter_off=True)
        else:
            reference = load_reference(self.source, recipe, probe_group(data.train))
            self.online = OnlineLogps(reference, precision=recipe.train.precision)
        self.train = self.online if self.prepared.loss.needs.reference else None
        self.eval = self.online

    @contextmanager
    def open(self) -> Iterator[Scorer]:
        """Give the reference model itself: the online one, the policy's base, or loaded for as long as it is used."""
        recipe = self.prepared.recipe
        if self.online is not None:
            with self.online.reference() as scorer:
                yield scorer
        elif self.is_policy_without_adapter and self._policy is not None:
            base = OnlineLogps(self._policy, precision=recipe.train.precision, adapter_off=True)
            with base.reference() as scorer:
                yield scorer
        else:
            probe = probe_group(self.prepared.data.train)
            with reference_in_memory(self.source, recipe, probe, layout=self._layout) as scorer:
                self._layout = scorer.layout
                yield scorer


def open_reference(prepared: Prepared, console: Console) -> RunReference:
    """Make the reference of a run ready before the policy is loaded."""
    recipe: Recipe = prepared.recipe
    source = reference_source(recipe)
    nothing = BuildReport(0, 0, 0, 0, 0.0)
    if recipe.reference.cache == "off":
        return RunReference(prepared, source, None, nothing, None, None)
    cached = cached_reference(prepared, console)
    return RunReference(prepared, source, cached.identity, cached.report, cached.train, cached.eval)

"""The reference during a run: its log-probs of the data, and the model itself when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from prefopt.feed import Feed, Partners
from prefopt.forward import Layout, ReferenceLogps, Scorer
from prefopt.layout import probe_group
from prefopt.models import ModelSource
from prefopt.prepare import Prepared, reference_source
from prefopt.reference.build import BuildReport
from prefopt.reference.identity import ReferenceIdentity
from prefopt.reference.opening import cached_reference, load_reference, reference_in_memory
from prefopt.reference.source import OnlineLogps


@dataclass
class RunReference:
    """The reference of one run, cached or online."""

    prepared: Prepared
    source: ModelSource
    identity: ReferenceIdentity | None
    """None for an online reference, which needs none."""
    report: BuildReport
    logps: dict[str, ReferenceLogps]
    """By data: `train` and `eval`, and `train_partners` and `eval_partners` of losses that read mismatched ones."""
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
        if self.prepared.cached:
            return
        precision, whole = recipe.train.precision, self.prepared.loss.needs.sequential_kl
        if self.is_policy_without_adapter:
            self.online = OnlineLogps(scorer, precision=precision, adapter_off=True, distribution=whole)
        else:
            reference = load_reference(self.source, recipe, probe_group(data.train))
            self.online = OnlineLogps(reference, precision=precision, distribution=whole)
        self.logps = dict.fromkeys((name for name, _ in self.prepared.read_by_reference()), self.online)

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
    source = reference_source(prepared.recipe)
    if not prepared.cached:
        return RunReference(prepared, source, None, BuildReport(0, 0, 0, 0, 0.0), {})
    cached = cached_reference(prepared, console)
    return RunReference(prepared, source, cached.identity, cached.report, dict(cached.logps))

"""The certificate: how far a quantized reference is from its own weights at full precision, on a sample.

Statistics for people, and the sample itself, from which the effect on any loss at any beta is worked out again
without a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from prefopt.reference.certified_sample import CertifiedSample
from prefopt.reference.error_statistics import ErrorStatistics, Share, error_statistics, plain, share_of
from prefopt.reference.loss_effect import LossEffect, loss_effect
from prefopt_losses import Loss

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is known of one reference's error."""

    fingerprint: str
    """Of the reference whose log-probs the cache holds."""
    quantization: str
    full_precision: str
    """In words, what it was compared with."""
    sample: CertifiedSample
    drawn_from: int
    """Comparisons of the data from which the sample was taken."""
    versions: dict[str, str]
    device: str
    made: str
    """UTC, ISO 8601."""

    @property
    def comparisons(self) -> int:
        """Comparisons of the sample."""
        return len(self.sample.comparisons)

    @property
    def prompts(self) -> int:
        """Different prompts of the sample."""
        return len(np.unique(self.sample.prompts))

    @cached_property
    def errors(self) -> dict[str, ErrorStatistics]:
        """Statistics of cached minus full, by `token`, `completion`, and for pairs `margin`, `margin_per_token`.

        Nats; `margin_per_token` is chosen minus rejected mean log-prob per token, what losses of means compare.
        """
        one = self.sample
        found = {
            "token": error_statistics(one.token_errors, np.repeat(one.prompts, one.lengths)),
            "completion": error_statistics(one.completion_errors, one.prompts),
            "margin": error_statistics(one.margins(one.completion_errors), one.pair_prompts),
            "margin_per_token": error_statistics(one.margins(one.completion_errors / one.lengths), one.pair_prompts),
        }
        return {name: statistics for name, statistics in found.items() if statistics is not None}

    @cached_property
    def sign_changes(self) -> dict[str, Share]:
        """Pairs that the reference itself ranks the other way than at full precision: of `all`, and of `confident`.

        Confident are those whose margin at full precision is larger than the sample's median one.
        """
        one = self.sample
        exact, cached, prompts = one.margins(one.full), one.margins(one.cached), one.pair_prompts
        changed = np.sign(exact) != np.sign(cached)
        sure = np.abs(exact) > np.median(np.abs(exact)) if len(exact) else np.zeros(0, dtype=bool)
        found = {"all": share_of(changed, prompts), "confident": share_of(changed[sure], prompts[sure])}
        return {name: share for name, share in found.items() if share is not None}

    @cached_property
    def limited(self) -> ErrorStatistics:
        """What `reference.max_margin_error` bounds: the error of margins, of data without pairs of completions."""
        one = self.sample
        if len(one.pairs):
            errors, prompts = one.margins(one.completion_errors), one.pair_prompts
        else:
            errors, prompts = one.completion_errors, one.prompts
        found = error_statistics(errors, prompts)
        assert found is not None  # no certificate is made of an empty sample
        return found

    def effect(self, loss: Loss) -> LossEffect | None:
        """Return what the error does to a loss; None where it cannot be stated."""
        return loss_effect(loss, self.sample)

    def summary(self, loss: Loss) -> dict[str, Any]:
        """Return the part that belongs into a run's result: everything but the sample."""
        effect = self.effect(loss)
        return {**self._stated(), "effect": None if effect is None else effect.as_dict()}

    def as_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"format": FORMAT, **self._stated(), "sample": self.sample.as_dict()}

    def _stated(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "quantization": self.quantization,
            "full_precision": self.full_precision,
            "comparisons": self.comparisons,
            "prompts": self.prompts,
            "drawn_from": self.drawn_from,
            "errors": plain(self.errors),
            "sign_changes": plain(self.sign_changes),
            "versions": self.versions,
            "device": self.device,
            "made": self.made,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Certificate:
        """Read what `as_dict` gave; raises KeyError, TypeError or ValueError for anything else."""
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']}")
        names = ("fingerprint", "quantization", "full_precision", "drawn_from", "versions", "device", "made")
        return cls(sample=CertifiedSample.from_dict(stored["sample"]), **{name: stored[name] for name in names})

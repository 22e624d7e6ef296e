"""The certificate: how far a quantized reference is from its own weights at full precision, on a sample.

It lies beside the shards as `certificate-<fingerprint>.json`: statistics for people, and the sample itself, from
which the effect on any loss at any beta is worked out again without a model. One per reference; a larger sample
replaces a smaller one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from prefopt.data.groups import GroupDataset
from prefopt.errors import ModelError, Problem
from prefopt.forward import Scorer
from prefopt.models import ModelSource, default_device
from prefopt.prepare import Prepared, reference_source, resolve_token_budget
from prefopt.recipe import Recipe
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.certificate_table import certificate_table, sentence
from prefopt.reference.certified_sample import CertifiedSample, cached_part, certifiable, score_again
from prefopt.reference.error_statistics import ErrorStatistics, Share, error_statistics, plain, share_of
from prefopt.reference.full_precision import described, full_precision, why_not_held
from prefopt.reference.loss_effect import LossEffect, loss_effect
from prefopt.reference.publishing import WRITING, discard, locked, partial_in
from prefopt_losses import Loss

FORMAT = 1
OpenModel = Callable[[ModelSource], AbstractContextManager[Scorer]]
"""Holds a model in memory for as long as the context lasts."""


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


def certificate_file(cache: ReferenceCache) -> Path:
    """Return where the certificate of a cache lies."""
    return cache.folder / f"certificate-{cache.identity.fingerprint[:16]}.json"


def read_certificate(cache: ReferenceCache) -> Certificate | None:
    """Read the certificate of a cache; None where there is none of this very reference that can be read."""
    try:
        found = Certificate.from_dict(json.loads(certificate_file(cache).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # a torn or foreign file certifies nothing
        return None
    return found if found.fingerprint == cache.identity.fingerprint else None


def store_certificate(cache: ReferenceCache, certificate: Certificate) -> Certificate:
    """Put a certificate in place, whole or not at all; returns the one that stands, which may be a larger one."""
    with locked(cache.folder, WRITING):
        standing = read_certificate(cache)
        if standing is not None and standing.comparisons > certificate.comparisons:
            return standing
        partial = partial_in(cache.folder)
        try:
            with partial.open("x", encoding="utf-8") as stream:
                json.dump(certificate.as_dict(), stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, certificate_file(cache))
        finally:
            discard(partial)
    return certificate


def why_no_certificate(recipe: Recipe) -> str | None:
    """Say why a recipe's reference has no error to be stated; None where it has."""
    if recipe.reference.quantization == "none":
        return "the reference is not quantized"
    if recipe.reference.quantization == recipe.model.quantization and recipe.reference.model in (
        None,
        recipe.model.path,
    ):
        return "the reference is the policy's own start, quantized alike: no error lies between them"
    return None


def certify(
    prepared: Prepared, cache: ReferenceCache, console: Console, *, open_model: OpenModel, afresh: bool = False
) -> Certificate | None:
    """Return the certificate of a run's reference; where it is missing or its sample too small, make it.

    Args:
        prepared: the run.
        cache: filled for it.
        console: where to say what was found.
        open_model: loads a model; nothing else needs to be in memory.
        afresh: score anew although a certificate stands.

    Returns:
        None where there is nothing to certify, or full precision cannot be held and no certificate stands.

    Raises:
        ModelError: the error is larger than `reference.max_margin_error`.
    """
    recipe = prepared.recipe
    datasets = [dataset for _, dataset in prepared.read_by_reference()]
    if why_no_certificate(recipe) is not None or not datasets:
        return None
    found = read_certificate(cache)
    enough = found is not None and found.comparisons >= certifiable(datasets[0])
    # One process of a launch makes it; the others would load the same model for nothing.
    if int(os.environ.get("RANK", "0")) == 0 and (afresh or not enough):
        found = _made(prepared, cache, console, datasets[0], open_model) or found
    elif found is not None:
        console.print(sentence(found, prepared.loss))
    if found is not None:
        refuse_large_error(recipe, found)
    return found


def _made(
    prepared: Prepared, cache: ReferenceCache, console: Console, dataset: GroupDataset, open_model: OpenModel
) -> Certificate | None:
    """Score a sample at full precision and keep what it says; None where that cannot be done, which is said."""
    recipe = prepared.recipe
    quantized = reference_source(recipe)
    source = full_precision(quantized)
    part = cached_part(dataset, cache)
    lacking = why_not_held(source) if part.groups else "no comparison of these data is in the cache"
    if lacking is not None:
        console.print(f"no certificate of the {quantized.quantization} reference: {lacking}")
        return None
    budget = resolve_token_budget(recipe.reference.token_budget, default_device())
    with open_model(source) as scorer:
        sample = score_again(part, cache, scorer, precision=recipe.train.precision, token_budget=budget)
    certificate = store_certificate(
        cache,
        Certificate(
            fingerprint=cache.identity.fingerprint,
            quantization=str(quantized.quantization),
            full_precision=described(source),
            sample=sample,
            drawn_from=len(dataset.layout.chosen),
            versions=versions(),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            made=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )
    console.print(certificate_table(certificate, prepared.loss))
    return certificate


def versions() -> dict[str, str]:
    """Return the versions that decide what quantized weights are and how they are multiplied."""
    found = {}
    for name in ("torch", "transformers", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def refuse_large_error(recipe: Recipe, certificate: Certificate) -> None:
    """Raise ModelError where 95 % of the margins do not stay within `reference.max_margin_error`."""
    allowed, error = recipe.reference.max_margin_error, certificate.limited
    if allowed is None or error.p95_abs <= allowed:
        return
    interval = error.p95_abs_interval
    sure = "" if interval is None else f" (95 % interval {interval[0]:.3g} to {interval[1]:.3g})"
    raise ModelError(
        Problem(
            "reference.max_margin_error",
            f"95 % of the margins within {allowed:g} nats of full precision",
            f"{error.p95_abs:.3g} nats{sure} with {certificate.quantization}, by the certificate on "
            f"{certificate.comparisons} comparisons",
            "use int8 or no quantization for the reference, or raise the limit knowingly; the cache is kept",
        )
    )

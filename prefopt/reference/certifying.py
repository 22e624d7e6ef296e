"""Making a certificate: a sample of what the cache holds is scored at full precision; the recipe's limit may refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console

from prefopt.data.groups import GroupDataset
from prefopt.errors import ModelError, Problem
from prefopt.forward import Scorer
from prefopt.models import ModelSource, default_device
from prefopt.prepare import Prepared, reference_source, resolve_token_budget
from prefopt.recipe import Recipe
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.certificate import Certificate
from prefopt.reference.certificate_file import read_certificate, store_certificate
from prefopt.reference.certificate_table import certificate_table, sentence
from prefopt.reference.certified_sample import cached_part, certifiable, score_again
from prefopt.reference.full_precision import described, full_precision, why_not_held

OpenModel = Callable[[ModelSource], AbstractContextManager[Scorer]]
"""Holds a model in memory for as long as the context lasts."""


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
    certificate = Certificate(
        fingerprint=cache.identity.fingerprint,
        quantization=str(quantized.quantization),
        full_precision=described(source),
        sample=sample,
        drawn_from=len(dataset.layout.chosen),
        versions=versions(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        certificate = store_certificate(cache, certificate)
    except OSError as error:  # a folder that may only be read serves as it is
        console.print(f"the certificate is not kept: {cache.folder}: {error.strerror or error}")
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

"""Certificates made of made samples, and of small quantized models."""

from __future__ import annotations

import numpy as np
from world import quiet

from prefopt.data.groups import Comparison
from prefopt.prepare import prepare
from prefopt.probe import probe_group
from prefopt.reference.certificate import Certificate
from prefopt.reference.certified_sample import CertifiedSample
from prefopt.reference.certifying import certify
from prefopt.reference.opening import cached_reference, reference_in_memory


def made_sample(pairs=40, seed=0, *, scale=2.0, unpaired=False):
    """Completions of random log-probs and errors, two of each prompt."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 20, 2 * pairs)
    token_errors = generator.normal(0, scale / 3, lengths.sum()).astype(np.float16)
    errors = np.add.reduceat(token_errors.astype(np.float64), np.r_[0, np.cumsum(lengths)[:-1]])
    full = -generator.uniform(1, 60, 2 * pairs)
    return CertifiedSample(
        prompts=np.repeat(np.arange(pairs), 2),
        lengths=lengths,
        full=full,
        cached=full + errors,
        token_errors=token_errors,
        comparisons=tuple(
            Comparison(None if unpaired and n % 2 else 2 * n, None if unpaired and not n % 2 else 2 * n + 1,
                       0.5 + generator.random() / 2, n + 1, (generator.random(),), (-1.0,), 0.3)
            for n in range(pairs)
        ),
    )  # fmt: skip


def made_certificate(sample=None, **changes):
    sample = sample or made_sample()
    facts = {
        "fingerprint": "f" * 64, "quantization": "nf4", "full_precision": "float32", "sample": sample,
        "drawn_from": 99, "versions": {"torch": "1"}, "device": "cpu", "made": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Certificate(**{**facts, **changes})


def opened(recipe, *, forbid=False, **options):
    """Fill the cache of a recipe and certify it; `forbid` fails where a model would be loaded."""
    prepared = prepare(recipe, quiet=True)
    reference = cached_reference(prepared, quiet())

    def open_model(source):
        assert not forbid, "loaded a model"
        return reference_in_memory(source, recipe, probe_group(prepared.data.train))

    console = options.pop("console", quiet())
    return reference.cache, certify(prepared, reference.cache, console, open_model=open_model, **options)

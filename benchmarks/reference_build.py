"""How fast the reference cache is built: full precision, int8 and nf4; prompts computed once or for every completion.

    python benchmarks/reference_build.py DATA MODEL [--prompts 40 --repeats 5 --max-length 512 --precision fp32]

DATA is a preference file as a recipe names it, MODEL a model folder (benchmarks/make_small_llama.py makes one). All
completions of the first so many prompts are planned, read, scored and committed into an empty cache, once per
combination to warm up and then so many times, all combinations in turn, so that a busy minute hits all alike. The rate
counts completion tokens, which are the same for all; loading and quantizing the model are timed apart.

    shared      a prompt once for all its completions of all rows, no padding
    unshared    a row per completion, padded to its batch; what models without registered attention get

On a busy machine set OMP_NUM_THREADS=1: two threads that wait for each other are many times slower than one.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from prefopt.data.groups import GroupDataset
from prefopt.forward import Layout, Scorer
from prefopt.prepare import Prepared, prepare, reference_source, resolve_token_budget
from prefopt.probe import probe_group
from prefopt.recipe import recipe_from_mapping
from prefopt.reference.build import fill_cache
from prefopt.reference.build_plan import Texts, Wanted, distinct_texts
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.identity import identify
from prefopt.reference.keys import dataset_keys
from prefopt.reference.opening import load_reference

QUANTIZATIONS = ("none", "int8", "nf4")
LAYOUTS: tuple[Layout, ...] = ("shared", "unshared")


@dataclass
class Variant:
    """One reference in one layout, and its build times."""

    quantization: str
    layout: Layout
    scorer: Scorer
    prepared: Prepared
    load_seconds: float
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    arguments = parse_arguments()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 says at every product that fp32 becomes fp16
    print_conditions(arguments)
    variants = list(load_variants(arguments))
    dataset = first_prompts(variants[0].prepared.data.train, arguments.prompts)
    began = time.perf_counter()
    wanted = [Wanted(dataset, *dataset_keys(dataset))]
    key_seconds = time.perf_counter() - began
    texts = distinct_texts(wanted)
    print_texts(texts, dataset, key_seconds)
    for repeat in range(arguments.repeats + 1):
        for variant in variants:
            seconds = build_once(variant, wanted, arguments)
            if repeat:  # the first round warms up
                variant.seconds.append(seconds)
    print_rates(variants, int(texts.tokens.sum()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", help="preference data, as data.train of a recipe")
    parser.add_argument("model", help="model folder")
    parser.add_argument("--prompts", type=int, default=40, help="how many different prompts to take")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--token-budget", type=int, default=None, help="computed tokens per batch")
    return parser.parse_args()


def load_variants(arguments: argparse.Namespace) -> Iterator[Variant]:
    """Load each reference once; its two layouts share it."""
    for quantization in QUANTIZATIONS:
        recipe = recipe_from_mapping(
            {
                "model": arguments.model,
                "data": {"train": arguments.data, "max_length": arguments.max_length},
                "loss": "dpo",
                "reference": {"quantization": quantization},
                "train": {"precision": arguments.precision},
            },
            name="benchmark",
        )
        prepared = prepare(recipe, quiet=True)
        began = time.perf_counter()
        scorer = load_reference(reference_source(recipe), recipe, probe_group(prepared.data.train))
        seconds = time.perf_counter() - began
        for layout in LAYOUTS:
            yield Variant(quantization, layout, scorer, prepared, seconds)


def first_prompts(dataset: GroupDataset, count: int) -> GroupDataset:
    """Return every group whose prompt is among the first so many different ones."""
    hashes = dataset.layout.prompt_hashes
    first = np.sort(np.unique(hashes, return_index=True)[1])[:count]
    return dataset.select(np.flatnonzero(np.isin(hashes, hashes[first])))


def build_once(variant: Variant, wanted: list[Wanted], arguments: argparse.Namespace) -> float:
    """Build an empty cache and return the seconds it took."""
    recipe = variant.prepared.recipe
    variant.scorer.set_layout(variant.layout)
    budget = resolve_token_budget(arguments.token_budget or "auto", next(variant.scorer.parameters()).device)
    with tempfile.TemporaryDirectory() as folder:
        cache = ReferenceCache(Path(folder) / "cache", identify(reference_source(recipe)))
        report = fill_cache(
            cache, wanted, scorer=lambda: variant.scorer, precision=recipe.train.precision, token_budget=budget
        )
    return report.seconds


def print_conditions(arguments: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(
        f"{time.strftime('%Y-%m-%d')}; {device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; load "
        f"{os.getloadavg()[0]:.1f}; torch {torch.__version__}; {arguments.precision}, "
        f"max_length {arguments.max_length}, {arguments.repeats} repeats in turn after one to warm up\n"
    )


def print_texts(texts: Texts, dataset: GroupDataset, key_seconds: float) -> None:
    """Say what is scored, and what sharing saves before anything is computed."""
    completions = int(texts.tokens.sum() - len(texts))
    _, first = np.unique(texts.prompts, return_index=True)
    per_row = int(dataset.layout.prompt_lengths.sum() + (dataset.layout.completion_lengths - 1).sum())
    print(
        f"{len(dataset):,} rows, {len(first):,} prompts, {len(texts):,} different completions of "
        f"{int(texts.tokens.sum()):,} tokens; keys read in {key_seconds:.2f} s\n"
        f"tokens to compute: {per_row:,} with the prompt once per row and every completion of every row; "
        f"{int(texts.prompt_tokens.sum()) + completions:,} with each different text once; "
        f"{int(texts.prompt_tokens[first].sum()) + completions:,} with each different prompt once too\n"
    )


def print_rates(variants: list[Variant], tokens: int) -> None:
    print("| quantization | layout | completion tokens/s, median | lowest | highest | model loaded in |")
    print("|---|---|---|---|---|---|")
    for one in variants:
        rates = [tokens / seconds for seconds in one.seconds]
        print(
            f"| {one.quantization} | {one.layout} | {statistics.median(rates):,.0f} | {min(rates):,.0f} | "
            f"{max(rates):,.0f} | {one.load_seconds:.1f} s |"
        )
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()

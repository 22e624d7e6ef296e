"""State how wrong each quantization of a reference is on real pairs, and what that does to dpo and ipo.

    python benchmarks/reference_error.py MODEL DATA [--pairs 128 --max-length 512 --precision fp32]

MODEL is a folder or hub name with its tokenizer, DATA is JSON lines, plain or gzipped, with `prompt`, `chosen` and
`rejected`. The first pair of each of `--pairs` prompts is scored by every quantized model and at full precision;
the tables are Markdown, the intervals 95 % by bootstrap over prompts. `benchmarks/make_small_llama.py` makes a model
where none can be downloaded.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from prefopt.prepare import prepare
from prefopt.probe import probe_group
from prefopt.recipe import recipe_from_mapping
from prefopt.reference.certificate import Certificate
from prefopt.reference.certifying import certify
from prefopt.reference.error_statistics import ErrorStatistics, Interval, Share
from prefopt.reference.opening import cached_reference, reference_in_memory
from prefopt_losses import get_loss

KINDS = {
    "int8": "int8",
    "nf4": {"type": "nf4", "double": True},
    "nf4, scales not quantized": {"type": "nf4", "double": False},
    "fp4": {"type": "fp4", "double": True},
    "fp4, scales not quantized": {"type": "fp4", "double": False},
}
BETAS = (0.01, 0.1, 0.5)
LOSSES = ("dpo", "ipo")


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = one_pair_of_each_prompt(arguments.data, arguments.pairs)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
        certificates = {kind: certified(arguments, folder, kind) for kind in KINDS}
    any_one = next(iter(certificates.values()))
    print(f"{any_one.comparisons} comparisons of {any_one.prompts} prompts, {any_one.sample.lengths.sum():,} tokens; ")
    print(f"full precision: {any_one.full_precision}; {any_one.device}; {any_one.versions}\n")
    print(error_table(certificates))
    for loss in LOSSES:
        print(effect_table(certificates, loss))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("data", type=Path, help="preference pairs: .jsonl or .jsonl.gz")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    return parser.parse_args()


def one_pair_of_each_prompt(file: Path, count: int) -> list[dict[str, object]]:
    """Return the first usable pair of each of `count` prompts."""
    opened = gzip.open if file.suffix == ".gz" else open
    rows: dict[str, dict[str, object]] = {}
    with opened(file, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["chosen"] and row["rejected"] and row["chosen"] != row["rejected"]:
                rows.setdefault(str(row["prompt"]), {name: row[name] for name in ("prompt", "chosen", "rejected")})
            if len(rows) == count:
                break
    return list(rows.values())


def certified(arguments: argparse.Namespace, folder: Path, kind: str) -> Certificate:
    """Fill a cache with a quantized reference and certify it."""
    print(kind, file=sys.stderr, flush=True)
    recipe = recipe_from_mapping(
        {
            "model": arguments.model,
            "data": {"train": str(folder / "pairs.jsonl"), "max_length": arguments.max_length},
            "loss": "dpo",
            "train": {"precision": arguments.precision},
            "reference": {"quantization": KINDS[kind], "cache": str(folder / kind)},
        },
        name="reference-error",
    )
    prepared, console = prepare(recipe, quiet=True), Console(quiet=True)
    cache = cached_reference(prepared, console).cache
    probe = probe_group(prepared.data.train)
    found = certify(
        prepared, cache, console, open_model=lambda source: reference_in_memory(source, recipe, probe), afresh=True
    )
    if found is None:
        raise SystemExit(f"{arguments.model} cannot be held at full precision here")
    return found


def error_table(certificates: dict[str, Certificate]) -> str:
    """Nats: per token, completion and margin."""
    lines = table_head("reference", "per token: rms", "per completion: mean", "mean size", "95 % within",
                       "per margin: mean", "mean size", "95 % within", "largest", "ranked the other way")  # fmt: skip
    for kind, one in certificates.items():
        token, completion, margin = (one.errors[name] for name in ("token", "completion", "margin"))
        lines.append(row(
            kind, f"{token.rms:.2g}", with_interval(completion, "mean"), with_interval(completion, "mean_abs"),
            with_interval(completion, "p95_abs"), with_interval(margin, "mean"), with_interval(margin, "mean_abs"),
            with_interval(margin, "p95_abs"), f"{margin.max_abs:.2g}", percent(one.sign_changes["all"]),
        ))  # fmt: skip
    return "\n".join(lines) + "\n"


def effect_table(certificates: dict[str, Certificate], loss: str) -> str:
    """What the loss sees where policy = full precision."""
    lines = table_head(f"{loss}: reference", "beta", "margin x: mean size", "loss: mean change", "f'(x)/f'(0): mean",
                       "off by, mean", "off by, 95 % within", "off by > 10 %")  # fmt: skip
    for kind, one in certificates.items():
        for beta in BETAS:
            effect = one.effect(get_loss(loss, beta=beta))
            assert effect is not None  # both losses read a reference
            assert effect.gradient_weight is not None
            assert effect.weight_changes is not None
            weight = effect.gradient_weight
            lines.append(row(
                kind, f"{beta:g}", with_interval(effect.margin, "mean_abs"), with_interval(effect.value, "mean"),
                with_interval(weight, "mean", lambda value: f"{1 + value:.3f}"),
                with_interval(weight, "mean_abs", "{:.1%}".format), f"{weight.p95_abs:.1%}",
                percent(effect.weight_changes),
            ))  # fmt: skip
    return "\n".join(lines) + "\n"


def with_interval(error: ErrorStatistics, name: str, shown: Callable[[float], str] = "{:.2g}".format) -> str:
    interval: Interval | None = getattr(error, f"{name}_interval")
    text = shown(getattr(error, name))
    return text if interval is None else f"{text} ({shown(interval[0])} to {shown(interval[1])})"


def percent(share: Share) -> str:
    low, high = share.interval or (0.0, 1.0)
    return f"{share.share:.1%} ({low:.1%} to {high:.1%})"


def table_head(*names: str) -> list[str]:
    return [row(*names), row(*["---"] * len(names))]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

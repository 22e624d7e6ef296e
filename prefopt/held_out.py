"""What a policy makes of every single held-out comparison: the rows from which two runs are compared pair by pair."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from prefopt.data.groups import GroupDataset
from prefopt.objective import Scored, paired_record
from prefopt.planning import Slice
from prefopt_losses import Loss, loss_metrics

FILE = "held_out.parquet"


class HeldOut(TypedDict):
    """One comparison. Log-ratios are policy minus reference, in nats per completion."""

    prompt: str
    """Digest of the prompt's token ids: what two runs have in common, and what a split is made by."""
    group: int
    comparison: int
    chosen_tokens: int
    rejected_tokens: int
    chosen_logratio: float | None
    rejected_logratio: float | None
    margin: float | None
    """Beta times the score difference that the loss ranks by."""
    correct: float | None
    """1 where the margin is above 0, a half where it is 0."""


SCHEMA = pa.schema(
    [("prompt", pa.string()), ("group", pa.int64()), ("comparison", pa.int64())]
    + [(f"{side}_tokens", pa.int64()) for side in ("chosen", "rejected")]
    + [(name, pa.float64()) for name in ("chosen_logratio", "rejected_logratio", "margin", "correct")]
)


def held_out_rows(loss: Loss, dataset: GroupDataset, scored: Scored, micro: Sequence[Slice]) -> list[HeldOut]:
    """Return one row per comparison of a micro-batch, in its order."""
    record = paired_record(scored, needs=loss.needs)
    metrics = {name: values.double().cpu().tolist() for name, values in loss_metrics(loss, record).items()}
    lengths = [each.cpu().tolist() for each in (record.chosen_lengths, record.rejected_lengths) if each is not None]
    places = [(part.group, number) for part in micro for number in part.comparisons]
    digests = {part.group: _digest(dataset, part.group) for part in micro}

    def value(name: str, row: int) -> float | None:
        return metrics[name][row] if name in metrics else None

    return [
        HeldOut(
            prompt=digests[group], group=group, comparison=int(number),
            chosen_tokens=int(lengths[0][row]), rejected_tokens=int(lengths[-1][row]),
            chosen_logratio=value("logratios/chosen", row), rejected_logratio=value("logratios/rejected", row),
            margin=value("rewards/margins", row), correct=value("rewards/accuracies", row),
        )
        for row, (group, number) in enumerate(places)
    ]  # fmt: skip


def _digest(dataset: GroupDataset, group: int) -> str:
    return hashlib.blake2b(dataset[group].prompt.tobytes(), digest_size=8).hexdigest()


def write_held_out(file: Path, rows: Sequence[HeldOut]) -> None:
    """Write the rows whole, in the order of groups and comparisons, which no token budget changes."""
    ordered = sorted(rows, key=lambda row: (row["group"], row["comparison"]))
    partial = file.with_name(f".{file.name}.partial")
    pq.write_table(pa.Table.from_pylist([dict(row) for row in ordered], schema=SCHEMA), partial)
    partial.replace(file)

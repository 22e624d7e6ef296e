"""Every number of a report as CSV and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefopt.report.markdown import columns_of


def write_table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write rows as NAME.csv and NAME.parquet; nothing where there are none."""
    if not rows:
        return []
    columns = columns_of(rows)
    plain, packed = folder / f"{name}.csv", folder / f"{name}.parquet"
    with plain.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.table({column: _column([row.get(column) for row in rows]) for column in columns}), packed)
    return [plain, packed]


def _column(values: Sequence[Any]) -> pa.Array:
    """Return values as numbers where all are, else as text."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        whole = all(isinstance(value, int) for value in known)
        return pa.array(values, pa.int64() if whole and known else pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())

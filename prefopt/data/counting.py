"""A tokenized source -> what became of its rows."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from prefopt.data.formats import Kind
from prefopt.data.report import Cut, Missing, SourceReport
from prefopt.data.tokenized import TokenizedSource


def source_report(tokenized: TokenizedSource) -> SourceReport:
    """Count the rows of a source: read, kept, dropped and cut by reason."""
    rows = tokenized.table.with_format("arrow")[:]
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(rows["dropped"]).to_pylist()}
    kept = counts.pop("", 0)

    def total(column: str) -> int:
        return pc.sum(rows[column]).as_py() or 0

    columns = {Cut.COMPLETION: "completion_cut", Cut.PROMPT: "prompt_cut", Cut.REPEATED: "repeated"}
    cut = {reason.value: total(column) for reason, column in columns.items()}
    return SourceReport(
        name=tokenized.source.name,
        role=tokenized.source.role,
        rows_read=rows.num_rows,
        rows_kept=kept,
        dropped=counts,
        cut={reason: count for reason, count in cut.items() if count},
        boundary_merges=total("merged"),
        template_mismatches=total("mismatched"),
        without=_without(rows, kept, tokenized.kind),
        from_cache=tokenized.from_cache,
    )


def _without(rows: pa.Table, kept: int, kind: Kind | None) -> dict[str, int]:
    """Return how many kept rows lack what others of their source have."""
    is_kept = pc.equal(rows["dropped"], "")
    there = {
        Missing.SCORE: pc.greater(pc.list_value_length(rows["scores"]), 0),
        Missing.VALUE: pc.is_valid(rows["value"]),
    }
    if kind == "paired":
        there[Missing.GOLD] = pc.greater(pc.list_value_length(rows["completions"]), 2)
    counts = {what.value: kept - (pc.sum(pc.and_(is_kept, has)).as_py() or 0) for what, has in there.items()}
    return {what: count for what, count in counts.items() if 0 < count < kept}

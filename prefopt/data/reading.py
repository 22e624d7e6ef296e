"""The records of a source -> a table of text rows on disk, every wrong row named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
from datasets.utils import tqdm

from prefopt.data.cells import BadRow
from prefopt.data.files import Record
from prefopt.data.filters import Condition, keeps, unknown_columns
from prefopt.data.formats import JUDGED, Kind, TextRow, by_role, kind_of, order_of, text_row
from prefopt.data.report import Dropped
from prefopt.data.sources import Source
from prefopt.errors import DataError, Problem, suggest

TEXT_SCHEMA = pa.schema(
    {
        "prompt": pa.large_string(),
        "completions": pa.list_(pa.large_string()),
        "ranked": pa.bool_(),
        "conversational": pa.bool_(),
        "template_arguments": pa.large_string(),
        "preference_probability": pa.float64(),
        "scores": pa.list_(pa.list_(pa.float64())),
        "list_scores": pa.list_(pa.float64()),
        "value": pa.float64(),
        "dropped": pa.string(),
        "row": pa.int64(),
    }
)
MAX_PROBLEMS = 20
"""Wrong rows named per source; reading stops there."""
BATCH_ROWS = 1000


@dataclass
class Reading:
    """What is known of a source while it is read."""

    source: Source
    rows: int = 0
    kind: Kind | None = None
    order: str | None = None
    """What orders the completions of its lists, see `order_of`."""
    models: int = 0
    """Reward models that score each completion; 0 before the first score."""
    first_conversation: str = ""
    """Where the first conversation stands."""
    first_plain: str = ""
    """Where the first plain row stands."""
    seen: dict[str, None] = field(default_factory=dict)
    """Column names, in order of appearance."""
    problems: list[Problem] = field(default_factory=list)


def write_text_rows(source: Source, conditions: Mapping[str, Condition], path: Path, *, quiet: bool) -> Reading:
    """Read a source into an Arrow file with `TEXT_SCHEMA`, one batch of rows in memory at a time.

    Raises:
        DataError: what is wrong with the source, at most `MAX_PROBLEMS` rows of it; or no rows at all.
    """
    reading = Reading(source)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, TEXT_SCHEMA) as writer:
        batch: list[dict[str, object]] = []
        for row in _text_rows(reading, conditions, quiet=quiet):
            batch.append({**asdict(row), "row": reading.rows})
            if len(batch) == BATCH_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=TEXT_SCHEMA))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=TEXT_SCHEMA))
    if not reading.problems and reading.rows:
        found = list(reading.seen)
        reading.problems += unknown_columns(conditions, found, source.name)
        reading.problems += _unmapped(source, found, source.name)
    elif not reading.problems:
        reading.problems.append(Problem(source.name, "at least one row", "none", "check the file and the split"))
    if reading.problems:
        raise DataError(_collapsed(reading.problems))
    return reading


def _collapsed(problems: Sequence[Problem]) -> list[Problem]:
    """Say once what is wrong in the same way with several rows."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        alike.setdefault((problem.expected, problem.given, problem.fix), []).append(problem.where)
    return [
        Problem(places[0] + (f", and {len(places) - 1} rows more" if len(places) > 1 else ""), *said)
        for said, places in alike.items()
    ]


def _text_rows(reading: Reading, conditions: Mapping[str, Condition], *, quiet: bool) -> Iterator[TextRow]:
    """Yield the rows that can be read; note the others."""
    name = reading.source.name
    for record in tqdm(reading.source.records(), desc=f"Reading {Path(name).name}", unit=" rows", disable=quiet):
        if isinstance(record, Problem):
            reading.problems.append(record)
        else:
            reading.rows += 1
            row = _text_row(reading, record, conditions)
            if row is None:
                return
            if isinstance(row, Problem):
                reading.problems.append(row)
            else:
                yield row
        if len(reading.problems) >= MAX_PROBLEMS:
            more = f"{MAX_PROBLEMS} wrong rows shown; the rest of {name} was not read"
            reading.problems.append(Problem(name, "rows that can be read", more, "correct these first"))
            return


def _text_row(reading: Reading, record: Record, conditions: Mapping[str, Condition]) -> TextRow | Problem | None:
    """Return the text of one record, or what is wrong with it; None where the source lacks columns."""
    reading.seen.update(dict.fromkeys(record.values))
    if not keeps(conditions, record.values):
        return TextRow(dropped=Dropped.FILTERED)
    values = by_role(record.values, reading.source.columns)
    kind = kind_of(values)
    if kind is None and reading.kind is None:
        reading.problems += _column_problems(record, reading.source)
        return None
    reading.kind = reading.kind or kind
    if kind is None or kind != reading.kind:
        found = ", ".join(record.values) or "no columns"
        return Problem(record.where, f"{_NEEDED[reading.kind]}, as in the rows before", found, _ONE_KIND)
    if reading.order is None:
        reading.order = order_of(values)
    if kind == "ranked" and order_of(values) != reading.order:
        found = ", ".join(record.values)
        return Problem(record.where, f"{_ORDERED[reading.order]}, as in the rows before", found, _ONE_ORDER)
    try:
        row = text_row(values, kind)
    except BadRow as error:
        return Problem(record.where, error.expected, error.given, error.fix)
    models = max(map(len, row.scores), default=0)
    reading.models = reading.models or models
    if models not in (0, reading.models):
        wish = f"scores of {reading.models} reward models, as in the rows before"
        return Problem(record.where, wish, f"of {models}", "give every row a score of each model")
    if row.conversational:
        reading.first_conversation = reading.first_conversation or record.where
    elif not row.dropped:
        reading.first_plain = reading.first_plain or record.where
    return row


_NEEDED: dict[Kind | None, str] = {
    "paired": "chosen and rejected",
    "unpaired": "completion and label",
    "ranked": "completions",
    None: "chosen and rejected (with or without prompt), prompt, completion and label, or prompt and completions",
}
_ONE_KIND = "train on pairs, on labelled completions or on lists, not on a mix"
_ORDERED = {"ranks": "ranks", "scores": "scores", "": "neither scores nor ranks (the best completion first)"}
_ONE_ORDER = "order the lists of a source in one way: ranks in every row, or scores, or the best first"


def _column_problems(record: Record, source: Source) -> list[Problem]:
    """Say which columns are missing, judged by the first row."""
    found = list(record.values)
    if problems := _unmapped(source, found, record.where):
        return problems
    near = [f"for {role}: {hint}" for role in JUDGED if role not in found and (hint := suggest(role, found))]
    fix = "name them in the recipe: data.columns: {prompt: <column>, chosen: <column>, rejected: <column>}"
    return [Problem(record.where, _NEEDED[None], _listed(found), "; ".join([fix, *near]))]


def _unmapped(source: Source, found: list[str], where: str) -> list[Problem]:
    """Say which columns of `data.columns` are not there."""
    return [
        Problem(
            where,
            f'a column "{name}", which data.columns gives for {role}',
            _listed(found),
            suggest(name, found) or f"write data.columns: {{{role}: <a column of the data>}}",
        )
        for role, name in source.columns.items()
        if name not in found
    ]


def _listed(found: list[str]) -> str:
    return f"columns: {', '.join(found) or 'none'}"

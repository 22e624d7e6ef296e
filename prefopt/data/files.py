"""A file -> its records, one at a time: JSON Lines, JSON, CSV, TSV, Parquet; the text formats also gzipped.

Every row is parsed on its own and no column type is inferred, so that a wrong row is named and a text that
looks like a date or a number stays the text it is.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from prefopt.errors import Problem

TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
EXTENSIONS = (*TEXT_FORMATS, *(extension + ".gz" for extension in TEXT_FORMATS), ".parquet")
CHUNK = 1 << 20
"""Bytes read at a time from a JSON array."""

_BEFORE_ARRAY = re.compile(r"\s*(\[\s*)?")
_BETWEEN_ROWS = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Record:
    """One row as it was read."""

    where: str
    """File and line, or file and row; counted from 1."""
    values: dict[str, Any]


def extension_of(path: Path | str) -> str | None:
    """Return the extension of a data file, with `.gz`, in lower case; None for any other file."""
    name = str(path).lower()
    return next((extension for extension in EXTENSIONS[::-1] if name.endswith(extension)), None)


def read_records(path: Path) -> Iterator[Record | Problem]:
    """Yield every row of a data file, and a problem in the place of every row that cannot be read."""
    import pyarrow as pa

    extension = extension_of(path)
    try:
        if extension == ".parquet":
            yield from _parquet(path)
            return
        with _opened(path) as file:
            kind = (extension or "").removesuffix(".gz")
            if kind == ".csv":
                yield from _table(file, path, ",")
            elif kind == ".tsv":
                yield from _table(file, path, "\t")
            elif kind == ".json" and _begins_with_bracket(file):
                yield from _json_array(file, path)
            else:
                yield from _json_lines(file, path)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        found = f"{type(error).__name__}: {error}"
        yield Problem(str(path), f"a readable {extension} file", found, "write the file again")


def _opened(path: Path) -> IO[bytes]:
    if str(path).lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _json_lines(file: IO[bytes], path: Path) -> Iterator[Record | Problem]:
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        text = _decode(line, where, first=number == 1)
        if isinstance(text, Problem):
            yield text
        elif text.strip():
            try:
                yield _record(json.loads(text), where)
            except json.JSONDecodeError as error:
                yield _invalid_json(where, error)


def _json_array(file: IO[bytes], path: Path) -> Iterator[Record | Problem]:
    """Yield the elements of one JSON array, of which only the element being read is in memory."""
    decode = codecs.getincrementaldecoder("utf-8-sig")()
    parse = json.JSONDecoder().raw_decode
    buffer, position, number, ended = "", 0, 0, False
    between = _BEFORE_ARRAY
    while True:
        position = _end(between, buffer, position)
        if position and between is _BEFORE_ARRAY:
            between = _BETWEEN_ROWS
        if buffer[position : position + 1] == "]":
            return
        where = f"{path}, row {number + 1}"
        try:
            value, position = parse(buffer, position)
        except json.JSONDecodeError as error:
            if ended:
                yield _invalid_json(where, error)
                return
            # At least as much again as waits, so that a long element is not parsed anew too often.
            read = file.read(max(CHUNK, len(buffer) - position))
            ended = not read
            try:
                buffer, position = buffer[position:] + decode.decode(read, final=ended), 0
            except UnicodeDecodeError as undecodable:
                yield _not_utf8(f"{path}, at or after row {number + 1}", undecodable)
                return
            continue
        number += 1
        yield _record(value, where)


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    return match.end() if match else start


def _table(file: IO[bytes], path: Path, delimiter: str) -> Iterator[Record | Problem]:
    """Yield the rows of a CSV or TSV file; every value is text."""
    csv.field_size_limit(sys.maxsize)  # the default of 131,072 characters is less than a long answer
    bad: list[Problem] = []

    def lines() -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            text = _decode(line, f"{path}, line {number}", first=number == 1)
            if isinstance(text, Problem):
                bad.append(text)
                return
            yield text

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            if cells:
                yield _table_row(header, cells, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        if not bad:
            bad.append(Problem(f"{path}, line {reader.line_num}", "valid CSV", str(error), "quote the texts"))
    yield from bad


def _table_row(header: list[str], cells: list[str], where: str) -> Record | Problem:
    if len(cells) == len(header):
        return Record(where, dict(zip(header, cells)))
    return Problem(where, f"{len(header)} cells, as in the header", str(len(cells)), "quote the texts")


def _parquet(path: Path) -> Iterator[Record | Problem]:
    from pyarrow import parquet

    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            for values in batch.to_pylist():
                number += 1
                yield Record(f"{path}, row {number}", values)


def _record(value: Any, where: str) -> Record | Problem:
    if isinstance(value, dict):
        return Record(where, value)
    kind = {"list": "a list", "str": "a text", "NoneType": "null", "bool": "true or false"}
    return Problem(
        where,
        "an object with named columns",
        kind.get(type(value).__name__, "a number"),
        'write every row as {"prompt": …, "chosen": …, "rejected": …}',
    )


def _begins_with_bracket(file: IO[bytes]) -> bool:
    start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _decode(line: bytes, where: str, *, first: bool) -> str | Problem:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        return _not_utf8(where, error)


def _not_utf8(where: str, error: UnicodeDecodeError) -> Problem:
    byte = error.object[error.start]
    return Problem(where, "UTF-8 text", f"byte 0x{byte:02x}", "convert the file: iconv -f latin1 -t utf-8")


def _invalid_json(where: str, error: json.JSONDecodeError) -> Problem:
    return Problem(where, "valid JSON", error.msg, "write one object per line (.jsonl) or one array of objects (.json)")

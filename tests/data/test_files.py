"""Files of every format give the same rows, and wrong rows are named."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from prefopt.data import files
from prefopt.data.files import Record, extension_of, read_records
from prefopt.errors import Problem

ROWS = [
    {"prompt": "2020-01-01 00:00:00", "chosen": 'tab\tcomma, "quote" and\nnew line', "rejected": "NA"},
    {"prompt": "1", "chosen": "größer · 你好", "rejected": "null"},
    {"prompt": "3.0", "chosen": "x" * 200_000, "rejected": "] , {"},
]


def as_table(delimiter):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


WRITTEN = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "a.ndjson": "\n" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "lines.json": "\n".join(json.dumps(row) for row in ROWS),
    "array.json": " \n[ " + " ,\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n]\n",
    "a.csv": as_table(","),
    "a.tsv": as_table("\t"),
}


def read(path):
    return list(read_records(Path(path)))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_every_text_format_gives_the_rows_as_text(name, compressed, write):
    content = WRITTEN[name].encode()
    path = write(gzip.compress(content, mtime=0), name + ".gz") if compressed else write(content, name)
    assert [record.values for record in read(path)] == ROWS


@pytest.mark.parametrize("name", WRITTEN)
def test_a_byte_order_mark_is_not_part_of_the_data(name, write):
    assert [record.values for record in read(write(b"\xef\xbb\xbf" + WRITTEN[name].encode(), name))] == ROWS


def test_parquet_gives_the_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    assert [record.values for record in read(path)] == ROWS


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_an_array_is_read_alike_in_pieces_of_any_size(chunk, write, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", chunk)
    rows = [{"text": 'größe [1, 2], {"a": "]"}'}, {}, {"n": [1, {"m": None}]}]
    path = write("[" + ",".join(json.dumps(row, ensure_ascii=False) for row in rows) + "]", "a.json")
    assert [record.values for record in read(path)] == rows


def test_an_empty_file_and_an_empty_array_have_no_rows(write):
    for content, name in (("", "a.jsonl"), ("[ ]", "a.json"), ("", "a.csv"), ("a,b\n", "b.csv"), ("", "b.json")):
        assert read(write(content, name)) == []


@pytest.mark.parametrize(
    ("content", "name", "where", "said"),
    [
        ('{"a": 1}\n{"a": \n', "a.jsonl", "line 2", "valid JSON"),
        ('{"a": 1}\n\n[1]\n', "a.jsonl", "line 3", "an object with named columns"),
        ('{"a": 1}\n"text"\n', "a.jsonl", "line 2", "an object with named columns"),
        (b'{"a": 1}\n{"a": "\xe4"}\n', "a.jsonl", "line 2", "UTF-8"),
        ('[{"a": 1}, 7]', "a.json", "row 2", "an object with named columns"),
        ('[{"a": 1}, {"a": ]', "a.json", "row 2", "valid JSON"),
        ('[{"a": 1}, {"a": 2}', "a.json", "row 3", "valid JSON"),
        (b'[{"a": 1}, {"a": "\xff"}]', "a.json", "row 1", "UTF-8"),
        ("a,b\n1,2\n3\n", "a.csv", "line 3", "2 cells"),
        (b"a,b\n1,2\n\xe4,3\n", "a.csv", "line 3", "UTF-8"),
        ('a,b\n1,"2"x\n', "a.csv", "line 2", "valid CSV"),
    ],
)
def test_a_wrong_row_is_named_and_the_right_ones_are_read(content, name, where, said, write):
    path = write(content, name)
    found = read(path)
    problems = [each for each in found if isinstance(each, Problem)]
    assert len(problems) == 1
    assert problems[0].where.startswith(path)
    assert where in problems[0].where
    assert said in problems[0].expected
    assert all(isinstance(each, Problem | Record) for each in found)


def test_every_wrong_line_is_named_not_only_the_first(write):
    path = write('{"a": 1\n{"a": 2}\n{"a": 3\n')
    assert [type(each) for each in read(path)] == [Problem, Record, Problem]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"not gzip", "a.jsonl.gz"),
        (gzip.compress(b'{"a": 1}\n' * 500, mtime=0)[:-12], "b.jsonl.gz"),
        (b"not parquet", "a.parquet"),
    ],
)
def test_a_damaged_file_is_a_problem_not_a_crash(content, name, write):
    path = write(content, name)
    last = read(path)[-1]
    assert isinstance(last, Problem)
    assert last.where == path
    assert "readable" in last.expected


def test_the_extension_decides_whether_a_file_is_data():
    assert extension_of("A.JSONL.GZ") == ".jsonl.gz"
    assert extension_of(Path("x/a.json")) == ".json"
    assert extension_of("README.md") is None
    assert extension_of("a.parquet.gz") is None

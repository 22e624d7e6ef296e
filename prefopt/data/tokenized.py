"""One source as token ids: read, tokenized in parallel, cached by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from prefopt.data.cache import built_folder
from prefopt.data.filters import parse_filter
from prefopt.data.formats import Kind
from prefopt.data.reading import MAX_PROBLEMS, Reading, write_text_rows
from prefopt.data.settings import DataSettings
from prefopt.data.sources import Source
from prefopt.data.tokenize import TokenRules, tokenize_rows
from prefopt.data.tokenizer import SpecialIds, tokenizer_hash
from prefopt.errors import DataError, Problem
from prefopt.paths import cache_root

CACHE_FORMAT = 3
"""Raise it when a change of this package changes what it makes of the same rows."""

TOKEN_FEATURES = Features(
    {
        "prompt": List(Value("int32")),
        "completions": List(List(Value("int32"))),
        "preference_probability": Value("float64"),
        "scores": List(List(Value("float64"))),
        "list_scores": List(Value("float64")),
        "value": Value("float64"),
        "row": Value("int64"),
        "prompt_tokens": Value("int32"),
        "prompt_hash": Value("int64"),
        "completion_hashes": List(Value("int64")),
        "dropped": Value("string"),
        "completion_cut": Value("bool"),
        "prompt_cut": Value("bool"),
        "repeated": Value("bool"),
        "merged": Value("bool"),
        "mismatched": Value("bool"),
        "problem": Value("string"),
    }
)
BATCH_ROWS = 500
ROWS_PER_PROCESS = 10_000
"""Below twice this many rows one process is faster: starting another costs more than it saves."""


@dataclass(frozen=True)
class TokenizedSource:
    """The rows of a source as ids, used or not, in their order."""

    source: Source
    table: datasets.Dataset
    """Memory-mapped, with `TOKEN_FEATURES`."""
    kind: Kind | None
    """None where the filter keeps no row."""
    conversational: bool
    """Whether any row is a conversation."""
    order: str
    """What orders its lists: `ranks`, `scores`, or nothing but the order of the completions."""
    models: int
    """Reward models that score each completion; 0 where there are no scores."""
    from_cache: bool


@dataclass(frozen=True)
class Tokenizing:
    """What all sources of a run are tokenized with."""

    tokenizer: Any
    special: SpecialIds
    rules: TokenRules
    filter: Mapping[str, Any]
    processes: int | None
    quiet: bool

    @classmethod
    def of(cls, settings: DataSettings, tokenizer: Any, special: SpecialIds, *, quiet: bool) -> Tokenizing:
        """Take from the recipe what it needs."""
        rules = TokenRules.of(settings)
        return cls(tokenizer, special, rules, dict(settings.filter), settings.processes, quiet)


def tokenized_source(source: Source, how: Tokenizing) -> TokenizedSource:
    """Return the ids of a source, from the cache where rows, tokenizer and settings are the same.

    Raises:
        DataError: rows that cannot be read or that the chat template refuses; a cache that cannot be written.
    """
    root = cache_root() / "data"
    key = _key(source, how)
    build = partial(_build, source, how)
    folder, from_cache = built_folder(root, key, build)
    try:
        table, note = _opened(folder)
    except (OSError, ValueError, pa.ArrowException):  # damaged from outside; made again
        shutil.rmtree(folder, ignore_errors=True)
        folder, from_cache = built_folder(root, key, build)
        table, note = _opened(folder)
    return TokenizedSource(source, table, **note, from_cache=from_cache)


def _key(source: Source, how: Tokenizing) -> str:
    content = {
        "format": CACHE_FORMAT,
        "rows": source.content,
        "columns": dict(source.columns),
        "filter": dict(how.filter),
        "tokenizer": tokenizer_hash(how.tokenizer),
        **asdict(how.rules),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _build(source: Source, how: Tokenizing, folder: Path) -> None:
    text_file = folder / "text.arrow"
    reading = write_text_rows(source, parse_filter(how.filter), text_file, quiet=how.quiet)
    _refuse_impossible_templates(reading, how)
    text = datasets.Dataset.from_file(str(text_file))
    tokens = text.map(
        tokenize_rows,
        batched=True,
        batch_size=BATCH_ROWS,
        fn_kwargs={"tokenizer": how.tokenizer, "special": how.special, "rules": how.rules},
        remove_columns=text.column_names,
        features=TOKEN_FEATURES,
        num_proc=_processes(how.processes, len(text)),
        cache_file_name=str(folder / "tokens.arrow"),
        load_from_cache_file=False,
        new_fingerprint=_key(source, how),  # given, so that no configuration is pickled to find one
        desc=f"Tokenizing {Path(source.name).name}",
    )
    _refuse_template_problems(source, tokens)
    note = {
        "kind": reading.kind,
        "conversational": bool(reading.first_conversation),
        "order": reading.order or "",
        "models": reading.models,
    }
    (folder / "source.json").write_text(json.dumps(note))
    text_file.unlink()


def _opened(folder: Path) -> tuple[datasets.Dataset, dict[str, Any]]:
    note = json.loads((folder / "source.json").read_text())
    parts = [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("tokens*.arrow"))]
    return datasets.concatenate_datasets(parts), note


def _processes(wanted: int | None, rows: int) -> int | None:
    """Return how many processes tokenize; None for this one, where fast tokenizers still use threads."""
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = min(cores, rows // ROWS_PER_PROCESS)
    wanted = min(wanted, rows)
    return wanted if wanted > 1 else None


def _refuse_impossible_templates(reading: Reading, how: Tokenizing) -> None:
    choice = how.rules.chat_template
    if choice == "never" and reading.first_conversation:
        raise DataError(
            Problem(
                reading.first_conversation,
                "plain text, for data.chat_template is never",
                "a list of messages",
                "set data.chat_template: auto",
            )
        )
    first = reading.first_conversation or (reading.first_plain if choice == "always" else "")
    if first and not how.tokenizer.chat_template:
        name = how.tokenizer.name_or_path or type(how.tokenizer).__name__
        raise DataError(
            Problem(
                first,
                "a tokenizer with a chat template, which messages need",
                f"{name} has none",
                "use the tokenizer of an instruction-tuned model, or plain text and data.chat_template: auto",
            )
        )


def _refuse_template_problems(source: Source, tokens: datasets.Dataset) -> None:
    messages = tokens.with_format("arrow")[:].column("problem").to_numpy()
    wrong = np.flatnonzero(messages != "")
    if not len(wrong):
        return
    rows = tokens.with_format("arrow")[wrong[:MAX_PROBLEMS].tolist()].column("row").to_pylist()
    problems = [
        Problem(
            f"{source.name}, row {row}",
            "messages that the chat template accepts",
            str(messages[index]),
            "correct the row",
        )
        for index, row in zip(wrong, rows)
    ]
    if len(wrong) > MAX_PROBLEMS:
        problems.append(Problem(source.name, "no row that it refuses", f"{len(wrong):,} rows", "correct these first"))
    raise DataError(problems)

"""What the recipe names as data -> sources that are read row by row: files, folders, hub names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prefopt.data.files import EXTENSIONS, Record, extension_of, read_records
from prefopt.data.settings import DataSettings, SourceSettings
from prefopt.errors import DataError, Problem, suggest

if TYPE_CHECKING:
    import datasets

Role = Literal["train", "eval"]

DEFAULT_SPLITS: dict[Role, tuple[str, ...]] = {
    "train": ("train",),
    "eval": ("validation", "test", "eval", "valid", "val", "dev"),
}
"""Taken, in this order, where data have named splits and the recipe names none."""

_KNOWN = ", ".join(EXTENSIONS)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ANY_SPLIT = re.compile(r"(train|validation|test|eval|valid|val|dev)(?=[-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Rows that can be read as often as needed, and a hash of them."""

    name: str
    """As the recipe writes it."""
    role: Role
    weight: float
    columns: Mapping[str, str]
    """Column names by role."""
    content: str
    """Hash of the rows; equal content is tokenized once, whatever its path."""
    records: Callable[[], Iterator[Record | Problem]]


def find_sources(settings: DataSettings, role: Role) -> list[Source]:
    """Find every source that the recipe names for training or evaluation.

    Raises:
        DataError: files, folders, splits or hub names that are not there; all at once.
    """
    wanted = settings.train if role == "train" else settings.eval
    if wanted is None:
        return []
    listed = [wanted] if isinstance(wanted, str) else list(wanted)
    found: list[Source] = []
    problems: list[Problem] = []
    for entry in listed:
        try:
            found.append(_find(entry, settings, role))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def _find(entry: str | SourceSettings, settings: DataSettings, role: Role) -> Source:
    """Find one source; own split and columns come before those of `data`."""
    name = entry if isinstance(entry, str) else entry.path
    split = None if isinstance(entry, str) else entry.split
    columns = {} if isinstance(entry, str) else entry.columns
    weight = 1.0 if isinstance(entry, str) else entry.weight
    if role == "train":
        split = split or settings.split
    content, records = _open(name, split, role)
    return Source(name, role, weight, columns or settings.columns, content, records)


def _open(name: str, split: str | None, role: Role) -> tuple[str, Callable[[], Iterator[Record | Problem]]]:
    path = Path(name).expanduser()
    if path.is_file():
        if extension_of(path) is None:
            raise DataError(Problem(name, f"a data file: {_KNOWN}", path.suffix or "no extension", "rename it"))
        return _files([path])
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _rows_of(_saved_dataset(path, split, role), name)
        return _files(_folder(path, split, role))
    if name.startswith(("/", ".", "~")) or extension_of(name) or not _HUB_NAME.fullmatch(name):
        raise DataError(_missing(name, path))
    return _rows_of(_hub_dataset(name, split, role), name)


def _missing(name: str, path: Path) -> Problem:
    folder = path.parent
    expected = "a file, a folder, or a hub name (owner/dataset)"
    if not folder.is_dir():
        return Problem(name, expected, f"there is no folder {folder}", "check the path")
    near = suggest(path.name, sorted(entry.name for entry in folder.iterdir()))
    return Problem(
        name,
        expected,
        f"no such file in {folder.resolve()}",
        near or "check the path; it is taken from the folder in which the command runs",
    )


def _files(paths: Sequence[Path]) -> tuple[str, Callable[[], Iterator[Record | Problem]]]:
    hasher = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            problem = Problem(str(path), "a readable file", str(error), "check its permissions")
            raise DataError(problem) from error
        hasher.update(f"{extension_of(path)}:{digest}\n".encode())

    def records() -> Iterator[Record | Problem]:
        for path in paths:
            yield from read_records(path)

    return hasher.hexdigest(), records


def _folder(folder: Path, split: str | None, role: Role) -> list[Path]:
    """Return the data files of a folder that belong to the split, by subfolder or by start of the name."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if extension_of(path)
        and not any(part.startswith((".", "dataset_info")) for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(Problem(str(folder), f"a folder with data files: {_KNOWN}", "none in it", "check the path"))
    splits = {path: _split_of(path.relative_to(folder), split) for path in files}
    named = sorted({value for value in splits.values() if value})
    if not named and split is None:
        return files
    chosen = choose_split(named, split, role, str(folder))
    return [path for path in files if splits[path] == chosen]


def _split_of(path: Path, wanted: str | None) -> str | None:
    """Return the split of a path: `wanted` if a part of it begins so, else a usual name, else none."""
    for part in path.parts:
        if wanted and re.match(rf"{re.escape(wanted)}(?=[-_.]|$)", part):
            return wanted
    for part in path.parts:
        if match := _ANY_SPLIT.match(part):
            return match.group(1).lower()
    return None


def choose_split(named: Sequence[str], wanted: str | None, role: Role, where: str) -> str:
    """Return the split to read.

    Raises:
        DataError: the wanted split is not there, or none is wanted and none has a usual name.
    """
    candidates = (wanted,) if wanted else DEFAULT_SPLITS[role]
    for candidate in candidates:
        if candidate in named:
            return candidate
    key = "data.split" if role == "train" else "data.eval: [{path: …, split: …}]"
    raise DataError(
        Problem(
            where,
            f'a split "{wanted}"' if wanted else f"a split to take for {role}: {', '.join(candidates)}",
            f"splits: {', '.join(named) or 'none'}",
            f"name one of these: {key}",
        )
    )


def _saved_dataset(path: Path, split: str | None, role: Role) -> datasets.Dataset:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes `datasets` raise
        raise DataError(
            Problem(str(path), "a dataset saved by `datasets`", _first_line(error), "save it again")
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        return saved[choose_split(list(saved), split, role, str(path))]
    return saved


def _hub_dataset(name: str, split: str | None, role: Role) -> datasets.Dataset:
    import datasets

    tried = [split] if split else list(DEFAULT_SPLITS[role])
    failure: Exception | None = None
    for candidate in tried:
        try:
            return datasets.load_dataset(name, split=candidate)
        except Exception as error:  # network, permissions, scripts, parsing: each library its own class
            failure = error
            if "Unknown split" not in str(error):
                break
    assert failure is not None
    raise DataError(
        Problem(
            name,
            "a dataset on the hub that can be loaded (there is no such file or folder here)",
            f"split {' or '.join(tried)}: {type(failure).__name__}: {_first_line(failure)}",
            "check the name, data.split, the network and `hf auth login`; or give a file",
        )
    ) from failure


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rows_of(dataset: datasets.Dataset, name: str) -> tuple[str, Callable[[], Iterator[Record | Problem]]]:
    """Hash the rows of a dataset itself: its own fingerprint names how it was made, not what it holds."""
    hasher = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for batch in table.to_batches():
            hasher.update(batch.serialize())
    hasher.update(repr(dataset.features).encode())

    def records() -> Iterator[Record | Problem]:
        for number, values in enumerate(dataset.with_format(None), start=1):
            yield Record(f"{name}, row {number}", values)

    return hasher.hexdigest(), records

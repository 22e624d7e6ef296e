"""The small world on disk: made once per settings, seed and source, then found again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefopt.errors import DataError, Problem
from prefopt.paths import cache_root
from prefopt.sandbox.settings import WorldSettings

STAMP = "world.json"
"""Settings, versions and statistics of a world."""
LIBRARIES = ("torch", "transformers", "tokenizers")
"""Their versions can change the files, so they are part of a world's identity."""


@dataclass(frozen=True)
class World:
    """Where the parts of a small world lie."""

    folder: Path
    model: Path
    """The policy with its tokenizer, as `from_pretrained` reads it."""
    train: Path
    """Training pairs: conversational JSON lines with `preference_probability` and both gold rewards."""
    eval: Path
    """Held-out pairs, about subjects that no training prompt names."""


def build_world(
    *,
    seed: int = 0,
    folder: Path | None = None,
    quiet: bool = False,
    settings: WorldSettings | None = None,
) -> World:
    """Return the small world of `seed`, made now unless it was made before.

    The same seed, machine and versions give identical files. Global random states stay as they are. A world
    appears whole or not at all, and several processes may ask for it at once.

    Args:
        seed: every world of another seed has other reviews, weights and pairs
        folder: where to make it, a new or empty folder; by default in the cache
        quiet: show no progress
        settings: sizes; smaller ones are for tests

    Raises:
        DataError: `folder` holds something else.
    """
    settings = settings or WorldSettings()
    identity = _identity(settings, seed)
    target = folder if folder is not None else cache_root() / "sandbox" / _digest(identity)
    if not _holds(target, identity):
        _refuse_occupied(target)
        _make_whole(target, identity, settings, seed, quiet)
    return _world(target)


def _world(folder: Path) -> World:
    return World(folder, folder / "model", folder / "train.jsonl", folder / "eval.jsonl")


def _identity(settings: WorldSettings, seed: int) -> dict[str, Any]:
    source = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        source.update(file.read_bytes())
    versions = {library: version(library) for library in LIBRARIES}
    return {
        "seed": seed,
        "settings": asdict(settings),
        "source": source.hexdigest(),
        "versions": versions,
    }


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _holds(folder: Path, identity: dict[str, Any]) -> bool:
    """Return whether `folder` is a whole world of this identity; the stamp is written last."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(stamp.get(key) == value for key, value in identity.items())


def _refuse_occupied(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(
            Problem(
                where=str(folder),
                expected="a new or empty folder for the sandbox, or the sandbox of this seed and version",
                given="a folder or file with other content",
                fix="name another folder, or remove this one",
            )
        )


def _make_whole(target: Path, identity: dict[str, Any], settings: WorldSettings, seed: int, quiet: bool) -> None:
    """Make a world beside `target` and rename it, so that nobody ever sees half of one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f".{target.name}-{uuid.uuid4().hex[:12]}"
    unfinished.mkdir()
    try:
        statistics = _fill(_world(unfinished), settings, seed, quiet)
        stamp = json.dumps(identity | {"gold_reward": statistics}, indent=2)
        (unfinished / STAMP).write_text(stamp + "\n", encoding="utf-8")
        try:
            os.replace(unfinished, target)
        except OSError:
            if not _holds(target, identity):  # If it does, another process was first with the same world.
                _refuse_occupied(target)
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(world: World, settings: WorldSettings, seed: int, quiet: bool) -> dict[str, float]:
    """Write every file of a world but the stamp and return statistics of its gold rewards."""
    # Imported here, so that a world that exists is found without loading torch and transformers.
    import torch

    from prefopt.sandbox.making import make_world

    # One thread: a second one saves 3 s of 23, and on a busy machine the two wait for each other (155 s).
    # It also keeps the files independent of the caller's threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _progress(quiet) as track:
            made = make_world(settings, seed, track)
    finally:
        torch.set_num_threads(threads)
    made.save_model(world.model)
    _write_lines(world.train, made.train)
    _write_lines(world.eval, made.eval)
    return made.gold_reward


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """Yield a function that passes items through and shows how many are done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("making the sandbox: {task.description:<19}"), BarColumn(24), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:

        def track(items: Sequence[Any], title: str) -> Iterable[Any]:
            return progress.track(items, total=len(items), description=title)

        yield track

"""Data and models that a recipe writes as paths must exist; hub names are not looked up."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from prefopt.errors import Problem
from prefopt.recipe.schema import Recipe, Source, Sources

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
PATH_STARTS = ("/", "./", "../", "~")


def missing_files(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each file or folder of the recipe that is not there."""
    for key, sources in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        for where, path in _written_paths(key, sources):
            if is_path(path) and not _exists(path):
                yield _missing(where, path, "a file or folder with data")
    for where, model in (("model.path", recipe.model.path), ("reference.model", recipe.reference.model)):
        if model is not None and model.startswith(PATH_STARTS) and not Path(model).expanduser().is_dir():
            yield _missing(where, model, "the folder of a model")


def is_path(text: str) -> bool:
    """Whether a data source is meant as a path and not as a hub name."""
    bare = text
    for compression in COMPRESSIONS:
        bare = bare.removesuffix(compression)
    return text.startswith(PATH_STARTS) or bare.endswith(DATA_SUFFIXES)


def _written_paths(key: str, sources: Sources | None) -> list[tuple[str, str]]:
    if sources is None:
        return []
    if isinstance(sources, str):
        return [(key, sources)]
    return [
        (f"{key}.{index}", source.path if isinstance(source, Source) else source)
        for index, source in enumerate(sources)
    ]


def _exists(path: str) -> bool:
    return Path(path).expanduser().exists()


def _missing(where: str, written: str, expected: str) -> Problem:
    path = Path(written).expanduser()
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, neighbours, n=1, cutoff=0.75)
    fix = f"relative paths start at {Path.cwd()}; a hub name is written owner/name"
    if near:
        fix = f'did you mean "{Path(written).parent / near[0]}"?'
    return Problem(where, expected, f"{written}, which does not exist", fix)

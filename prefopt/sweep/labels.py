"""The name of a run in its sweep: what it changes, as one word."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from prefopt.report.settings import short_keys

LONGEST = 120
"""Characters; file systems allow 255, and the log's ending comes on top."""


def labels_of(changes: Sequence[Mapping[str, Any]], taken: Collection[str] = ()) -> list[str]:
    """Return one name for each run, all different: the loss, then each key that varies with its value.

    Args:
        changes: of each run.
        taken: names that no run may get.
    """
    short = short_keys(list(dict.fromkeys(key for each in changes for key in each)))
    names: dict[str, None] = {}
    for each in changes:
        name = _cut("-".join(_parts(each, short)) or "run")
        numbered = map(f"{name}-{{}}".format, itertools.count(2))
        if name in names or name in taken:
            name = next(one for one in numbered if one not in names and one not in taken)
        names[name] = None
    return list(names)


def _parts(changes: Mapping[str, Any], short: Mapping[str, str]) -> Iterator[str]:
    ordered = sorted(changes.items(), key=lambda item: (item[0] not in ("loss", "loss.name"), item[0] == "seed"))
    for key, value in ordered:
        yield f"{'' if key in ('loss', 'loss.name') else short[key]}{_word(value)}"


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = [f"{'' if key == 'name' else key}{_word(one)}" for key, one in value.items()]
        return "-".join(inner)
    if isinstance(value, list | tuple):
        return "+".join(_word(one) for one in value)
    text = f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text)


def _cut(name: str) -> str:
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"

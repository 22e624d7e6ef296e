"""Any preference dataset -> prompt groups of token ids, with every dropped and cut row counted.

    settings    what the recipe says about data
    files       a file -> records                  sources    a file, folder or hub name -> records
    filters     data.filter -> conditions          formats    a record -> one row of text
    cells       what one cell may hold             prompts    where the prompt ends
    reading     records -> a table of text rows    tokenizer  what is needed of a tokenizer
    tokenize    text rows -> ids, exact boundary   truncation what gives way in a long row
    tokenized   a source as ids, cached            cache      a folder built once, published atomically
    grouping    rows -> groups                     groups     PromptGroup, Comparison, GroupDataset
    mismatched  partners of other prompts          group_layout  where everything in the groups lies
    counting    what became of a source's rows     report     all that is said of the data
    load        all of it, in order

`groups`, `mismatched` and `settings` import nothing heavier than numpy; the rest is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefopt.data.groups import Comparison, GroupDataset, PromptGroup
from prefopt.data.settings import DataSettings, SourceSettings

if TYPE_CHECKING:
    from prefopt.data.load import LoadedData, load_data
    from prefopt.data.report import DataReport

__all__ = [
    "Comparison",
    "DataReport",
    "DataSettings",
    "GroupDataset",
    "LoadedData",
    "PromptGroup",
    "SourceSettings",
    "load_data",
]

_ROOM_OF = {
    "DataReport": "prefopt.data.report",
    "LoadedData": "prefopt.data.load",
    "load_data": "prefopt.data.load",
}


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        return getattr(import_module(_ROOM_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

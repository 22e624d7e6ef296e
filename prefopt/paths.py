"""Where prefopt keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

from prefopt.errors import Problem, UserError


def cache_root() -> Path:
    """Return the cache folder: `PREFOPT_CACHE`, else `prefopt` in the user's cache folder (not created here)."""
    own = os.environ.get("PREFOPT_CACHE")
    if own:
        folder = Path(own).expanduser()
        if folder.exists() and not folder.is_dir():
            raise UserError(
                Problem("PREFOPT_CACHE", "a folder", f"{folder} is a file", "set PREFOPT_CACHE to another one")
            )
        return folder
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "prefopt"

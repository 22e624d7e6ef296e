"""Where prefopt keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the cache folder: `PREFOPT_CACHE`, else `prefopt` in the user's cache folder (not created here)."""
    own = os.environ.get("PREFOPT_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "prefopt"

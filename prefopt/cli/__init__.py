"""The command line: one function per command, every heavy import inside the command that needs it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from prefopt.errors import Interrupted, Problem, UserError
from prefopt.process import settle_process

EXTRA = frozenset(
    {
        "accelerate",
        "bitsandbytes",
        "datasets",
        "fsspec",
        "huggingface_hub",
        "jinja2",
        "matplotlib",
        "peft",
        "plotly",
        "psutil",
        "pyarrow",
        "pydantic",
        "rich",
        "ruamel",
        "safetensors",
        "scipy",
        "transformers",
        "trl",
        "typer",
        "wandb",
    }
)
"""Top-level packages that the `train` extra installs."""


OF_THE_MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG, errno.EIO}
)
"""Errors of the file system that a person can mend, wherever they strike."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after `prefopt`; by default those of this process.

    Returns:
        0 it worked, 2 a person can mend it, 130 interrupted. An error of prefopt itself is not caught.
    """
    settle_process()
    if os.getcwd() not in sys.path and "" not in sys.path:  # `module:function` of a recipe, as with `python -m`
        sys.path.append(os.getcwd())
    try:
        from prefopt.cli.app import app

        app(args=None if arguments is None else list(arguments), prog_name="prefopt")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        from prefopt.cli.printing import show_problems

        show_problems(error)
        return 2
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        from prefopt.cli.printing import show_problems

        where = str(error.filename or "a file")
        fix = "free space or check permissions, then run the same command again: what is complete is kept"
        show_problems(UserError(Problem(where, "a place that can be written and read", error.strerror or "", fix)))
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print(
            f'prefopt needs {error.name} for this. Install it with:\n\n    pip install "prefopt[train]"',
            file=sys.stderr,
        )
        return 2
    return 0

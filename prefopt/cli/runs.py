"""Run folders that a person names on the command line."""

from __future__ import annotations

from pathlib import Path

from prefopt.errors import Problem, UserError, suggest


def find_run(written: str) -> Path:
    """Return the folder of a run.

    Raises:
        UserError: where the folder is not there or is not a run.
    """
    folder = Path(written).expanduser()
    if (folder / "recipe.yaml").is_file():
        return folder
    given = f"{written}, which has no recipe.yaml" if folder.is_dir() else f"{written}, which does not exist"
    runs = sorted(str(path.parent) for path in folder.parent.glob("*/recipe.yaml"))
    runs = runs or sorted(str(path.parent) for path in Path("runs").glob("*/recipe.yaml"))
    listed = f"runs here: {', '.join(runs)}" if runs else "prefopt train RECIPE makes one"
    raise UserError(Problem("RUN", "the folder of a run", given, suggest(str(folder), runs) or listed))

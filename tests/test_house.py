"""The house holds: imports point one way, heavy rooms stay lazy, and the wheel holds what it must."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: a room imports rooms of its own floor or below.
FLOORS = [
    ["errors", "memory", "paths", "process", "schedule", "linear_layers", "shared_casts", "lean_layers"],
    ["recipe"],
    ["data", "sandbox", "lora"],
    ["batching", "models", "adapters", "quantization", "prefetch"],
    ["attention", "passes", "activations", "planning", "fit", "adapter_fit", "kept_gradients"],
    ["acceleration", "last_layer", "memory_plan"],
    ["forward"],
    ["probe"],
    ["layout", "objective", "optimizers", "prepare"],
    ["feed", "step_record"],
    ["reference"],
    ["invariant", "policy", "run_folder", "card", "checkpoint", "export"],
    ["held_out", "sampling", "screen", "tracking"],
    ["evaluate"],
    ["run"],
    ["gradients"],
    ["result"],
    ["train"],
    ["evaluate_run", "preflight"],
    ["report"],
    ["sweep"],
    ["cli", "integrations", "__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def rooms_imported(file: Path) -> set[str]:
    """Names of prefopt's rooms that a file imports when it is imported."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("prefopt."):
            found.add(node.module.split(".")[1])
    return found


def room_of(file: Path) -> str:
    return file.relative_to(ROOT / "prefopt").parts[0].removesuffix(".py")


FILES = [file for file in sorted((ROOT / "prefopt").rglob("*.py")) if file != ROOT / "prefopt" / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    own = room_of(file)
    assert own in FLOOR, f"{own} stands on no floor: give it one in FLOORS"
    above = {room for room in rooms_imported(file) if room != own and FLOOR[room] >= FLOOR[own]}
    beside = {room for room in above if FLOOR[room] == FLOOR[own]}
    assert above <= beside, f"{file.relative_to(ROOT)} imports {sorted(above - beside)} from above"


def test_no_two_rooms_import_each_other():
    arrows = {(room_of(file), room) for file in FILES for room in rooms_imported(file) if room != room_of(file)}
    assert not [pair for pair in arrows if pair[::-1] in arrows]


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "losses")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_a_recipe_is_checked_without_transformers():
    loaded = modules_after("from prefopt.recipe import load_recipe; load_recipe('quickstart')")
    assert "torch" in loaded  # the loss block is checked against the registry
    assert not {"transformers", "datasets", "accelerate", "peft", "bitsandbytes"} & loaded


def test_help_loads_nothing_heavy():
    loaded = modules_after("from prefopt.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass")
    assert not {"torch", "transformers", "datasets", "pydantic"} & loaded


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_the_recipes_and_the_losses_run_from_it(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "prefopt/train.py",
        "prefopt/data/groups.py",
        "prefopt/recipe/schema.py",
        "prefopt/recipes/quickstart.yaml",
        "prefopt/report/page/page.html",
        "prefopt_losses/methods/__init__.py",
        "prefopt_losses/py.typed",
    ):
        assert wanted in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "losses/"))]
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("recipes/quickstart.yaml") for name in archive.getnames())
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = "import torch; from prefopt_losses import dpo_loss; z = torch.zeros(2); print(dpo_loss(z, z, z, z).tolist())"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.startswith("[0.693")

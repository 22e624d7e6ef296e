"""The package needs torch and nothing else, and its rooms import in one direction."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prefopt_losses

ROOM = Path(prefopt_losses.__file__).parent

# Imports whose names come from neither the standard library, torch (with what torch itself asks for), nor
# this package are refused, as they would be where they are not installed.
TORCH_ONLY = """
import importlib.metadata, re, sys
allowed = {"prefopt_losses", "torch", "torchgen", "functorch"} | set(sys.stdlib_module_names)
seen, waiting = set(), ["torch"]
top = importlib.metadata.packages_distributions()
while waiting:
    name = waiting.pop()
    if name in seen:
        continue
    seen.add(name)
    try:
        wanted = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        continue
    waiting += [re.split(r"[^A-Za-z0-9_.-]", each)[0] for each in wanted if "extra ==" not in each]
normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
seen = {normal(name) for name in seen}
allowed |= {module for module, owners in top.items() if any(normal(each) in seen for each in owners)}
allowed -= {"numpy", "setuptools", "pkg_resources"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed and not name.startswith("_"):
            raise ModuleNotFoundError(f"refused: {name}", name=name)

sys.meta_path.insert(0, Refuse())
import warnings
warnings.filterwarnings("ignore")
from prefopt_losses import METHODS, LogProbs, get_loss
import torch
logps = torch.tensor([-3.0, -4.0], requires_grad=True)
for name in METHODS:
    record = LogProbs(logps, logps - 1, logps.detach(), logps.detach(), *torch.tensor([[2, 3], [4, 5]]))
    get_loss(name)(record).mean().backward()
foreign = {"numpy", "transformers", "trl", "datasets", "prefopt", "pydantic"} & set(sys.modules)
assert not foreign, foreign
for name in ("numpy", "transformers", "prefopt"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} was not refused: this test is blind")
"""


def test_every_loss_works_where_only_torch_is_installed():
    ran = subprocess.run(
        [sys.executable, "-c", TORCH_ONLY],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOM.parent), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr


# A room may import the rooms before it.
ORDER = [
    *("errors", "convex", "tensors", "inputs", "score", "terms", "list_terms", "needs", "conventions", "loss"),
    *("hyperparameters", "method"),
    *("pairwise", "reference_free", "pointwise"),
    *("methods", "lookup", "functional"),
]
BESIDE = {"logps", "metrics", "profile", "readme"}  # nothing in ORDER may need these


def imported_rooms(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "prefopt_losses":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prefopt_losses."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_one_way(room):
    before = set(ORDER[: ORDER.index(room)])
    assert set(imported_rooms(ROOM / f"{room}.py")) <= before


def test_the_marker_for_type_checkers_is_there():
    assert (ROOM / "py.typed").exists()

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
from prefopt_losses import METHODS, ListLogProbs, LogProbs, get_loss
import torch
logps = torch.tensor([-3.0, -4.0], requires_grad=True)

def filled(name):
    if name.endswith("lengths"):
        return torch.tensor([2, 3])
    if "token_logps" in name:
        return logps[:, None].expand(2, 3)
    return logps.exp() if name == "preference_probability" else logps

for name in METHODS:
    loss = get_loss(name)
    tensors = {each: filled(each) for each in loss.needs.tensors}
    record = ListLogProbs(lists=torch.tensor([0, 0]), **tensors) if loss.needs.lists else LogProbs(**tensors)
    loss(record).mean().backward()
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
    *("hyperparameters", "method", "own_function"),
    *(f"methods.{family}" for family in ("running", "pairwise", "score_gaps", "divergences", "margins")),
    *(f"methods.{family}" for family in ("reference_free", "pointwise", "batchwise", "tokenwise", "listwise")),
    *("methods.mixtures", "methods", "written", "lookup", "functional"),
    *(
        f"profiles.{room}"
        for room in ("curve", "convexity", "matching", "shape", "profile", "matched_beta", "verdicts")
    ),
]
# None of ORDER needs these.
BESIDE = {
    "products",
    "head",
    "workspace",
    "logps",
    "distributions",
    "metrics",
    "readme",
    "module",
    "profiles",
}


def file_of(room):
    path = ROOM.joinpath(*room.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported_rooms(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("prefopt_losses"):
            continue
        package = node.module.removeprefix("prefopt_losses").removeprefix(".")
        for alias in node.names:
            inner = f"{package}.{alias.name}".removeprefix(".")
            yield inner if file_of(inner).exists() else package


def test_every_room_has_its_place():
    rooms = {".".join(file.relative_to(ROOM).with_suffix("").parts) for file in ROOM.rglob("*.py")}
    rooms = {room.removesuffix("__init__").removesuffix(".") for room in rooms} - {""}
    assert rooms == set(ORDER) | BESIDE


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_one_way(room):
    before = set(ORDER[: ORDER.index(room)])
    assert set(imported_rooms(file_of(room))) <= before


def test_the_marker_for_type_checkers_is_there():
    assert (ROOM / "py.typed").exists()

"""The programs people copy run as they stand, and the page about them says nothing that was not run."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PAGE = ROOT / "docs" / "trainers.md"
TORCH_ONLY = ["pytorch_loop", "openrlhf_loop"]
WITH_LIBRARIES = {
    "fabric_loop": ["lightning_fabric", "transformers"],
    "transformers_trainer": ["transformers", "accelerate"],
    "trl_trainer": ["trl"],
}
# Refuse what a machine with torch alone would not have, then run the file as a program.
ALONE = """
import runpy, sys
for name in ("prefopt", "numpy", "transformers", "trl", "datasets", "lightning_fabric", "pydantic"):
    sys.modules[name] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def assert_it_learned(output):
    (first, last), *_ = re.findall(r"^loss ([\d.]+) -> ([\d.]+)", output, re.MULTILINE)
    assert float(last) < 0.8 * float(first)
    assert re.search(r"accuracy .*1\.00$", output, re.MULTILINE)


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_with_torch_alone(name):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "losses"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert_it_learned(done.stdout)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WITH_LIBRARIES)
def test_with_its_libraries(name, capsys):
    for library in WITH_LIBRARIES[name]:
        pytest.importorskip(library)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert_it_learned(capsys.readouterr().out)


@pytest.mark.parametrize("name", [name for name in (*TORCH_ONLY, *WITH_LIBRARIES) if name != "trl_trainer"])
def test_only_the_trl_example_needs_more_than_the_losses(name):
    assert not re.search(r"^(from|import) prefopt\b", (EXAMPLES / f"{name}.py").read_text(), re.MULTILINE)


def test_every_example_is_run_and_linked():
    files = {file.stem for file in EXAMPLES.glob("*.py")}
    assert files == {*TORCH_ONLY, *WITH_LIBRARIES}
    linked = re.findall(r"\(examples/(\w+)\.py\)", PAGE.read_text())
    assert set(linked) == files


def blocks():
    """(example it is taken from or "", code) of every python block of the page."""
    found = re.findall(r"(?:<!-- docs/examples/(\w+\.py) -->\n)?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(found) > 5
    return found


def test_the_pages_own_code_runs(capsys):
    scope: dict[str, object] = {}
    for source, code in blocks():
        if not source:
            exec(compile(code, str(PAGE), "exec"), scope)
    assert "gpo_exponential, beta=0.1" in capsys.readouterr().out


@pytest.mark.parametrize(("source", "code"), [block for block in blocks() if block[0]])
def test_the_pages_excerpts_stand_in_the_examples(source, code):
    text = (EXAMPLES / source).read_text()
    assert any(textwrap.indent(textwrap.dedent(code), " " * depth) in text for depth in range(0, 17, 4))

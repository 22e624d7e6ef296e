"""The program that measures the cache beside TRL's precomputing runs, and both trainers score the same text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "benchmarks" / "reference_against_trl.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM_MAKING_A_MODEL = """
import sys
from pathlib import Path
from make_small_llama import new_model, read_dialogues, train_tokenizer
data, folder = map(Path, sys.argv[1:])
tokenizer = train_tokenizer(read_dialogues(data), 320)
tokenizer.save_pretrained(folder)
new_model(tokenizer, 64, 1).save_pretrained(folder)
"""


def run(*command: str) -> str:
    folders = [ROOT, ROOT / "losses", ROOT / "benchmarks"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(printed: str, header: str) -> list[list[str]]:
    """Return the cells of the rows under the line that starts with a header."""
    lines = printed[printed.index(header) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("benchmark")
    data, model = folder / "pairs.jsonl", folder / "model"
    words = ("one", "two", "three", "four", "five", "six")
    rows = [
        {"prompt": f"Count to {end}.", "chosen": " ".join(words[:end]), "rejected": f"no{end}"} for end in range(2, 7)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("-c", PROGRAM_MAKING_A_MODEL, str(data), str(model))
    return run(str(PROGRAM), str(data), str(model), "--small", "--skip", "build", "storage")


def test_a_sweep_is_counted_in_both_trainers(printed):
    rows = table(printed, "| trainer | max_length")
    scored = {tuple(row[:3]): (row[3], int(row[4]), int(row[5].replace(",", ""))) for row in rows}
    ours, theirs = scored["prefopt", "256", "2 of dpo"], scored["TRL", "None", "2 of dpo"]
    assert ours == theirs  # each scores every completion once: eight different ones, of as many tokens
    assert ours[:2] == ("1 of 2", 8)
    others = [row for row in scored if row[0] == "prefopt" and row[2] != "2 of dpo"]
    assert len(others) == 3
    assert all(scored[row][1:] == (0, 0) for row in others)


def test_peak_memory_is_measured_in_every_case(printed):
    rows = table(printed, "| trainer | reference")
    assert [row[0] for row in rows] == ["prefopt"] * 4 + ["TRL"] * 4
    assert all(int(row[2]) > 0 for row in rows)
    assert [int(row[6]) for row in rows] == [0, 0, 4, 0, 0, 0, 4, 0]

"""Each run of a sweep is a process of its own: what befalls one the others do not feel, and nothing is done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from world import make_model, make_pairs, quiet

from prefopt.errors import Problem, RecipeError
from prefopt.recipe.text import dump_yaml
from prefopt.sweep.commands import SweepOptions, _conclude, _slots, show_commands, sweep
from prefopt.sweep.folder import SweepFolder
from prefopt.sweep.local import Slots, settle
from prefopt.sweep.outcome import Outcome, killed_by, outcome_of
from prefopt.sweep.plan import load_sweep
from prefopt.sweep.screen import duration

ROOT = Path(__file__).parent.parent


def write_sweep(folder: Path, sweep: dict, **changes: object) -> Path:
    make_model(folder / "base")
    make_pairs(folder / "pairs.jsonl")
    mapping: dict = {
        "model": "base", "data": {"train": "pairs.jsonl", "eval_fraction": 0.3, "max_length": 64, "processes": 1},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"},
        "eval": {"every": 3, "samples": 4, "max_new_tokens": 8, "show": 0}, "checkpoint": {"every": 2, "keep": 1},
        "output": "out", **changes, "sweep": sweep,
    }  # fmt: skip
    (folder / "mine.yaml").write_text(dump_yaml(mapping))
    return folder


def prefopt(folder: Path, *words: str, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "prefopt", *words], cwd=folder, env=environment(folder), capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=560, **options,
    )  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "losses")])
    return {**os.environ, "PYTHONPATH": path, "PREFOPT_CACHE": str(folder / "cache")}


def results(folder: Path) -> dict[str, dict]:
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(folder.glob("out/runs/*/result.json"))}


def test_a_run_that_fails_is_recorded_with_its_reason_and_the_others_finish(tmp_path):
    rates = {"train.learning_rate": [1e-3, 1e30]}
    folder = write_sweep(tmp_path, {"loss.name": ["dpo"], **rates}, eval={"every": 0, "samples": 0, "show": 0})
    done = prefopt(folder, "sweep", "mine.yaml", "--threads", "1")
    assert done.returncode == 1, done.stderr
    assert list(results(folder)) == ["dpo-learning_rate0.001"]
    outcome = SweepFolder(folder / "out").outcome("dpo-learning_rate1e+30")
    assert outcome.state == "failed"
    assert "expected a finite loss and gradient" in outcome.reason
    assert outcome.reason in done.stdout
    assert (folder / "out" / "report" / "report.html").is_file()
    before = (folder / "out" / "runs" / "dpo-learning_rate0.001" / "result.json").stat().st_mtime_ns
    again = prefopt(folder, "sweep", "mine.yaml", "--threads", "1")
    assert "0 to do, 1 finished, 1 failed" in again.stdout
    assert (folder / "out" / "runs" / "dpo-learning_rate0.001" / "result.json").stat().st_mtime_ns == before
    assert results(folder)["dpo-learning_rate0.001"]["reference"]["cache_misses"] == 0


def test_another_sweep_is_not_put_into_the_folder_and_a_larger_grid_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write_sweep(tmp_path, {"seed": [0], "train.learning_rate": [1e-3]}))
    show_commands("mine.yaml", [], SweepOptions(), quiet())
    with pytest.raises(RecipeError, match=r"other train\.max_steps"):
        show_commands("mine.yaml", ["train.max_steps=7"], SweepOptions(), quiet())
    capsys.readouterr()
    show_commands("mine.yaml", ["sweep.seed=[0, 1]"], SweepOptions(), quiet())
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    words = [line.partition("prefopt ")[2].split()[0] for line in lines]
    assert words == ["cache", "train", "train", "report"]
    assert [entry["label"] for entry in SweepFolder(Path("out")).stored()["runs"]] == ["seed0", "seed1"]


def test_commands_carry_the_threads_and_the_group_of_the_sweep(tmp_path, monkeypatch, capsys):
    folder = write_sweep(tmp_path, {"seed": [0], "train.learning_rate": [1e-3]}, tracking={"wandb": "offline"})
    monkeypatch.chdir(folder)
    show_commands("mine.yaml", [], SweepOptions(threads=3), quiet())
    assert "WANDB_RUN_GROUP=mine OMP_NUM_THREADS=3 prefopt train out/recipes/seed0.yaml" in capsys.readouterr().out
    assert SweepFolder(Path("out")).stored()["commands"] == ["prefopt sweep mine.yaml --threads 3"]


def test_a_report_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write_sweep(tmp_path, {"seed": [0], "train.learning_rate": [1e-3]}))
    plan = load_sweep("mine.yaml")
    outcomes = {"seed0": Outcome("finished")}

    def refused(*_):
        raise RecipeError(Problem("RUN", "runs of one kind", "two kinds"))

    monkeypatch.setattr("prefopt.report.commands.write_report", refused)
    assert not _conclude(plan, SweepFolder(plan.folder), outcomes, Console())
    assert "the runs are kept, but there is no report of them" in capsys.readouterr().out


def test_early_stopping_needs_ray(tmp_path, monkeypatch):
    monkeypatch.chdir(write_sweep(tmp_path, {"seed": [0], "early_stopping": "asha"}))
    with pytest.raises(RecipeError, match="--ray local"):
        sweep("mine.yaml", [], SweepOptions(), quiet())
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_runs_are_not_begun_without_asking_and_the_time_is_said(tmp_path):
    folder = write_sweep(tmp_path, {"seed": list(range(600)), "train.learning_rate": [1e-3]})
    done = prefopt(folder, "sweep", "mine.yaml", "--threads", "1")
    assert done.returncode == 2
    assert "600 runs: about" in done.stderr
    assert "--yes" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_that_is_killed_takes_its_runs_along_and_goes_on_from_there(tmp_path):
    axes = {"loss.name": ["dpo", "hinge"], "train.learning_rate": [1e-3]}
    train = {"max_steps": 60, "batch_size": 8, "precision": "fp32"}
    for name in ("calm", "rough"):
        (tmp_path / name).mkdir()
    calm = write_sweep(tmp_path / "calm", axes, train=train)
    rough = write_sweep(tmp_path / "rough", axes, train=train)
    assert prefopt(calm, "sweep", "mine.yaml", "--threads", "1").returncode == 0
    words = [sys.executable, "-m", "prefopt", "sweep", "mine.yaml", "--threads", "1", "-n", "2"]
    process = subprocess.Popen(words, cwd=rough, env=environment(rough), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(rough.glob("out/runs/*/checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(2)
    left = subprocess.run(["pgrep", "-f", str(rough)], capture_output=True, text=True).stdout.split()
    assert not left
    assert prefopt(rough, "sweep", "mine.yaml", "--threads", "1").returncode == 0
    one, other = results(calm), results(rough)
    for label in one:
        assert one[label]["eval"] == other[label]["eval"]
        assert one[label]["train"]["loss"] == other[label]["train"]["loss"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_gives_the_same_results_in_the_same_folders(tmp_path):
    pytest.importorskip("ray")
    axes = {"loss.name": ["dpo", "hinge"], "train.learning_rate": [1e-3]}
    for name in ("here", "ray"):
        (tmp_path / name).mkdir()
    here, there = write_sweep(tmp_path / "here", axes), write_sweep(tmp_path / "ray", axes)
    assert prefopt(here, "sweep", "mine.yaml", "--threads", "1").returncode == 0
    done = prefopt(there, "sweep", "mine.yaml", "--threads", "1", "--ray", "local")
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = results(here), results(there)
    assert set(one) == set(other) == {"dpo", "hinge"}
    for label in one:
        assert one[label]["eval"] == other[label]["eval"]
        weights = [next((folder / "out/runs" / label / "model").glob("*.safetensors")) for folder in (here, there)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert other[label]["reference"]["cache_misses"] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_asha_stops_what_falls_behind_and_says_so(tmp_path):
    pytest.importorskip("ray")
    rates = {"train.learning_rate": [1e-3, 1e-9, 1e-10, 1e-11]}
    stopping = {"metric": "eval.accuracy", "grace": 0.2, "factor": 2}
    train = {"max_steps": 600, "batch_size": 8, "precision": "fp32"}  # long enough to be overtaken
    looks = {"every": 0.1, "samples": 0, "show": 0}
    folder = write_sweep(tmp_path, {**rates, "early_stopping": stopping}, train=train, eval=looks)
    done = prefopt(folder, "sweep", "mine.yaml", "--threads", "1", "--ray", "local")
    states = {label: SweepFolder(folder / "out").outcome(label).state for label in
              (f"learning_rate{rate}" for rate in ("0.001", "1e-09", "1e-10", "1e-11"))}  # fmt: skip
    assert states["learning_rate0.001"] == "finished", done.stdout + done.stderr
    assert "stopped" in states.values()
    assert "it had fallen behind (ASHA)" in done.stdout


PROBLEM = """
1 problem

  train.learning_rate
    expected  a gradient that is finite
    given     nan at step 3
    to do     lower it
"""


@pytest.mark.parametrize(
    ("code", "finished", "log", "state", "said"),
    [
        (0, True, "", "finished", ""),
        (0, False, "", "failed", "ended without a result"),
        (130, False, "", "interrupted", "stopped by Ctrl-C"),
        (-9, False, "", "killed", "killed by SIGKILL: often the system ran out of memory"),
        (2, False, PROBLEM, "failed", "train.learning_rate: expected a gradient that is finite; given nan at step 3"),
        (1, False, "Traceback\nRuntimeError: boom\n", "failed", "RuntimeError: boom"),
        (1, False, "torch.OutOfMemoryError: CUDA out of memory", "failed", "out of memory: lower train.token_budget"),
        (1, False, "", "failed", "it wrote nothing"),
    ],
)
def test_how_a_process_ended_is_said_in_a_line(code, finished, log, state, said):
    outcome = outcome_of(code, finished, log, 1.0)
    assert outcome.state == state
    assert said in outcome.reason


def test_only_signals_that_exist_have_names():
    assert killed_by(64 + 60) == "killed by signal 124"


def test_gpus_are_given_in_turn_and_come_back():
    slots = Slots(3, 1, ("0", "1"))
    given = [slots.take(label)["CUDA_VISIBLE_DEVICES"] for label in "abc"]
    assert given == ["0", "1", "0"]
    slots.free("b")
    assert slots.take("d") == {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_sweep_keeps_the_threads_with_which_it_began(tmp_path):
    folder = SweepFolder(tmp_path)
    (tmp_path / "sweep.json").write_text('{"threads": 3}')
    assert _slots(folder, SweepOptions(processes=2)).threads == 3
    with pytest.raises(Exception, match="with which this sweep began"):
        _slots(folder, SweepOptions(threads=2))


def test_the_time_of_all_attempts_is_kept(tmp_path):
    class Ended:
        def code(self):
            return 130

        def written(self):
            return ""

        def seconds(self):
            return 4.0

    folder = SweepFolder(tmp_path)
    (tmp_path / "status").mkdir()
    assert [settle(folder, "one", Ended()).spent for _ in range(2)] == [4.0, 8.0]


def test_an_outcome_survives_its_file(tmp_path):
    folder = SweepFolder(tmp_path)
    (tmp_path / "status").mkdir()
    outcome = Outcome("killed", "killed by SIGKILL", -9, 3.5)
    folder.record("one", outcome)
    assert folder.outcome("one") == outcome
    assert folder.outcome("two") is None


def test_times_are_said_as_people_say_them():
    said = [duration(seconds) for seconds in (3, 99, 150, 7200, 12_000, 200_000, 9e6)]
    assert said == ["3 s", "99 s", "2 min", "2 h", "3 h 20 min", "2 days 7 h", "104 days"]

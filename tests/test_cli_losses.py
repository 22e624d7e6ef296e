"""`prefopt losses`: what it says of a loss, of several, of a user's own function, and what it draws."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from prefopt.cli import main
from prefopt.cli.plot_option import with_plot_file
from prefopt_losses import METHODS, get_loss

ROOT = Path(__file__).parents[1]
MINE = """
import torch

def mine(x):
    return torch.exp(-x) + 0.1 * x.square()

def branch(x):
    return x if x > 0 else -x

def coupled(x):
    return torch.exp(x.mean() - x)

number = 3
"""


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what a command prints, spaces collapsed."""

    def run(*words: str) -> str:
        assert main(["losses", *words]) == 0
        return " ".join(capsys.readouterr().out.split())

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what a command that exits with 2 says; it has printed nothing else."""

    def run(*words: str) -> str:
        assert main(["losses", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a user's module, and work in it."""
    (tmp_path / "my_own_losses.py").write_text(MINE)
    (tmp_path / "broken_losses.py").write_text("def f(x)\n    return x\n")
    (tmp_path / "quitting_losses.py").write_text("import sys\nsys.exit('usage: ...')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("my_own_losses", "broken_losses", "quitting_losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


# One


def test_savage_is_said_to_be_not_convex_and_where(said: Callable[..., str]) -> None:
    assert "not convex, refuted below x = -0.693" in said("gpo_savage")


def test_discopop_is_said_to_start_backwards_with_what_that_means_and_what_mends_it(said: Callable[..., str]) -> None:
    out = said("discopop")
    for text in (
        "BACKWARDS, f'(0) = +0.784",
        "makes the chosen completion LESS likely",
        "local minimum at x = -0.119",
        "barrier at x = +0.072",
        "tau = 1 removes it: f'(0) = -0.673",
    ):
        assert text in out


def test_hyper_parameters_follow_their_loss(said: Callable[..., str]) -> None:
    out = said("discopop", "tau=1", "beta=0.2")
    assert "forwards, f'(0) = -0.673" in out
    assert "loss: {name: discopop, beta: 0.2, tau: 1}" in out


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_profiled_or_says_why_not(name: str, said: Callable[..., str]) -> None:
    out = said(name)
    assert ("start " in out) == (not get_loss(name).needs.lists)
    assert "Profile" in out


def test_a_sum_shows_each_of_its_functions(said: Callable[..., str]) -> None:
    out = said("dpo+0.5*sft")
    assert "Profile of logistic on a pair (term 1 of 2)" in out
    assert "Profile of linear on the chosen (term 2 of 2)" in out
    assert "loss: [{name: dpo, weight: 1, beta: 0.1, soft_labels: false}, {name: sft, weight: 0.5" in out


def test_a_scalar_function_has_a_profile_too(said: Callable[..., str]) -> None:
    assert "not convex, refuted below x = 0.000" in said("ramp")


# Several


def test_several_are_compared_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses", "dpo", "ipo", "gpo_savage", "robust_dpo", "label_smoothing=0.2"]) == 0
    rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()}
    assert rows["dpo"][1:4] == ["-0.5", "yes", "0.5"]
    assert rows["ipo"][-3:] == ["-3", "1", "0"]
    assert "-0.693" in rows["gpo_savage"]
    assert rows["robust_dpo label_smoothing=0.2"][-1] == "none"


# A user's own


def test_a_function_of_ones_own_is_profiled(mine: Path, said: Callable[..., str]) -> None:
    out = said("my_own_losses:mine")
    assert "forwards, f'(0) = -1" in out
    assert "kappa = 1.2" in out
    assert "not refuted on [-20, 20]" in out
    assert "f'(0) -1" in said("gpo", "f=my_own_losses:mine")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("my_own_losses:mien", "no function 'mien'. Did you mean \"mine\"?"),
        ("my_own_losses:branch", "torch.where"),
        ("my_own_losses:coupled", "depends on the other points"),
        ("my_own_losses:number", "my_own_losses:number"),
        ("my_own_losses:", "such as my_package.my_losses:mine"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("broken_losses:f", "SyntaxError"),
        ("quitting_losses:f", "ended the program"),
    ],
)
def test_a_function_that_cannot_be_used_is_a_problem(
    name: str, text: str, mine: Path, refused: Callable[..., str]
) -> None:
    assert text in refused(name)


# Wrong words


def test_all_wrong_words_are_listed_at_once(refused: Callable[..., str]) -> None:
    err = refused("gpo_savge", "dpo", "btea=1", "ipo", "beta=-1")
    assert "3 problems" in err
    assert 'did you mean "gpo_savage"?' in err
    assert 'did you mean "beta"?' in err
    assert "a number > 0" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["beta=1"], "write dpo beta=1"),
        (["dpo", "beta=1", "beta=2"], "keep one of the two"),
        (["dpo+sfft"], 'did you mean "sft"?'),
        (["logistic", "beta=1"], "gpo f=logistic"),
        (["dpo", "--radius", "0"], "1.5 to 10000"),
        (["dpo", "--plot", "x.jpg"], ".png, .svg, .pdf"),
        (["dpo", "--plot", "nowhere/x.png"], "mkdir -p nowhere"),
        ([*["dpo"] * 9, "--plot"], "at most 8 losses"),
        (["--match", "dpo"], "NAME:BETA"),
        (["--match", "dpo:tenth"], "NAME:BETA"),
        (["--match", "hinqe:0.1"], 'did you mean "hinge"?'),
        (["--match", "dpo:-1"], "a number > 0"),
        (["--match", "dpo:0.1", "--at", "0.5"], "above 0.5 and below 1"),
        (["ramp", "--match", "dpo:0.1"], "gpo f=ramp"),
    ],
)
def test_wrong_words_exit_with_2(words: list[str], text: str, refused: Callable[..., str]) -> None:
    assert text in refused(*words)


# Matched beta


def test_the_betas_that_match_dpo_at_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses", "--match", "dpo:0.1"]) == 0
    out = capsys.readouterr().out
    rows = {line[4:].split("  ")[0]: line[4:].split() for line in out.splitlines() if line.startswith("    ")}
    assert rows["gpo_squared"][1:] == ["0.05", "0.0455"]
    assert rows["gpo_exponential"][1:] == ["0.05", "0.05"]
    assert rows["gpo_truncated_quadratic"][1:] == ["0.05", "0.0455"]
    assert rows["gpo_savage"][1:] == ["0.1", "0.1"]
    assert rows["ipo normalize=sum"][2:] == ["0.025", "0.0228"]
    assert rows["ipo"][1:5] == ["0.025", "T", "0.0228", "T"]
    assert rows["hinge"][1:3] == ["-", "0.091"]
    assert "its curvature is a kink at x = 1 (kappa = 0)" in out
    for name in METHODS:
        assert name in out


def test_a_match_takes_names_and_a_strength(said: Callable[..., str]) -> None:
    out = said("hinge", "--match", "dpo:0.2", "--at", "0.9")
    assert "The beta that matches dpo at 0.2" in out
    assert "0.091" in out  # 0.2 / log 9
    assert "gpo_savage" not in out


# Data and pictures


def test_json_is_an_object_for_one_and_a_list_for_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses", "dpo", "beta=0.3", "--json"]) == 0
    dpo = json.loads(capsys.readouterr().out)
    assert dpo["loss"]["beta"] == 0.3
    assert dpo["profiles"][0]["slope"] == -0.5
    assert main(["losses", "dpo", "gpo_savage", "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == ["dpo", "gpo_savage"]
    assert main(["losses", "hinge", "--match", "dpo:0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["near_zero"] is None


def test_plot_draws_three_panels_into_the_default_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["losses", "dpo", "discopop", "gpo_savage", "--plot"]) == 0
    data = (tmp_path / "losses.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:4] == b"\x89PNG"
    assert width > 2 * height > 2000
    assert capsys.readouterr().err == "losses.png\n"


def test_a_picture_says_what_matters_in_text_that_can_be_searched(tmp_path: Path) -> None:
    path = tmp_path / "losses.svg"
    assert main(["losses", "discopop", "--plot", str(path)]) == 0
    text = " ".join(each.text or "" for each in ElementTree.parse(path).iter() if each.tag.endswith("text"))
    for wanted in (
        "discopop",
        "starts backwards",
        "+0.784",
        "x = −0.119",
        "x = 0.072",
        "dashed where it is not convex",
    ):
        assert wanted in text


@pytest.mark.parametrize("name", ["hinge", "linear", "quadratic", "padll", "simpo", "bpo"])
def test_awkward_curves_are_drawn(name: str, tmp_path: Path) -> None:
    assert main(["losses", name, "dpo", "--plot", str(tmp_path / "x.pdf")]) == 0
    assert (tmp_path / "x.pdf").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["dpo", "--plot"], "losses.png"),
        (["--plot", "dpo", "ipo"], "losses.png"),
        (["--plot", "a/b.svg", "dpo"], "a/b.svg"),
        (["--plot", "dpo+0.5*sft"], "losses.png"),
        (["--plot", "my.module:f"], "losses.png"),
        (["--plot", "--json"], "losses.png"),
    ],
)
def test_plot_takes_the_file_that_follows_or_the_default(words: list[str], file: str) -> None:
    written = with_plot_file(words)
    assert written[written.index("--plot") + 1] == file
    assert [word for word in written if word != "losses.png"] == words


@pytest.mark.parametrize("words", ["dpo", "dpo ipo --json"])
def test_a_reader_that_has_seen_enough_is_no_failure(words: str) -> None:
    command = f"{sys.executable} -m prefopt losses {words} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")

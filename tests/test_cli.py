"""The command line: what it prints, which exit code it ends with, what it loads and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prefopt.cli import EXTRA, main
from prefopt.errors import DataError, Interrupted, Problem
from prefopt.recipe import recipe_schema, shipped_recipes
from prefopt_losses import METHODS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Return a way to stand in for a room behind a command; it gives back the list of calls."""

    def stand_in(module: str, function: str, result: Any = None) -> list[Any]:
        calls: list[Any] = []

        def called(*args: Any, **options: Any) -> Any:
            calls.append((args, options))
            if isinstance(result, BaseException):
                raise result
            return result

        stand = ModuleType(module)
        setattr(stand, function, called)
        monkeypatch.setitem(sys.modules, module, stand)
        return calls

    return stand_in


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a folder that looks like a finished run."""
    (tmp_path / "recipe.yaml").write_text("model: sandbox\ndata: {train: sandbox}\nloss: dpo\n")
    return tmp_path


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m prefopt` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "prefopt", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_two_mistakes_exit_with_2_and_both_are_listed_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "dpo", "loss.btea=0.2", "data.train=/nope"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert [line.strip() for line in err.splitlines() if line.startswith("  ") and line[2] != " "] == [
        "loss.btea",
        "data.train",
    ]
    assert "2 problems" in err
    assert 'did you mean "beta"?' in err
    assert "/nope, which does not exist" in err


def test_problems_are_said_before_anything_heavy_is_loaded() -> None:
    program = (
        "import sys; from prefopt.cli import main\n"
        "code = main(['train', 'dpo', 'trian.epochs=1'])\n"
        "print(code, [name for name in ('transformers', 'datasets', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"


def test_help_loads_neither_torch_nor_pydantic() -> None:
    program = (
        "import sys; from prefopt.cli import main\n"
        "code = main(['--help'])\n"
        "print(code, [name for name in ('torch', 'pydantic', 'ruamel') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    for command in ("train", "check", "eval", "export", "losses", "recipes", "cache"):
        assert command in done.stdout


@pytest.mark.parametrize("command", [["trian"], ["train"], ["losses", "--colour"], ["cache", "clear"]])
def test_a_command_line_that_means_nothing_exits_with_2(command: list[str]) -> None:
    assert main(command) == 2


def test_the_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    import prefopt

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"prefopt {prefopt.__version__}\n"


@pytest.mark.parametrize(
    ("words", "module", "function"),
    [
        (["train"], "prefopt.train", "run_training"),
        (["check"], "prefopt.preflight", "check_recipe"),
        (["cache", "build"], "prefopt.reference.commands", "build_cache"),
        (["cache", "verify"], "prefopt.reference.commands", "verify_cache"),
        (["cache", "info"], "prefopt.reference.commands", "cache_info"),
    ],
)
def test_a_command_hands_its_room_the_recipe_with_its_overrides(
    words: list[str], module: str, function: str, room: Callable[..., list[Any]]
) -> None:
    calls = room(module, function)
    assert main([*words, "quickstart", "loss=ipo", "train.max_steps=3"]) == 0
    ((recipe, *_), _options), *more = calls
    assert not more
    assert (recipe.name, recipe.loss[0]["name"], recipe.train.max_steps) == ("quickstart", "ipo", 3)


def test_rehash_reaches_the_cache(room: Callable[..., list[Any]]) -> None:
    calls = room("prefopt.reference.commands", "verify_cache")
    assert main(["cache", "verify", "quickstart", "--rehash"]) == 0
    assert main(["cache", "verify", "quickstart"]) == 0
    assert [options for _, options in calls] == [{"rehash": True}, {"rehash": False}]


def test_eval_prints_every_number_it_gets(
    run: Path, room: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    measures = {"accuracy": 0.75, "accuracy_interval": [0.5, 0.875], "gold_reward": {"policy": 1.5}}
    calls = room("prefopt.evaluate_run", "evaluate_run", measures)
    assert main(["eval", str(run)]) == 0
    assert calls[0][0][0] == run
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed == {"accuracy": "0.75", "accuracy_interval": "0.5 to 0.875", "gold_reward.policy": "1.5"}


def test_export_passes_its_options_on(
    run: Path, room: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = room("prefopt.export", "export_run", Path("somewhere"))
    assert main(["export", str(run), "--output", "x", "--dtype", "bfloat16", "--push-to-hub", "me/it"]) == 0
    assert calls == [((run,), {"output": Path("x"), "dtype": "bfloat16", "push_to_hub": "me/it"})]
    assert capsys.readouterr().out == "somewhere\n"
    assert main(["export", str(run), "--dtype", "int3"]) == 2


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_folder_that_is_no_run_exits_with_2(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart/recipe.yaml").touch()
    assert main([command, str(tmp_path / "quikstart")]) == 2
    assert f'did you mean "{tmp_path}/quickstart"?' in capsys.readouterr().err


@pytest.mark.parametrize("stop", [Interrupted("stopped at step 12; run again to resume"), KeyboardInterrupt()])
def test_an_interruption_exits_with_130(
    stop: BaseException, room: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    room("prefopt.train", "run_training", stop)
    assert main(["train", "quickstart"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_mistake_found_during_the_run_is_shown_like_any_other(
    room: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    problem = Problem("pairs.jsonl, row 7", "a completion [INST]", "nothing", "remove the row")
    room("prefopt.train", "run_training", DataError(problem))
    assert main(["train", "quickstart"]) == 2
    said = capsys.readouterr().err
    for text in ("1 problem\n", problem.where, problem.expected, problem.given, problem.fix):
        assert text in said


def test_a_bug_of_prefopt_keeps_its_traceback(room: Callable[..., list[Any]]) -> None:
    room("prefopt.train", "run_training", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["train", "quickstart"])


def test_without_the_extra_the_command_says_what_installs_it(tmp_path: Path) -> None:
    for package in sorted(EXTRA):
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('absent', name={package!r})\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom prefopt.cli import main; sys.exit(main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install "prefopt[train]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_the_extra_is_the_one_of_the_project_file() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    names = {requirement.partition(">")[0].partition(".")[0] for requirement in listed}
    assert names == EXTRA


def test_losses_lists_every_method_with_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, method in METHODS.items():
        assert any(line.startswith(f"{name} ") and method.formula in line for line in lines), name


@pytest.mark.parametrize("name", METHODS)
def test_one_loss_is_explained_with_each_of_its_hyper_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from prefopt.cli.losses import hyperparameter_meanings
    from prefopt_losses.hyperparameters import schema

    assert main(["losses", name]) == 0
    out = capsys.readouterr().out
    meanings = hyperparameter_meanings(METHODS[name])
    assert set(meanings) == set(schema(METHODS[name].make))
    for text in (METHODS[name].formula, METHODS[name].summary, METHODS[name].link, *meanings.values()):
        assert text in out


@pytest.mark.parametrize("name", METHODS)
def test_the_line_that_losses_offers_for_a_recipe_works(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefopt.recipe import load_recipe

    main(["losses", name])
    (offered,) = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    loss: ")]
    path = tmp_path / "offered.yaml"
    path.write_text(f"model: sandbox\ndata: {{train: sandbox}}\n{offered}\n")
    assert load_recipe(str(path)).loss == load_recipe(str(path), [f"loss={name}"]).loss


def test_an_unknown_loss_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses", "hing"]) == 2
    assert 'did you mean "hinge"?' in capsys.readouterr().err


def test_recipes_lists_what_is_shipped_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    from prefopt.cli.recipes import purpose

    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name, path in shipped_recipes().items():
        assert name in out
        assert purpose(path) in out
        assert len(purpose(path)) <= 80


def test_a_printed_recipe_is_the_file_byte_for_byte() -> None:
    done = fresh("recipes", "dpo")
    assert (done.returncode, done.stdout) == (0, (ROOT / "recipes/dpo.yaml").read_text())


def test_the_printed_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()


def test_an_unknown_recipe_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "dop"]) == 2
    assert main(["train", "dop"]) == 2
    assert 'did you mean "dpo"?' in capsys.readouterr().err

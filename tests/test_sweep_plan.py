"""A sweep section stands for the runs that a reader expects, on equal terms, and every mistake in it is named."""

from __future__ import annotations

import pytest
from world import make_model, make_pairs

from prefopt.errors import RecipeError
from prefopt.recipe import load_recipe
from prefopt.recipe.text import dump_yaml
from prefopt.run_folder import input_hashes, recipe_text, write_json
from prefopt.sweep.caches import cache_builders
from prefopt.sweep.folder import SweepFolder
from prefopt.sweep.labels import labels_of
from prefopt.sweep.plan import load_sweep


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe with a sweep section; gives its path."""
    model, pairs = make_model(tmp_path / "base"), make_pairs(tmp_path / "pairs.jsonl")

    def write(sweep: dict, **changes: object):
        mapping = {
            "model": str(model), "data": {"train": str(pairs), "processes": 1}, "loss": {"name": "dpo", "beta": 0.1},
            "train": {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-4, "precision": "fp32"},
            "output": str(tmp_path / "sweep"), **changes, "sweep": sweep,
        }  # fmt: skip
        file = tmp_path / "mine.yaml"
        file.write_text(dump_yaml(mapping))
        return str(file)

    return write


ONE_RATE = {"train.learning_rate": [1e-4]}


def problems(path, *overrides):
    with pytest.raises(RecipeError) as error:
        load_sweep(path, overrides)
    return error.value.problems


def test_axes_are_crossed_and_seeds_vary_slowest(recipe):
    plan = load_sweep(recipe({"seed": [0, 1], "loss.name": ["dpo", "hinge"], **ONE_RATE}))
    assert [run.label for run in plan.runs] == ["dpo-seed0", "hinge-seed0", "dpo-seed1", "hinge-seed1"]
    assert [run.recipe.seed for run in plan.runs] == [0, 0, 1, 1]
    assert plan.runs[1].recipe.build_loss().name == "hinge"


def test_each_run_has_a_whole_recipe_with_a_folder_of_its_own(recipe, tmp_path):
    plan = load_sweep(recipe({"loss.beta": [0.1, 0.2], **ONE_RATE}))
    assert {run.recipe.output for run in plan.runs} == {
        str(tmp_path / "sweep" / "runs" / run.label) for run in plan.runs
    }


def test_the_learning_rate_is_an_axis_unless_the_sweep_has_it(recipe):
    plan = load_sweep(recipe({"loss.name": ["dpo", "hinge"]}))
    assert {run.recipe.train.learning_rate for run in plan.runs} == {3.3e-5, 1e-4, 3e-4}
    assert any(note.startswith("learning rates 3.3e-05, 0.0001, 0.0003") for note in plan.notes)
    one = load_sweep(recipe({"loss.name": ["dpo", "hinge"], **ONE_RATE}))
    assert len(one.runs) == 2
    assert any(note.startswith("one learning rate, 0.0001") for note in one.terms)


def test_points_are_small_grids_and_cross_with_the_axes(recipe):
    points = [{"loss": "sft"}, {"loss.name": ["dpo", "hinge"], "loss.beta": [0.1, 0.2]}]
    plan = load_sweep(recipe({"points": points, "seed": [0, 1], **ONE_RATE}))
    assert len(plan.runs) == 2 * (1 + 4)
    assert plan.runs[0].label == "sft-seed0"


def test_samples_are_the_same_for_every_loss_and_every_time(recipe):
    drawn = {"train.learning_rate": {"log_uniform": [1e-6, 1e-3]}, "samples": 3, "loss.name": ["dpo", "hinge"]}
    plan = load_sweep(recipe(drawn))
    rates = {name: [run.recipe.train.learning_rate for run in plan.runs if run.changes["loss.name"] == name]
             for name in ("dpo", "hinge")}  # fmt: skip
    assert len(set(rates["dpo"])) == 3
    assert rates["dpo"] == rates["hinge"]
    assert plan.runs == load_sweep(recipe(drawn)).runs
    assert plan.runs != load_sweep(recipe({**drawn, "samples_seed": 1})).runs


def test_matched_betas_hold_as_strongly_as_dpos(recipe):
    names = ["dpo", "gpo_exponential", "gpo_savage"]
    plan = load_sweep(recipe({"loss.name": names, "loss.beta": [0.1], "match": "kappa", **ONE_RATE}))
    betas = {run.recipe.build_loss().name: run.recipe.build_loss().hyperparameters["beta"] for run in plan.runs}
    assert betas == {"dpo": 0.1, "gpo_exponential": 0.05, "gpo_savage": 0.1}


def test_hinge_is_matched_at_preference_strength_three_quarters_and_it_is_said(recipe):
    plan = load_sweep(recipe({"loss.name": ["hinge"], "loss.beta": [0.1], "match": "kappa", **ONE_RATE}))
    assert plan.runs[0].recipe.build_loss().hyperparameters["beta"] == pytest.approx(0.0910239)
    assert any("0.75" in note for note in plan.notes)


def test_a_loss_of_means_is_matched_with_the_tokens_of_the_data_or_those_given(recipe):
    sweep = {"loss.name": ["ipo"], "loss.beta": [0.1], "match": {"rule": "kappa", "tokens": 100}, **ONE_RATE}
    assert load_sweep(recipe(sweep)).runs[0].recipe.build_loss().hyperparameters["beta"] == pytest.approx(2.5)
    measured = load_sweep(recipe({**sweep, "match": "kappa"}))
    tokens = measured.runs[0].recipe.build_loss().hyperparameters["beta"] / 0.025
    assert 4 < tokens < 12  # completions of 2 to 12 words, and end-of-sequence


def test_a_loss_that_cannot_be_matched_is_named_and_may_have_a_point_of_its_own(recipe):
    simpo = {"loss": {"name": "simpo", "beta": 2.0}}
    (found,) = problems(recipe({"points": [simpo], "match": "kappa", **ONE_RATE}))
    assert found.where == "sweep.match"
    assert "no reference" in found.given
    plan = load_sweep(recipe({"points": [{**simpo, "match": "none"}], "match": "kappa", **ONE_RATE}))
    assert plan.runs[0].recipe.build_loss().hyperparameters["beta"] == 2.0


def test_other_batch_sizes_see_as_many_comparisons(recipe):
    plan = load_sweep(recipe({"train.batch_size": [8, 16], **ONE_RATE}))
    assert [run.recipe.train.max_steps * run.recipe.train.batch_size for run in plan.runs] == [96, 96]
    assert any("as many comparisons" in note for note in plan.notes)


def test_unequal_terms_are_said(recipe):
    plan = load_sweep(recipe({"train.max_steps": [5, 10], **ONE_RATE}))
    assert any("40 to 80 comparisons: they are not on an equal budget" in note for note in plan.terms)
    assert any(note.startswith("one seed") for note in plan.terms)
    points = [
        {"loss.name": "hinge", "train.learning_rate": 1e-4},
        {"loss.name": "dpo", "train.learning_rate": [1e-4, 2e-4]},
    ]
    apart = load_sweep(recipe({"points": points}))
    assert any(note.startswith("hinge was tried at 1 learning rate and dpo at 2") for note in apart.terms)


def test_one_run_builds_the_cache_of_all(recipe):
    names = ["sft", "dpo", "hinge", "simpo"]
    plan = load_sweep(recipe({"loss": names, "seed": [0, 1], **ONE_RATE}))
    assert [run.recipe.build_loss().name for run in cache_builders(plan.runs)] == ["dpo"]
    apart = load_sweep(recipe({"train.precision": ["fp32", "bf16"], **ONE_RATE}))
    assert len(cache_builders(apart.runs)) == 2


def test_the_command_line_changes_axes_and_recipe(recipe):
    path = recipe({"loss.name": ["dpo", "hinge"], "seed": [0, 1], **ONE_RATE})
    plan = load_sweep(path, ["sweep.seed=[7]", "train.max_steps=3", "sweep.loss.beta=[0.3]"])
    assert [run.label for run in plan.runs] == ["dpo-seed7", "hinge-seed7"]
    assert {run.recipe.build_loss().hyperparameters["beta"] for run in plan.runs} == {0.3}
    assert {run.recipe.train.max_steps for run in plan.runs} == {3}


@pytest.mark.parametrize(
    ("sweep", "where", "said"),
    [
        ({"train.lr": [1]}, "sweep.train.lr", 'did you mean "train.learning_rate"?'),
        ({"loss.beta": []}, "sweep.loss.beta", "at least one value"),
        ({"loss.beta": 0.1}, "sweep.loss.beta", "a list of values"),
        ({"seed": [0, 0]}, "sweep.seed", "every value once"),
        ({"eval.samples": [1, 2]}, "sweep.eval.samples", "the same held-out data"),
        ({"data.held_out_seed": [1, 2]}, "sweep.data.held_out_seed", "the same held-out data"),
        ({"eval": [{"samples": 2}]}, "sweep.eval", "the same held-out data"),
        ({"data.max_length": [32, 64]}, "sweep.data.max_length", "the same held-out data"),
        ({"data.train": ["a.jsonl", "b.jsonl"]}, "sweep.data.train", "the same held-out data"),
        ({"data": [{"train": "a.jsonl"}]}, "sweep.data", "a setting; data is a section"),
        ({"train": [{"learning_rate": 1}]}, "sweep.train", "a setting; train is a section"),
        ({"loss.beta": [0.1], "loss": {"beta": [0.2]}}, "sweep.loss.beta", "every key once"),
        ({"output": ["a"]}, "sweep.output", "a key that changes what a run computes"),
        ({"points": [{"loss.beta": 1}], "loss.beta": [1]}, "sweep.loss.beta", "every key once"),
        ({"points": {}}, "sweep.points", "a list of mappings"),
        ({"loss": ["dpo"], "loss.name": ["ipo"]}, "sweep.loss.name", "every key once"),
        (
            {"points": [{"loss": {"name": "simpo", "beta": 2}}], "loss.beta": [0.1]},
            "sweep.loss.beta",
            "take it out of one of the two",
        ),
        ({"seed": [0, 1], "early_stopping": "asha"}, "sweep.early_stopping", "one seed"),
        ({"seed": {"log_uniform": [0, 1]}, "samples": 2}, "sweep.seed", "two positive numbers"),
        ({"seed": {"choice": [0, 1]}}, "sweep.samples", "how often to draw"),
        ({"seed": [0], "samples": 3}, "sweep.samples", "an axis to draw from"),
        ({"seed": [0], "match": "kapa"}, "sweep.match", "kappa"),
        ({"seed": [0], "match": {"tokens": True}}, "sweep.match", "kappa"),
        ({"seed": [0], "early_stopping": {"grace": 2}}, "sweep.early_stopping.grace", "a share of the run"),
        ({"seed": [0], "early_stopping": {"metric": "eval.acc"}}, "sweep.early_stopping.metric", "eval.accuracy"),
        (
            {"loss": ["dpo", "ipo"], "early_stopping": {"metric": "eval.loss"}},
            "sweep.early_stopping.metric",
            "a measure that compares these runs",
        ),
        (
            {"seed": [0], "early_stopping": {"metric": "eval.gold_reward.policy"}},
            "sweep.early_stopping.metric",
            "taken during the run",
        ),
        ([], "sweep", "a mapping from recipe keys to lists of values"),
    ],
)
def test_what_is_wrong_with_a_section_is_said_where_it_is(recipe, sweep, where, said):
    found = problems(recipe(sweep))
    assert [each.where for each in found] == [where]
    assert said in f"{found[0].expected} {found[0].fix}"


def test_all_mistakes_are_listed_at_once(recipe):
    assert len(problems(recipe({"train.lr": [1], "seed": [], "eval.samples": [1]}), "bogus")) == 4


def test_a_mistake_that_some_runs_have_names_them_once(recipe):
    (found,) = problems(recipe({"loss.name": ["dpo", "sft"], "loss.beta": [0.1, 0.2], **ONE_RATE}))
    assert "loss.beta of sft-beta0.1, sft-beta0.2" in found.where
    assert "sweep.points" in found.fix


@pytest.mark.parametrize(
    ("axes", "written", "fix"),
    [
        ({"seed": [0, 1]}, "seed=3", "sweep.seed=[3]"),
        ({"loss.name": ["dpo", "hinge"]}, "loss=ipo", "sweep.loss.name=[ipo]"),
        ({"loss": ["dpo", "hinge"]}, "loss.beta=0.3", "write it into the values of loss"),
        ({"train.epochs": [1, 2]}, "train.max_steps=3", "sweep.train.max_steps=[3]"),
    ],
)
def test_what_an_axis_decides_is_not_changed_like_a_key(recipe, axes, written, fix):
    (found,) = problems(recipe(axes), written)
    assert found.where == written
    assert fix in found.fix


def test_an_axis_of_the_file_is_replaced_however_it_is_nested(recipe):
    plan = load_sweep(recipe({"loss": {"beta": [0.1, 0.2]}, **ONE_RATE}), ["sweep.loss.beta=[0.3]"])
    assert [run.recipe.build_loss().hyperparameters["beta"] for run in plan.runs] == [0.3]


def test_equal_combinations_run_once_and_it_is_said(recipe):
    points = [{"loss": "dpo"}, {"loss": {"name": "dpo", "beta": 0.1}}, {"loss": "hinge"}]
    plan = load_sweep(recipe({"points": points, **ONE_RATE}))
    assert len(plan.runs) == 2
    assert any("1 of 3 combinations repeat another" in note for note in plan.notes)


def test_training_data_vary_where_held_out_data_are_given(recipe, tmp_path):
    files = [str(make_pairs(tmp_path / f"{name}.jsonl")) for name in ("a", "b", "held")]
    data = {"train": files[0], "eval": files[2], "processes": 1}
    plan = load_sweep(recipe({"data.train": files[:2], **ONE_RATE}, data=data))
    assert len(plan.runs) == 2
    assert any(note == "runs differ in their data (data.train)" for note in plan.terms)
    found = problems(recipe({"data.train": [*files[:1], "no.jsonl", "none.jsonl"], **ONE_RATE}, data=data))
    assert [each.given.split(",")[0] for each in found] == ["no.jsonl", "none.jsonl"]


def test_without_a_beta_every_loss_is_matched_to_dpos_default(recipe):
    plan = load_sweep(recipe({"loss": ["dpo", "gpo_exponential"], "match": "kappa", **ONE_RATE}))
    assert [run.recipe.build_loss().hyperparameters["beta"] for run in plan.runs] == [0.1, 0.05]
    assert any("matched to DPO's default, 0.1" in note for note in plan.notes)


def test_a_run_keeps_the_name_under_which_it_is_known_when_the_grid_grows(recipe):
    first = load_sweep(recipe({"loss.name": ["dpo", "hinge"], **ONE_RATE}))
    folder = SweepFolder(first.folder)
    with folder.held():
        folder.write(folder.adopt(first), threads=1, command="")
    wider = {"loss.name": ["dpo", "hinge"], "train.learning_rate": [1e-4, 2e-4]}
    labels = [run.label for run in folder.adopt(load_sweep(recipe(wider))).runs]
    assert labels == ["dpo", "dpo-learning_rate0.0002", "hinge", "hinge-learning_rate0.0002"]
    other = {"loss.name": ["dpo"], "train.learning_rate": [5e-4]}
    (run,) = folder.adopt(load_sweep(recipe(other))).runs
    assert run.label == "dpo-learning_rate0.0005"
    assert run.recipe.output.endswith("runs/dpo-learning_rate0.0005")


def written(plan, **facts):
    folder = SweepFolder(plan.folder)
    with folder.held():
        plan = folder.adopt(plan)
        folder.write(plan, threads=1, command="")
    return folder


def begun(folder, plan, state="finished"):
    """Pretend that every run of a plan has begun."""
    for run in plan.runs:
        folder.run(run.label).mkdir(parents=True)
        (folder.run(run.label) / "recipe.yaml").write_text(recipe_text(run.recipe))
        (folder.run(run.label) / "result.json").write_text(f'{{"status": "{state}"}}')


def test_a_result_belongs_to_the_recipe_that_stands_beside_it(recipe):
    first = load_sweep(recipe({"seed": [0], "train.learning_rate": [2e-4]}))
    folder = written(first)
    begun(folder, first)
    (folder.path / "sweep.json").write_text("{")
    (other,) = folder.adopt(load_sweep(recipe({"seed": [0], "train.learning_rate": [3e-4]}))).runs
    assert other.label != "seed0"
    (same,) = folder.adopt(load_sweep(recipe({"seed": [0], "train.learning_rate": [2e-4]}))).runs
    assert same.label == "seed0"
    assert folder.finished(same.label)


def test_a_recipe_that_a_killed_command_left_is_not_trained_under_another_name(recipe):
    folder = written(load_sweep(recipe({"seed": [0], "train.learning_rate": [1e-4]})))
    killed = folder.adopt(load_sweep(recipe({"seed": [0], "train.learning_rate": [2e-4]}))).runs[0]
    folder.write_recipe(killed)
    plan = load_sweep(recipe({"seed": [0], "train.learning_rate": [3e-4]}))
    written(plan)
    (run,) = folder.adopt(plan).runs
    assert load_recipe(str(folder.recipe(run.label))).train.learning_rate == 3e-4


def test_a_run_of_a_version_that_stored_no_digest_is_known_by_its_keys(recipe):
    plan = load_sweep(recipe({"seed": [0], **ONE_RATE}))
    folder = written(plan)
    file = folder.recipe("seed0")
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "What it computes" not in line))
    assert [run.label for run in folder.adopt(plan).runs] == ["seed0"]


def test_files_that_changed_are_noticed_whatever_the_names_and_whichever_run_read_them(recipe, tmp_path):
    files = [make_pairs(tmp_path / f"{name}.jsonl") for name in ("a", "b", "held")]
    data = {"train": str(files[0]), "eval": str(files[2]), "processes": 1}
    axes = {"data.train": [str(file) for file in files[:2]], **ONE_RATE}
    plan = load_sweep(recipe(axes, data=data))
    folder = written(plan)
    for run in folder.adopt(plan).runs:
        folder.run(run.label).mkdir(parents=True)
        write_json(folder.run(run.label) / "inputs.json", input_hashes(run.recipe))
    files[1].write_text(files[1].read_text() + files[1].read_text().splitlines(True)[0])
    with pytest.raises(RecipeError, match=r"content of .*b\.jsonl"):
        folder.adopt(load_sweep(recipe({**axes, "seed": [0, 1]}, data=data)))


def test_another_length_is_another_sweep_also_where_the_batch_size_varies(recipe):
    axes = {"train.batch_size": [8, 16], **ONE_RATE}
    folder = written(load_sweep(recipe(axes)))
    assert folder.adopt(load_sweep(recipe({"train.batch_size": [4, 8, 16], **ONE_RATE})))
    with pytest.raises(RecipeError, match=r"other train\.max_steps"):
        folder.adopt(load_sweep(recipe(axes), ["train.max_steps=50"]))


def test_another_loss_is_another_sweep_where_only_its_beta_varies(recipe):
    folder = written(load_sweep(recipe({"loss.beta": [0.1, 0.2], **ONE_RATE})))
    with pytest.raises(RecipeError, match="other loss"):
        folder.adopt(load_sweep(recipe({"loss.beta": [0.1, 0.2], **ONE_RATE}), ["loss.name=hinge"]))


def test_points_without_a_learning_rate_get_the_default_ones(recipe):
    points = [{"loss": "ipo", "train.learning_rate": [1e-3]}, {"loss": "dpo"}]
    plan = load_sweep(recipe({"points": points}))
    rates = [(run.recipe.build_loss().name, run.recipe.train.learning_rate) for run in plan.runs]
    assert rates == [("ipo", 1e-3), ("dpo", 3.3e-5), ("dpo", 1e-4), ("dpo", 3e-4)]
    moved = load_sweep(recipe({"points": points}), ["train.learning_rate=3e-3"])
    assert [run.recipe.train.learning_rate for run in moved.runs] == [1e-3, 1e-3, 3e-3, 9e-3]


def test_lengths_in_epochs_go_with_batch_sizes(recipe):
    plan = load_sweep(recipe({"train.epochs": [1, 2], "train.batch_size": [8, 16], **ONE_RATE}))
    assert {run.recipe.train.max_steps for run in plan.runs} == {None}


def test_a_folder_takes_no_runs_of_another_recipe_under_new_names(recipe):
    first = load_sweep(recipe({"loss.name": ["dpo"], **ONE_RATE}))
    folder = SweepFolder(first.folder)
    with folder.held():
        folder.write(first, threads=1, command="")
    for change in ("train.max_steps=50", "eval.samples=3", "data.eval_fraction=0.4"):
        with pytest.raises(RecipeError, match=f"other {change.partition('=')[0]}"):
            folder.adopt(load_sweep(recipe({"loss.name": ["hinge"], "seed": [4], **ONE_RATE}), [change]))


def test_a_missing_file_is_found_before_anything_runs(recipe):
    (found,) = problems(recipe({"seed": [0, 1]}), "data.train=nowhere.jsonl")
    assert found.where == "data.train"


def test_more_runs_than_anybody_wants_are_refused(recipe):
    (found,) = problems(recipe({"seed": list(range(1000)), "loss.beta": [0.1 + 0.001 * n for n in range(500)]}))
    assert "1,500,000" in found.given


@pytest.mark.parametrize(("name", "runs"), [("sweep-gpo", 162), ("sweep-losses", 180), ("sweep-lora-7b", 27)])
def test_shipped_sweeps_are_valid(name, runs, monkeypatch):
    monkeypatch.setattr("prefopt.sweep.source.completion_tokens", lambda recipe: 33.9)
    plan = load_sweep(name)
    assert len(plan.runs) == runs
    assert len(cache_builders(plan.runs)) == 1
    assert str(plan.folder) == f"runs/{name}"


def test_train_points_to_sweep(recipe):
    with pytest.raises(RecipeError, match="run it with prefopt sweep"):
        load_recipe(recipe({"seed": [0, 1]}))


def test_labels_are_words_and_all_different():
    changes = [
        {"loss.name": "dpo", "train.learning_rate": 1e-4, "seed": True},
        {"loss": {"name": "simpo", "beta": 2.0}, "model.path": "a/b c", "reference.model": None},
        {"data.train": ["x.jsonl", "y.jsonl"], "eval.path": 1},
        {"data.train": ["x.jsonl", "y.jsonl"], "eval.path": 1},
        {"loss": "x" * 300},
    ]
    labels = labels_of(changes)
    assert labels[0] == "dpo-learning_rate0.0001-seedtrue"
    assert labels[1].startswith("simpo-beta2-")
    assert len(set(labels)) == 5
    assert all(len(label) <= 122 and "/" not in label and " " not in label for label in labels)


def test_no_label_is_given_twice_even_where_one_looks_like_a_numbered_one():
    changes = [{"model.path": path} for path in ("x y", "x_y", "x_y-2")]
    assert len(set(labels_of(changes))) == 3

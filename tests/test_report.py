"""The report answers first, names what it leaves out, and never mixes what cannot be compared."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from finished import finished_run, finished_sweep

from prefopt.errors import RecipeError
from prefopt.report.commands import write_report
from prefopt.report.findings import findings_of
from prefopt.report.records import read_runs
from prefopt.report.settings import settings_of, short_keys
from prefopt.report.strength import strength_of
from prefopt.report.tables import cost_rows, setting_rows
from prefopt.report.writing import repetition
from prefopt_losses import get_loss, match_beta


def answer(*folders):
    return findings_of(settings_of(read_runs(list(folders))))


def shifted(seed):
    """Random numbers of another method: not those that the first one drew."""
    return np.random.default_rng(1000 + seed)


def two_losses(skill: float, **facts) -> dict[str, dict]:
    runs = {}
    for seed in range(3):
        runs[f"dpo-{seed}"] = {"loss": "dpo", "seed": seed, "skill": 0.55, **facts}
        runs[f"ipo-{seed}"] = {"loss": "ipo", "seed": seed, "skill": skill, "chance": shifted, **facts}
    return runs


def test_a_loss_that_ranks_far_better_is_named_first_and_called_better(tmp_path):
    found = answer(finished_sweep(tmp_path / "s", two_losses(0.97)))
    assert found.standings[0].setting.contestant == "ipo"
    assert found.versus[0].different
    assert found.sentences[0].startswith("ipo: held-out accuracy 0.9")
    assert any(sentence.startswith("Better than dpo by ") for sentence in found.sentences)


def test_no_difference_shown_is_said_first_with_what_would_have_been_found(tmp_path):
    found = answer(finished_sweep(tmp_path / "s", two_losses(0.55)))
    assert found.sentences[0].startswith("No difference shown: ")
    assert "with a chance of 80 %" in found.sentences[-1]


def test_settings_are_chosen_on_prompts_on_which_they_are_not_reported(tmp_path):
    found = answer(finished_sweep(tmp_path / "s", two_losses(0.9)))
    assert not set(found.halves.choosing) & set(found.halves.reporting)
    assert len(found.halves.choosing) == len(found.halves.reporting) == 30


def test_the_best_learning_rate_stands_for_its_loss(tmp_path):
    runs = {
        f"{loss}-{rate}-{seed}": {
            "loss": loss, "learning_rate": rate, "seed": seed, "skill": 0.9 if rate == 1e-5 else 0.5,
            "chance": shifted if loss == "ipo" else np.random.default_rng,
        }
        for loss in ("dpo", "ipo") for rate in (1e-6, 1e-5) for seed in (0, 1)
    }  # fmt: skip
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert {standing.setting.varied["train.learning_rate"] for standing in found.standings} == {1e-5}
    assert all(standing.tried == 2 for standing in found.standings)
    assert any("1e-05, is the largest that was tried" in warning for warning in found.warnings)


def test_a_setting_without_all_its_seeds_is_left_out_and_the_reason_given(tmp_path):
    runs = two_losses(0.9)
    runs["ipo-1"]["failed"] = "a gradient that is not finite"
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert [standing.setting.contestant for standing in found.standings] == ["dpo"]
    assert any("2 of 3 seeds finished: failed, a gradient that is not finite" in each for each in found.warnings)


def test_a_sweep_that_is_not_through_is_judged_by_its_whole_seeds(tmp_path):
    runs = two_losses(0.9)
    runs["ipo-2"] |= {"failed": "stopped by Ctrl-C", "state": "interrupted"}
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert {standing.setting.contestant for standing in found.standings} == {"dpo", "ipo"}
    assert {tuple(run.seed for run in standing.setting.finished) for standing in found.standings} == {(0, 1)}
    assert any(warning.startswith("not every run has finished: compared are seeds 0, 1") for warning in found.warnings)


def test_losses_with_more_and_with_fewer_seeds_are_compared_on_those_of_both(tmp_path):
    runs = two_losses(0.9)
    del runs["ipo-2"]
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert found.versus[0].comparison.seeds == 2
    assert any("compared are seeds 0, 1, which all have" in warning for warning in found.warnings)


def test_a_setting_of_which_a_seed_failed_is_left_out_whatever_seeds_the_others_have(tmp_path):
    runs = {
        f"{loss}-{rate}-{seed}": {"loss": loss, "learning_rate": rate, "seed": seed, "skill": 0.5 + rate * 4000}
        for loss, seeds in (("dpo", 2), ("ipo", 3)) for rate in (1e-5, 1e-4) for seed in range(seeds)
    }  # fmt: skip
    runs["ipo-0.0001-2"]["failed"] = "a gradient that is not finite"
    found = answer(finished_sweep(tmp_path / "s", runs))
    best = {standing.setting.contestant: standing.setting.varied["train.learning_rate"] for standing in found.standings}
    assert best == {"dpo": 1e-4, "ipo": 1e-5}
    assert any("ipo, learning_rate 0.0001 is left out: 2 of 3" in warning for warning in found.warnings)


def test_one_run_of_another_loss_takes_no_seeds_from_the_others(tmp_path):
    runs = two_losses(0.9) | {"kto-0": {"loss": "kto"}}
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert found.versus[0].comparison.seeds == 3
    assert any(warning.startswith("kto is left out: 1 of 3 seeds") for warning in found.warnings)


def test_what_is_left_of_a_larger_grid_does_not_hold_up_the_answer(tmp_path):
    runs = two_losses(0.9) | {"kto-0": {"loss": "kto", "failed": "never begun", "state": "unfinished"}}
    sweep = finished_sweep(tmp_path / "s", runs)
    content = json.loads((sweep / "sweep.json").read_text())
    content["runs"][-1]["planned"] = False
    (sweep / "sweep.json").write_text(json.dumps(content))
    found = answer(sweep)
    assert len(found.standings) == 2
    assert not any("not every run has finished" in warning for warning in found.warnings)


def test_one_seed_on_a_side_is_about_models_and_not_paired(tmp_path):
    found = answer(finished_sweep(tmp_path / "s", {"dpo": {"loss": "dpo"}, "ipo": {"loss": "ipo", "seed": 5}}))
    assert not found.versus[0].comparison.paired
    assert "With one seed on a side this is about these trained models, not about the losses." in found.sentences


def test_names_may_hold_what_is_mathematics_elsewhere(tmp_path):
    runs = {name: {"data": f"{name}.jsonl"} for name in ("a$\\frac$1", "cost$_{$x")}
    runs = {f"run{number}": facts for number, facts in enumerate(runs.values())}
    written = write_report([finished_sweep(tmp_path / "s", runs)], tmp_path / "report")
    assert any(file.suffix == ".svg" for file in written.files)


def test_parts_of_a_sum_are_named_by_what_differs(tmp_path):
    sums = [[{"name": "dpo", "beta": beta}, {"name": "sft", "weight": 0.5}] for beta in (0.1, 0.2)]
    runs = {f"run{number}": {"loss": loss} for number, loss in enumerate(sums)}
    names = [setting.name for setting in settings_of(read_runs([finished_sweep(tmp_path / "s", runs)]))]
    assert len(set(names)) == 2
    assert all("{" not in name and "0." in name for name in names), names


def test_more_seeds_for_the_best_settings_alone_are_used(tmp_path):
    runs = {
        f"{loss}-{rate}-{seed}": {"loss": loss, "learning_rate": rate, "seed": seed}
        for loss in ("dpo", "ipo") for rate in (1e-6, 1e-5) for seed in range(4 if rate == 1e-5 else 1)
    }  # fmt: skip
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert [len(standing.setting.finished) for standing in found.standings] == [4, 4]


def test_losses_of_other_seeds_are_two_samples(tmp_path):
    runs = two_losses(0.97)
    for label, facts in runs.items():
        facts["seed"] += 10 * label.startswith("ipo")
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert not found.versus[0].comparison.paired
    assert any(warning.startswith("not all share their seeds") for warning in found.warnings)
    assert any("as two samples" in sentence for sentence in found.sentences)


def test_the_edge_of_a_grid_is_named_where_there_is_one_loss(tmp_path):
    runs = {f"{rate}": {"learning_rate": rate, "skill": 0.5 + rate * 1e4} for rate in (1e-6, 1e-5, 3e-5)}
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert any("learning_rate of dpo, 3e-05, is the largest that was tried" in each for each in found.warnings)


def test_single_runs_on_unequal_terms_are_said_to_be(tmp_path):
    one, other = (finished_run(tmp_path / f"{steps}", max_steps=steps) for steps in (10, 20))
    text = write_report([one, other], tmp_path / "report", figures=False).markdown.read_text()
    assert "runs see 640 to 1,280 comparisons: they are not on an equal budget" in text


def test_runs_of_the_same_name_in_two_sweeps_are_told_apart(tmp_path):
    sweeps = [finished_sweep(tmp_path / name, {"dpo": {"seed": seed}}) for seed, name in enumerate(("a", "b"))]
    assert [record.label for record in read_runs(sweeps)] == ["a/dpo", "b/dpo"]


def test_the_recipe_of_a_run_is_not_its_folder(tmp_path):
    run = finished_run(tmp_path / "run")
    with pytest.raises(RecipeError) as error:
        read_runs([run / "recipe.yaml"])
    assert error.value.problems[0].fix == f"give {run}"


def test_keys_with_the_same_last_part_have_columns_of_their_own(tmp_path):
    runs = {}
    for loss in ("dpo", {"name": "robust_dpo"}):
        for rate in (1e-5, 2e-5):
            name = loss if isinstance(loss, str) else loss["name"]
            optimizer = {"name": "adamw", "betas": [0.9, 0.9 + rate]}
            runs[f"{name}{rate}"] = {"loss": loss, "learning_rate": rate, "optimizer": optimizer}
    records = read_runs([finished_sweep(tmp_path / "s", runs)])
    settings = settings_of(records)
    rows = setting_rows(settings, findings_of(settings))
    assert {"learning_rate", "betas"} <= set(rows[0])
    assert short_keys(["train.optimizer.name", "model.name", "seed"]) == {
        "train.optimizer.name": "train.optimizer.name", "model.name": "model.name", "seed": "seed",
    }  # fmt: skip


def test_what_is_lost_costs_too(tmp_path):
    runs = two_losses(0.9)
    runs["ipo-1"]["failed"] = "out of memory"
    records = read_runs([finished_sweep(tmp_path / "s", runs)])
    costs = {row["of"]: row for row in cost_rows(settings_of(records))}
    assert (costs["ipo"]["runs"], costs["ipo"]["without a result"]) == (3, 1)
    assert costs["ipo"]["process seconds"] == 3.0


def test_html_in_a_name_or_a_reason_stays_text_in_markdown_too(tmp_path):
    runs = {"dpo": {}, "ipo": {"loss": "ipo", "failed": "<img src=x>"}}
    text = write_report([finished_sweep(tmp_path / "s", runs)], tmp_path / "report", figures=False).markdown.read_text()
    assert "<img" not in text
    assert "&lt;img src=x>" in text


def test_likelihood_displacement_and_clipped_steps_are_named(tmp_path):
    found = answer(finished_run(tmp_path / "run"))
    assert any("likelihood displacement in" in warning for warning in found.warnings)
    assert any("most steps were clipped" in warning for warning in found.warnings)


def test_gold_reward_is_the_measure_where_every_run_has_it(tmp_path):
    found = answer(finished_sweep(tmp_path / "s", two_losses(0.9, gold=True)))
    assert found.metric.name == "gold_reward"


def test_runs_on_different_held_out_data_are_refused_with_their_names(tmp_path):
    one, other = finished_run(tmp_path / "one"), finished_run(tmp_path / "other", prompts=50)
    with pytest.raises(RecipeError) as error:
        write_report([one, other], tmp_path / "report")
    assert "one on 60 comparisons of pairs.jsonl" in str(error.value)
    assert "other on 50 comparisons" in str(error.value)
    assert not (tmp_path / "report").exists()


def test_runs_of_other_training_data_on_the_same_held_out_ones_are_compared(tmp_path):
    folders = [finished_run(tmp_path / name, data=f"{name}.jsonl") for name in ("few", "many")]
    found = answer(*folders)
    assert {standing.setting.name for standing in found.standings} == {"train few.jsonl", "train many.jsonl"}


def test_every_wrong_folder_is_named_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError) as error:
        read_runs([tmp_path / "empty", tmp_path / "nowhere"])
    assert len(error.value.problems) == 2


def test_nothing_finished_is_said(tmp_path):
    sweep = finished_sweep(tmp_path / "s", {"a": {"failed": "out of memory"}})
    with pytest.raises(RecipeError, match="at least one finished run"):
        write_report([sweep], tmp_path / "report")


def test_the_files_of_a_report(tmp_path):
    runs = two_losses(0.9) | {"kto-0": {"loss": "kto", "failed": "out of memory"}}
    sweep = finished_sweep(tmp_path / "mine", runs, notes=("one learning rate",))
    written = write_report([sweep], tmp_path / "report")
    tables = ("runs", "settings", "standings", "looks", "comparisons")
    assert {file.name for file in written.files if file.parent.name == "report"} == {
        "report.html", "report.md", *(f"{name}.{kind}" for name in tables for kind in ("csv", "parquet")),
    }  # fmt: skip
    assert {file.suffix for file in written.files if file.parent.name == "figures"} == {".png", ".svg"}
    text = written.markdown.read_text()
    for wanted in ("## Answer", "| kto-0 | failed | out of memory |", "prefopt sweep mine", "one learning rate"):
        assert wanted in text
    with (tmp_path / "report" / "runs.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    table = pq.read_table(tmp_path / "report" / "runs.parquet")
    assert len(rows) == table.num_rows == 7
    assert float(rows[1]["accuracy"]) == table["accuracy"][1].as_py()


def test_a_script_in_an_answer_of_a_model_stays_text(tmp_path):
    run = finished_run(tmp_path / "run", answer="<script>alert(1)</script></details>")
    html = write_report([run], tmp_path / "report", figures=False).html.read_text()
    assert "<script>alert(1)" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_a_single_run_has_a_report_too(tmp_path):
    written = write_report([finished_run(tmp_path / "run")], tmp_path / "report", figures=False)
    assert "held-out accuracy" in written.answer[0]
    assert "prefopt train" in written.markdown.read_text()


def test_the_strength_of_matched_losses_is_the_same():
    dpo = get_loss("dpo", beta=0.1)
    for name in ("gpo_exponential", "gpo_squared", "gpo_savage", "robust_dpo"):
        matched = get_loss(name, beta=match_beta(get_loss(name), dpo).near_zero)
        assert strength_of(matched, None).kappa_beta == pytest.approx(strength_of(dpo, None).kappa_beta)


def test_a_beta_per_token_needs_the_tokens_to_have_a_strength_per_completion():
    ipo = get_loss("ipo", beta=2.5)
    assert strength_of(ipo, None).kappa_beta is None
    assert strength_of(ipo, 100.0).kappa_beta == pytest.approx(0.05)


def test_repetition_counts_runs_of_four_words():
    assert repetition("a b c d e") == 0.0
    assert repetition("a b c d a b c d a b c d") == pytest.approx(1 - 4 / 9)
    assert repetition("too short") is None


def test_margins_are_differences_of_log_ratios(tmp_path):
    (record,) = read_runs([finished_run(tmp_path / "run")])
    table = record.held_out
    expected = table.columns["chosen_logratio"] - table.columns["rejected_logratio"]
    assert np.array_equal(table.margins(), expected)
    assert math.isclose(record.clipped, 2 / 3)


def test_sums_and_losses_of_ones_own_have_conventions_part_by_part(tmp_path):
    own = {"name": "mine", "terms": [{"f": "squared", "beta": 0.2, "aggregate": "mean"}]}
    runs = {"sum": {"loss": "dpo+0.5*sft"}, "own": {"loss": own}, "kto": {"loss": "kto"}, "list": {"loss": "rrhf"}}
    text = write_report([finished_sweep(tmp_path / "s", runs)], tmp_path / "report", figures=False).markdown.read_text()
    assert "| dpo+0.5*sft: sft |" in text
    assert "| mine | squared |" in text


def test_equal_results_are_said_to_be_equal_and_not_to_be_nearly_so(tmp_path):
    runs = {"dpo": {"loss": "dpo"}, "ipo": {"loss": "ipo"}}
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert "Exactly the same results on every prompt as ipo." in found.sentences
    assert not any("0.000 or more" in sentence for sentence in found.sentences)


def test_too_few_prompts_to_find_anything_are_said_to_be_too_few(tmp_path):
    runs = {"dpo": {"loss": "dpo", "prompts": 2}, "ipo": {"loss": "ipo", "prompts": 2, "seed": 1}}
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert any("could not have shown any" in sentence for sentence in found.sentences)
    assert any("one seed on a side" in sentence for sentence in found.sentences)


def test_a_run_that_repeats_another_is_named_and_left_out(tmp_path):
    found = answer(finished_sweep(tmp_path / "s", {"first": {}, "again": {}}))
    assert any(warning.startswith("again repeats a setting") for warning in found.warnings)


def test_seeds_of_a_setting_stay_together_however_many_keys_vary(tmp_path):
    runs = {
        f"{loss}-{beta}-{rate}-{size}-{seed}": {
            "loss": {"name": loss, "beta": beta}, "learning_rate": rate, "batch_size": size, "max_steps": 640 // size,
            "seed": seed,
        }
        for loss in ("dpo", "ipo") for beta in (0.1, 0.2) for rate in (1e-5, 2e-5) for size in (16, 32)
        for seed in (0, 1)
    }  # fmt: skip
    settings = settings_of(read_runs([finished_sweep(tmp_path / "s", runs)]))
    assert len(settings) == 16
    assert all(len(setting.runs) == 2 for setting in settings)


def test_values_that_look_alike_when_rounded_are_different_settings(tmp_path):
    runs = {name: {"learning_rate": rate} for name, rate in (("a", 1.00001e-5), ("b", 1.00002e-5))}
    settings = settings_of(read_runs([finished_sweep(tmp_path / "s", runs)]))
    assert len({setting.name for setting in settings}) == 2


def test_the_same_path_with_another_content_is_another_setting(tmp_path):
    sweep = finished_sweep(tmp_path / "s", {"a": {"seed": 0}, "b": {"seed": 1}})
    for label, digest in (("a", "1" * 64), ("b", "2" * 64)):
        (sweep / "runs" / label / "inputs.json").write_text(f'{{"pairs.jsonl": "{digest}"}}')
    names = [setting.name for setting in settings_of(read_runs([sweep]))]
    assert names == ["content of pairs.jsonl 11111111", "content of pairs.jsonl 22222222"]


def test_one_prompt_with_different_outcomes_is_no_equality(tmp_path):
    runs = {"dpo": {"loss": "dpo", "prompts": 1, "skill": 1.0}, "ipo": {"loss": "ipo", "prompts": 1, "skill": 0.0}}
    found = answer(finished_sweep(tmp_path / "s", runs))
    assert not any("Exactly the same" in sentence for sentence in found.sentences)
    assert any("could not have shown any" in sentence for sentence in found.sentences)


def test_a_run_whose_measure_is_not_finite_is_left_out_by_name_and_the_page_still_works(tmp_path):
    runs = {"dpo": {"loss": "dpo", "gold": True}, "ipo": {"loss": "ipo", "gold": True}}
    sweep = finished_sweep(tmp_path / "s", runs)
    file = sweep / "runs" / "dpo" / "samples.jsonl"
    rows = file.read_text()
    file.write_text(rows.replace('"policy": 1.0', '"policy": NaN').replace('"policy": 0.0', '"policy": NaN'))
    looks = sweep / "runs" / "dpo" / "metrics.jsonl"
    looks.write_text(looks.read_text().replace('"eval/kl": 2.0', '"eval/kl": Infinity'))
    written = write_report([sweep], tmp_path / "report", figures=False)
    assert any(warning.startswith("dpo is left out") for warning in written.warnings)
    html = written.html.read_text()
    figures = html.split('id="figures">')[1].split("</script>")[0]
    assert "Infinity" not in figures
    assert "NaN" not in figures


def test_a_damaged_sweep_file_is_said_to_be_one(tmp_path):
    sweep = finished_sweep(tmp_path / "s", {"a": {}})
    (sweep / "sweep.json").write_text("{")
    with pytest.raises(RecipeError, match="damaged"):
        read_runs([sweep])

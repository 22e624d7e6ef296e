"""Every held-out comparison of a run stands in a table, the same rows for every seed, loss and token budget."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from world import train


def table(folder):
    return pq.read_table(folder / "held_out.parquet").to_pylist()


def test_the_table_adds_up_to_the_measures(tmp_path):
    result = train(tmp_path)["eval"]
    rows = table(tmp_path / "run")
    assert len(rows) == result["comparisons"]
    assert sum(row["correct"] for row in rows) / len(rows) == pytest.approx(result["accuracy"])
    assert sum(row["margin"] for row in rows) / len(rows) == pytest.approx(result["margin"], abs=1e-5)
    drift = sum(row["chosen_logratio"] / row["chosen_tokens"] for row in rows) / len(rows)
    assert drift == pytest.approx(result["chosen_drift_per_token"], abs=1e-5)


def test_seed_loss_and_token_budget_change_no_row(tmp_path):
    train(tmp_path)
    train(tmp_path, loss="ipo", seed=3, train={"token_budget": 40}, output=str(tmp_path / "other"))
    keys = ("prompt", "group", "comparison", "chosen_tokens", "rejected_tokens")
    one, other = ([tuple(row[key] for key in keys) for row in table(tmp_path / name)] for name in ("run", "other"))
    assert one == other
    assert len(set(one)) == len(one)


def test_another_held_out_seed_holds_other_prompts_out(tmp_path):
    train(tmp_path)
    train(tmp_path, data={"held_out_seed": 1}, output=str(tmp_path / "other"))
    one, other = ({row["prompt"] for row in table(tmp_path / name)} for name in ("run", "other"))
    assert one != other

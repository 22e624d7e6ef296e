"""Files, folders, saved datasets and hub names; weights, splits, columns, filters."""

from __future__ import annotations

import json

import datasets
import pytest

from prefopt.errors import DataError


def said(caught):
    return "\n".join(str(problem) for problem in caught.value.problems)


def prompts(dataset, tokenizer):
    return [tokenizer.decode(group.prompt) for group in dataset]


def rows(*names):
    return [{"prompt": f"{name}?", "chosen": " yes", "rejected": " no"} for name in names]


# What is not there


def test_a_missing_file_names_its_near_neighbour(load, write, pairs):
    path = write(pairs(2), "pairs.jsonl")
    with pytest.raises(DataError, match=r'did you mean "pairs\.jsonl"'):
        load(path.replace("pairs.jsonl", "piars.jsonl"))


@pytest.mark.parametrize("name", ["./x/y", "~/no-such-folder-here", "/no/such", "some/pairs.csv", "pairs"])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(name, load, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="a file, a folder, or a hub name"):
        load(name)


def test_all_missing_sources_of_both_sets_are_named_at_once(load):
    with pytest.raises(DataError) as caught:
        load(["a.jsonl", "b.jsonl"], eval="c.jsonl", columns={"best": "chosen"})
    assert [p.where for p in caught.value.problems] == ["data.columns.best", "a.jsonl", "b.jsonl", "c.jsonl"]


@pytest.mark.parametrize("columns", [{"chosen": "prompt"}, {"chosen": "best", "rejected": "best"}])
def test_a_column_with_two_roles_is_refused(load, write, pairs, columns):
    with pytest.raises(DataError, match="one role"):
        load(write(pairs(3)), columns=columns)


def test_a_file_of_another_kind_is_said(load, write):
    with pytest.raises(DataError, match=r"a data file: \.jsonl"):
        load(write("text", "pairs.txt"))


def test_an_empty_file_and_an_empty_folder_are_errors(load, write, tmp_path):
    with pytest.raises(DataError, match="at least one row"):
        load(write("", "empty.jsonl"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="a folder with data files"):
        load(str(tmp_path / "folder"))


# Rows that are wrong


def test_wrong_rows_of_several_files_are_named_with_file_and_line(load, write, pair):
    first = write([pair, {**pair, "chosen": 5}, {"prompt": "x"}], "first.jsonl")
    second = write(json.dumps(pair) + "\n{\n", "second.jsonl")
    with pytest.raises(DataError) as caught:
        load([first, second])
    assert [p.where for p in caught.value.problems] == [
        f"{first}, line 2",
        f"{first}, line 3",
        f"{second}, line 2",
    ]


def test_a_file_of_nothing_but_wrong_rows_is_not_read_to_its_end(load, write, pair):
    with pytest.raises(DataError) as caught:
        load(write([pair] + [{**pair, "rejected": 1}] * 1000))
    first, _ = caught.value.problems  # alike rows are one problem
    assert first.where.endswith("line 2, and 19 rows more")
    assert "20 wrong rows shown" in said(caught)


def test_missing_columns_list_what_was_found_and_point_to_data_columns(load):
    with pytest.raises(DataError) as caught:
        load([{"question": "Q", "chosen_answer": "a", "rejected_answer": "b"}] * 3)
    assert len(caught.value.problems) == 1
    for text in ("question, chosen_answer, rejected_answer", "data.columns", 'did you mean "chosen_answer"?'):
        assert text in said(caught)


def test_a_mapped_column_that_is_not_there_is_said(load, pair):
    with pytest.raises(DataError, match=r'a column "best", which data\.columns gives for chosen'):
        load([{"prompt": "Q", "rejected": " b", "bset": " a"}], columns={"chosen": "best"})
    with pytest.raises(DataError, match=r'a column "p", which data\.columns gives for preference_probability'):
        load([pair], columns={"preference_probability": "p"})


def test_a_mix_of_pairs_and_labels_is_refused(load, write, pair):
    single = {"prompt": "Q", "completion": " a", "label": True}
    with pytest.raises(DataError, match="line 2: chosen and rejected, as in the rows before"):
        load([pair, single])
    with pytest.raises(DataError, match="sources of one kind"):
        load([write([pair], "a.jsonl"), write([single], "b.jsonl")])
    with pytest.raises(DataError, match="sources of one kind"):
        load(write([pair], "a.jsonl"), eval=write([single], "b.jsonl"))


# Columns, filters, weights


def test_columns_of_a_source_come_before_those_of_the_recipe(load, write, one_source, plain):
    first = write([{"q": "A?", "good": " a", "bad": " b"}], "first.jsonl")
    second = write([{"x": "B?", "y": " a", "z": " b"}], "second.jsonl")
    other = one_source(second, columns={"prompt": "x", "chosen": "y", "rejected": "z"})
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data = load([first, other], columns=columns)
    assert prompts(data.train, plain) == ["A?", "B?"]
    assert [group.comparisons[0].row for group in data.train] == [1, 2]


def test_a_filter_keeps_rows_and_counts_the_others(load, plain):
    scored = [{**row, "score": score, "lang": "en"} for row, score in zip(rows(*"ABC"), (0.2, 0.6, 0.9), strict=True)]
    data = load(scored, filter={"score": ">= 0.6", "lang": ["en", "de"]})
    assert prompts(data.train, plain) == ["B?", "C?"]
    assert data.report.dropped == {"data.filter does not keep it": 1}
    assert [group.comparisons[0].row for group in data.train] == [2, 3]


def test_a_row_that_the_filter_leaves_out_may_be_wrong(load, pair):
    assert len(load([{"kind": "note"}, {**pair, "kind": "pair"}], filter={"kind": "pair"}).train) == 1


def test_an_unknown_filter_column_is_an_error_even_if_null_would_do(load, pair):
    with pytest.raises(DataError, match=r"data\.filter\.scroe"):
        load([{**pair, "score": 1}], filter={"scroe": None})


def test_a_weight_takes_rows_more_often_or_a_random_share(load, write, one_source, pairs, plain):
    path = write(pairs(40))
    twice = load([one_source(path, weight=2)])
    assert sorted(prompts(twice.train, plain)) == sorted([f"Question {i}?" for i in range(40)] * 2)
    half = [prompts(load([one_source(path, weight=0.5)], seed=seed).train, plain) for seed in (0, 0, 1)]
    assert [len(set(part)) for part in half] == [20, 20, 20]
    assert half[0] == half[1] != half[2]
    more = prompts(load([one_source(path, weight=1.25)]).train, plain)
    assert len(more) == 50
    assert len(set(more)) == 40
    assert twice.report.rows_kept == 40


def test_source_rows_run_on_through_all_sources(load, write):
    paths = [write(rows(*names), f"{names}.jsonl") for names in ("AB", "CDE")]
    assert [group.comparisons[0].row for group in load(paths).train] == [1, 2, 3, 4, 5]


# Folders and saved datasets


def test_a_folder_is_all_its_files_in_order(load, write, tmp_path, plain):
    write(rows("B"), "folder/b.jsonl")
    write(rows("A"), "folder/a.jsonl")
    write("not data", "folder/README.md")
    assert prompts(load(str(tmp_path / "folder")).train, plain) == ["A?", "B?"]


@pytest.mark.parametrize("layout", ["folder/{}/data.jsonl", "folder/{}-00000-of-00001.jsonl", "folder/{}.jsonl"])
def test_a_folder_with_splits_never_mixes_them(layout, load, write, tmp_path, plain, one_source):
    for split in ("train", "test", "train_prefs"):
        write(rows(split), layout.format(split))
    folder = str(tmp_path / "folder")
    wanted = load(folder, split="train_prefs", eval=folder)
    assert prompts(wanted.train, plain) == ["train_prefs?"]
    assert prompts(wanted.eval, plain) == ["test?"]
    chosen = load([one_source(folder, split="test")])
    assert prompts(chosen.train, plain) == ["test?"]
    assert "test?" not in prompts(load(folder).train, plain)
    with pytest.raises(DataError, match=r'a split "prefs"\n    given: splits: .*test'):
        load(folder, split="prefs")


def test_a_dataset_saved_to_disk_is_read(load, tmp_path, plain):
    saved = datasets.DatasetDict({split: datasets.Dataset.from_list(rows(split)) for split in ("train", "test")})
    saved.save_to_disk(tmp_path / "both")
    saved["test"].save_to_disk(tmp_path / "one")
    data = load(str(tmp_path / "both"), eval=str(tmp_path / "one"))
    assert prompts(data.train, plain) == ["train?"]
    assert prompts(data.eval, plain) == ["test?"]


# The hub


def test_a_hub_name_is_loaded_with_its_split_and_without_remote_code(load, monkeypatch, plain):
    asked = []

    def load_dataset(name, **arguments):
        asked.append((name, arguments))
        if arguments["split"] not in ("train", "test"):
            raise ValueError(f'Unknown split "{arguments["split"]}". Should be one of ["train", "test"].')
        return datasets.Dataset.from_list(rows(arguments["split"]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load("owner/pairs", eval="owner/pairs")
    assert asked == [("owner/pairs", {"split": split}) for split in ("train", "validation", "test")]
    assert prompts(data.train, plain) == ["train?"]
    assert prompts(data.eval, plain) == ["test?"]
    with pytest.raises(DataError, match="Unknown split"):
        load("owner/pairs", split="prefs")


def test_a_hub_that_does_not_answer_is_a_data_error_that_says_what_was_tried(load, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        load("owner/pairs")
    for text in ("owner/pairs", "no such file or folder here", "no route to host", "split train"):
        assert text in said(caught)
    assert "more lines" not in said(caught)


def test_a_hub_dataset_with_a_class_label_and_nested_messages_is_read(load, monkeypatch, chat):
    features = datasets.Features(
        {
            "prompt": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "completion": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "label": datasets.ClassLabel(names=["bad", "good"]),
        }
    )
    row = {
        "prompt": [{"role": "user", "content": "Q"}],
        "completion": [{"role": "assistant", "content": "a"}],
        "label": 1,
    }
    stored = datasets.Dataset.from_list([row], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stored)
    train = load("owner/labels", chat).train
    assert train[0].comparisons[0].chosen == 0
    assert chat.decode(train[0].completions[0]) == "a<|end|>\n"

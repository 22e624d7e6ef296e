"""The whole way from a recipe's section to two sets and a report: cache, held-out prompts, counts."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefopt.data import cache, load_data, tokenized
from prefopt.errors import DataError, UserError


def prompts(dataset, tokenizer):
    return [tokenizer.decode(group.prompt) for group in dataset]


def contents(dataset):
    return [
        (group.prompt.tolist(), [side.tolist() for side in group.completions], group.comparisons) for group in dataset
    ]


@pytest.fixture
def tokenized_rows(monkeypatch):
    """The number of rows of every tokenization that happens."""
    counts = []
    real = datasets.Dataset.map

    def counted(self, *arguments, **named):
        counts.append(len(self))
        return real(self, *arguments, **named)

    monkeypatch.setattr(datasets.Dataset, "map", counted)
    return counts


# The cache


def test_the_same_rows_are_tokenized_once(load, pairs, tokenized_rows):
    first = load(pairs(5))
    again = load(pairs(5))
    assert tokenized_rows == [5]
    assert contents(first.train) == contents(again.train)
    assert (first.report.sources[0].from_cache, again.report.sources[0].from_cache) == (False, True)
    assert first.report.dropped == again.report.dropped


def test_what_does_not_change_ids_does_not_tokenize_again(load, write, pairs, tokenized_rows, one_source):
    load(pairs(6))
    load(pairs(6), group_by_prompt=True, eval_fraction=0.5, seed=3)
    load([one_source(write(pairs(6), "renamed.jsonl"), weight=0.5)], processes=2)
    load(pairs(6), eval=write(pairs(6), "eval.jsonl"))
    assert tokenized_rows == [6]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 255},
        {"eos": "never"},
        {"truncation": "drop"},
        {"filter": {"prompt": "!= x"}},
        {"columns": {"prompt": "rejected", "rejected": "prompt"}},
    ],
)
def test_what_changes_ids_tokenizes_again(change, load, pairs, tokenized_rows):
    load(pairs(3))
    load(pairs(3), **change)
    assert tokenized_rows == [3, 3]


def test_another_tokenizer_or_template_tokenizes_again(load, pairs, make_tokenizer, tokenized_rows):
    for tokenizer in (make_tokenizer(), make_tokenizer(bos=True), make_tokenizer(chat_template="x")):
        load(pairs(3), tokenizer)
    assert tokenized_rows == [3, 3, 3]


def test_a_changed_row_is_seen(load, pairs, plain):
    load(pairs(3))
    rows = pairs(3)
    rows[1]["prompt"] = "New?"
    assert prompts(load(rows).train, plain)[1] == "New?"


def test_several_processes_give_the_same_rows_in_the_same_order(load, pairs, tmp_path):
    one = contents(load(pairs(30), processes=1).train)
    shutil.rmtree(tmp_path / "cache")
    several = load(pairs(30), processes=3)
    assert contents(several.train) == one
    assert not several.report.sources[0].from_cache


def test_two_loads_at_once_both_succeed(write, pairs, plain, settings, monkeypatch, tmp_path):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    path = write(pairs(20))
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(load_data, settings(path), plain, seed=0, quiet=True) for _ in range(2)]
    assert contents(runs[0].result().train) == contents(runs[1].result().train)
    assert [name for name in os.listdir(tmp_path / "cache" / "data") if name.startswith(".")] == []


def test_the_slower_of_two_builders_keeps_the_folder_of_the_faster(tmp_path):
    def build(folder):
        (folder / "from").write_text("slower")
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "from").write_text("faster")

    folder, was_there = cache.built_folder(tmp_path, "key", build)
    assert not was_there
    assert (folder / "from").read_text() == "faster"
    assert os.listdir(tmp_path) == ["key"]


def test_a_failed_build_leaves_nothing_and_old_remains_are_swept(tmp_path):
    old = tmp_path / ".key-1-dead"
    old.mkdir()
    os.utime(old, (0, 0))

    def build(folder):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.built_folder(tmp_path, "key", build)
    assert os.listdir(tmp_path) == []


def test_a_damaged_cache_is_made_again(load, pairs, tmp_path):
    before = contents(load(pairs(4)).train)
    (tokens,) = (tmp_path / "cache" / "data").glob("*/tokens*.arrow")
    tokens.write_bytes(b"damaged")
    assert contents(load(pairs(4)).train) == before


def test_a_cache_that_cannot_be_written_says_which_variable_moves_it(load, pairs, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(UserError, match="set PREFOPT_CACHE"):
        load(pairs(2))


def test_no_text_is_left_in_the_cache(load, pairs, tmp_path):
    load(pairs(4))
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {"source.json", "tokens.arrow"}


def test_small_data_is_not_forked(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert tokenized._processes(None, 5_000) is None
    assert tokenized._processes(None, 45_000) == 4
    assert tokenized._processes(None, 10_000_000) == 8
    assert tokenized._processes(3, 100) == 3
    assert tokenized._processes(1, 10_000_000) is None


# Held-out prompts


def repeated(count):
    return [
        {"prompt": f"Question {i}?", "chosen": f" yes {side}", "rejected": " no"}
        for side in range(3)
        for i in range(count)
    ]


@pytest.mark.parametrize("grouped", [False, True])
def test_no_prompt_is_in_both_sets_and_no_row_is_lost(load, plain, grouped):
    data = load(repeated(20), eval_fraction=0.25, group_by_prompt=grouped)
    train, held = prompts(data.train, plain), prompts(data.eval, plain)
    assert not set(train) & set(held)
    assert len(set(held)) == 5
    assert data.train.comparisons_per_group.sum() == 45
    assert data.eval.comparisons_per_group.sum() == 15
    assert data.report.shared_prompts == 0


def test_the_cut_does_not_tear_a_prompt_apart(load, plain):
    # Cut prompts differ with the length of their answers; the whole prompt decides the side.
    rows = [
        {"prompt": f"Question {i} is one two three four five?", "chosen": " yes" * n, "rejected": " no"}
        for i in range(8)
        for n in (1, 4, 8)
    ]
    data = load(rows, eval_fraction=0.5, truncation="prompt", max_length=14)
    hashes = [set(part.layout.prompt_hashes.tolist()) for part in (data.train, data.eval)]
    assert not hashes[0] & hashes[1]
    assert [len(part) for part in hashes] == [4, 4]


def test_the_held_out_prompts_follow_seed_and_content_not_order(load, plain):
    rows = repeated(20)
    held = [set(prompts(load(r, eval_fraction=0.3, held_out_seed=s).eval, plain)) for r, s in
            ((rows, 0), (rows[::-1], 0), (rows, 1))]  # fmt: skip
    assert held[0] == held[1] != held[2]


def test_few_prompts_change_sides_when_rows_are_added(load, plain):
    before = set(prompts(load(repeated(40), eval_fraction=0.25).eval, plain))
    after = set(prompts(load(repeated(44), eval_fraction=0.25).eval, plain))
    assert len(before & after) >= 7


def test_at_least_one_prompt_is_held_out_and_at_least_one_is_trained_on(load, pairs):
    assert len(load(pairs(10), eval_fraction=0.001).eval) == 1
    assert len(load(pairs(2), eval_fraction=0.99).train) == 1
    assert load(pairs(2), eval_fraction=0.0).eval is None
    with pytest.raises(DataError, match=r"data\.eval_fraction"):
        load(pairs(1), eval_fraction=0.1)


def test_given_eval_data_are_used_whole_and_shared_prompts_are_reported(load, write, pairs):
    data = load(pairs(10), eval=write(pairs(12)[8:], "eval.jsonl"), eval_fraction=0.5)
    assert (len(data.train), len(data.eval)) == (10, 4)
    assert data.report.shared_prompts == 2


def test_copies_by_weight_stay_on_one_side(load, write, one_source, pairs, plain):
    data = load([one_source(write(pairs(20)), weight=3)], eval_fraction=0.3)
    assert not set(prompts(data.train, plain)) & set(prompts(data.eval, plain))
    assert [groups.comparisons_per_group.sum() for groups in (data.train, data.eval)] == [42, 18]


def test_held_out_rows_are_grouped_by_prompt_and_training_rows_only_on_request(load, write, pairs, pair):
    rows = [{**pair, "chosen": f" answer {number}"} for number in range(4)]
    data = load(write(pairs(6)), eval=str(write(rows, "held.jsonl")))
    assert data.eval.comparisons_per_group.tolist() == [4]
    assert data.train.comparisons_per_group.tolist() == [1] * 6


# Nothing left


def test_prompts_longer_than_max_length_say_how_long_the_shortest_is(load, pair, plain):
    tokens = len(plain(pair["prompt"])["input_ids"])
    with pytest.raises(DataError, match=rf"data\.max_length \(3; the shortest prompt has {tokens} tokens\)"):
        load([pair], max_length=3)


def test_an_empty_evaluation_set_is_an_error(load, write, pair):
    with pytest.raises(DataError, match=r"data\.eval: at least one row.*\n.*1: rejected is empty"):
        load([pair], eval=write([{**pair, "rejected": ""}], "eval.jsonl"))


def test_a_forgotten_prompt_column_is_guessed(load):
    with pytest.raises(DataError, match=r"data\.columns: \{prompt: <column>\}"):
        load([{"question": "Q", "chosen": "a", "rejected": "b"}])


def test_a_filter_that_keeps_nothing_says_so(load, pair):
    with pytest.raises(DataError, match=r"1: data\.filter does not keep it"):
        load([{**pair, "score": 1}], filter={"score": "> 2"})


def test_a_source_of_which_the_filter_keeps_nothing_does_not_spoil_the_others(load, write):
    labels = [{"prompt": "Q", "completion": " a", "label": True, "keep": keep} for keep in (0, 1)]
    paths = [write(labels[:1], "a.jsonl"), write(labels[1:], "b.jsonl")]
    train = load(paths, filter={"keep": 1}).train
    assert len(train) == 1
    assert not train.paired


# The report


def test_the_report_counts_every_row_once(load, pair):
    rows = [
        pair,
        {**pair, "chosen": ""},
        {**pair, "rejected": pair["chosen"]},
        {**pair, "rejected": pair["chosen"]},
        {**pair, "preference_probability": 2},
        {**pair, "prompt": pair["prompt"] * 60},
        {**pair, "chosen": " yes" * 300},
    ]
    report = load(rows).report
    assert report.dropped == {
        "chosen and rejected are identical": 2,
        "chosen is empty": 1,
        "preference_probability outside [0, 1]": 1,
        "prompt alone reaches data.max_length": 1,
    }
    assert report.cut == {"completion cut to data.max_length": 1}
    assert report.rows_read == report.rows_kept + sum(report.dropped.values()) == 7


def test_the_report_counts_tokens_groups_and_shows_one_example(load, pairs, plain):
    data = load([*pairs(4), {**pairs(1)[0], "rejected": " maybe one two three"}], group_by_prompt=True)
    report = data.report
    assert (report.train.groups, report.train.comparisons, report.train.completions) == (4, 5, 9)
    lengths = [len(group.completions[c.rejected]) for group in data.train for c in group.comparisons]
    assert report.train.rejected_tokens.max == max(lengths)
    assert report.train.rejected_tokens.mean == pytest.approx(sum(lengths) / 5)
    assert report.train.prompt_tokens.mean == pytest.approx(data.train.prompt_lengths.mean())
    texts = {name: start + end for name, start, end in report.example.texts}
    assert list(texts) == ["prompt", "chosen", "rejected"]
    assert texts["chosen"][-1] == texts["rejected"][-1] == "</s>"
    assert "".join(texts["prompt"]).endswith("?")
    assert len(texts["chosen"]) == len(data.train[0].completions[0])  # short texts are shown whole, once
    assert any("'</s>'" in line for line in report.lines())


def test_the_report_is_plain_json_and_readable_lines(load, pair, pairs):
    report = load([*pairs(10), {**pair, "chosen": ""}], eval_fraction=0.2).report
    stored = json.loads(json.dumps(report.as_dict()))
    assert stored["rows_read"] == 11
    assert stored["dropped"] == {"chosen is empty": 1}
    assert stored["train"]["comparisons"] == 8
    assert stored["eval"]["fingerprint"] == report.eval.fingerprint
    text = "\n".join(report.lines())
    assert "11 rows read, 10 kept" in text
    assert "dropped 1: chosen is empty" in text


def test_quiet_prints_nothing_and_leaves_the_bars_as_they_were(load, pairs, capfd):
    shown_before = not datasets.are_progress_bars_disabled()
    load(pairs(3))
    assert capfd.readouterr() == ("", "")
    assert shown_before == (not datasets.are_progress_bars_disabled())


def test_progress_is_shown_otherwise(settings, write, pairs, plain, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    load_data(settings(write(pairs(3))), plain, seed=0)
    shown = capfd.readouterr().err
    assert "Reading pairs.jsonl" in shown
    assert "Tokenizing pairs.jsonl" in shown


# Real data


def alpaca_eval():
    folder = os.environ.get("PREFOPT_TEST_DATA")
    near = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = (Path(folder) if folder else near) / "alpaca_eval_pairs.jsonl.gz"
    return str(path) if path.is_file() else None


def lossless_word_tokenizer(path):
    """Several times as fast as BPE; whitespace is kept, so that different texts have different ids."""
    words = set()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            for column in ("prompt", "chosen", "rejected"):
                words.update(re.split(r"(\s)", row[column]))
    words -= {"", "<unk>", "</s>"}
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.skipif(alpaca_eval() is None, reason="needs alpaca_eval_pairs.jsonl.gz in PREFOPT_TEST_DATA")
def test_alpaca_eval_has_22_empty_and_23_identical_rows_and_no_row_is_both(load):
    path = alpaca_eval()
    tokenizer = lossless_word_tokenizer(path)
    data = load(path, tokenizer, max_length=1 << 20, group_by_prompt=True, eval_fraction=0.02)
    assert data.report.rows_read == 6440
    assert data.report.dropped == {
        "chosen and rejected are identical": 23,
        "rejected is empty": 21,
        "chosen is empty": 1,
    }
    assert data.train.comparisons_per_group.sum() + data.eval.comparisons_per_group.sum() == 6395
    assert len(data.train) + len(data.eval) == 805
    assert len(data.eval) == 16
    probabilities = [c.preference_probability for group in range(len(data.eval)) for c in data.eval.comparisons(group)]
    assert all(0.5 <= probability <= 1 for probability in probabilities)
    # Eight comparisons share GPT-4's answer: nine distinct answers a prompt instead of sixteen.
    assert data.report.train.completions < 0.6 * 2 * data.report.train.comparisons

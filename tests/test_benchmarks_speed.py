"""The cost model against figures worked out by hand, and the comparison with TRL on a tiny model."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def rooms():
    """The benchmarks' modules: they are programs that import their neighbours, not a package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import cost_model
        import speed_tables
        import speed_workloads
    finally:
        sys.path.remove(str(BENCHMARKS))
    return cost_model, speed_tables, speed_workloads


@pytest.fixture(scope="module")
def llama(rooms):
    """Llama-3.1-8B: 32 layers of 4096, 8 of 32 heads with keys, 14336 wide, 128256 words."""
    per_layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    return rooms[0].Shape(32 * per_layer, 32, 4096, 128_256, 4096)


@pytest.mark.parametrize(
    ("prompt", "completion", "lora", "naive", "ours"),
    [
        (256, 128, False, 44.5, 22.4),
        (256, 128, True, 33.5, 15.0),
        (2048, 512, False, 305, 139),
        (2048, 512, True, 229, 92.6),
    ],
)
def test_operations_of_an_8b_pair_are_those_worked_out_by_hand(rooms, llama, prompt, completion, lora, naive, ours):
    cost_model = rooms[0]
    pairs = [(prompt, completion, completion)]
    unshared, shared = cost_model.unshared(pairs), cost_model.shared(pairs)
    k, u = (2, 3) if lora else (3, 4)  # TRL recomputes logits; an online reference adds one of each
    assert llama.step(unshared, k=k + 1, u=u + 1) / 1e12 == pytest.approx(naive, rel=0.005)
    assert llama.step(shared, k=k, u=u - 1) / 1e12 == pytest.approx(ours, rel=0.005)


@pytest.mark.parametrize(
    ("prompt", "completion", "full", "lora"), [(128, 512, 1.49, 1.69), (256, 128, 1.99, 2.24), (8192, 512, 2.49, 2.81)]
)
def test_predicted_ratios_are_those_worked_out_by_hand(rooms, llama, prompt, completion, full, lora):
    cost_model = rooms[0]
    pairs = [(prompt, completion, completion)]
    for adapter, expected in ((False, full), (True, lora)):
        ours = cost_model.operations("prefopt", llama, pairs, batch=1, lora=adapter, whole_attention=True)
        theirs = cost_model.operations("trl-precomputed-compact", llama, pairs, batch=1, lora=adapter)
        reference = llama.forward(cost_model.unshared(pairs).tokens, cost_model.unshared(pairs).area)
        online = theirs + reference + llama.head(2 * completion)
        assert online / ours == pytest.approx(expected, abs=0.006)


def test_layouts_count_what_they_compute(rooms):
    cost_model = rooms[0]
    pairs = [(4, 2, 3), (1, 5, 1)]
    assert cost_model.shared(pairs) == cost_model.Layout(9 + 7, 36 + 49 - 16 + 36 + 4 - 1, 5 + 6, 17)
    assert cost_model.unshared(pairs) == cost_model.Layout(13 + 8, 36 + 49 + 36 + 4, 5 + 6, 34)
    assert cost_model.padded(pairs, 2, compact=True) == cost_model.Layout(4 * 7, 4 * 49, 5 + 6)
    assert cost_model.padded(pairs, 2, compact=False).scored == 4 * 6
    assert cost_model.padded(pairs, 1, compact=True) == cost_model.Layout(14 + 12, 2 * 49 + 2 * 36, 5 + 6)


def test_an_online_reference_and_checkpointing_each_cost_a_forward_pass(rooms, llama):
    cost_model = rooms[0]
    pairs = [(64, 32, 32)] * 4

    def operations(tool: str, **options) -> float:
        return cost_model.operations(tool, llama, pairs, batch=4, lora=False, **options)

    layout = cost_model.padded(pairs, 4, compact=False)
    forward = llama.forward(layout.tokens, layout.area)
    online, precomputed = operations("trl"), operations("trl-precomputed")
    assert online - precomputed == pytest.approx(forward + llama.head(layout.scored))
    assert operations("trl", checkpointing=True) - online == pytest.approx(forward)
    for tool in ("trl", "prefopt"):  # what is computed again is no gain
        assert operations(tool, checkpointing=True, whole_model=True) == operations(tool, whole_model=True)
        assert operations(tool, checkpointing=True) > operations(tool)
    assert operations("trl", whole_model=True) < operations("trl")  # TRL makes its logits again
    assert operations("prefopt") < operations("prefopt-unshared") < operations("trl-precomputed-compact") < precomputed


def test_what_nobody_reads_of_the_last_attention_is_not_counted(rooms, llama):
    pairs = [(64, 32, 16), (8, 4, 4)]
    for tool, times in (("prefopt", 1), ("prefopt-unshared", 2), ("trl", 0)):
        less, whole = (
            rooms[0].operations(tool, llama, pairs, batch=2, lora=True, whole_attention=each) for each in (False, True)
        )
        assert whole - less == pytest.approx(2 * 2 * llama.width * times * (64**2 + 8**2))


def test_what_nobody_reads_of_the_last_mlp_is_not_counted(rooms, llama):
    cost_model = rooms[0]
    pairs = [(64, 32, 16), (8, 4, 4)]
    mlp = 3 * 4096 * 14336
    narrow = replace(llama, last_mlp=mlp)

    def saved(tool: str) -> float:
        whole, less = (cost_model.operations(tool, each, pairs, batch=2, lora=False) for each in (llama, narrow))
        return whole - less

    for tool in ("prefopt", "prefopt-unshared"):
        all_of_it = [
            cost_model.operations(tool, each, pairs, batch=2, lora=False, whole_model=True) for each in (llama, narrow)
        ]
        assert all_of_it[0] == all_of_it[1] > cost_model.operations(tool, llama, pairs, batch=2, lora=False)
    assert saved("prefopt") == pytest.approx(3 * 2 * mlp * (64 + 8))
    assert saved("prefopt-unshared") == pytest.approx(3 * 2 * mlp * 2 * (64 + 8))
    assert saved("trl") == 0


def test_the_lower_bound_of_a_median_is_an_order_statistic(rooms):
    lower_bound = rooms[1].lower_bound
    assert lower_bound([5.0, 3.0, 4.0, 2.0, 6.0]) == (2.0, 1 - 1 / 32)
    assert lower_bound([1.0, 2.0]) == (1.0, 0.75)  # two draws cannot give 95 %
    bound, confidence = lower_bound([float(number) for number in range(20)])
    assert bound == 5.0
    assert confidence == pytest.approx(1 - sum(math.comb(20, below) for below in range(6)) / 2**20)


def test_efficiency_is_operations_over_time_and_rate(rooms):
    done = {"operations": 100.0, "model_operations": 120.0}
    run = {**done, "steps_s": [1.0, 3.0], "matmul_rate": [70.0, 90.0], "fastest_matmul": [90.0, 110.0]}
    assert rooms[0].efficiency(run) == 0.75
    assert rooms[0].efficiency(run, hard=True) == 0.5


def test_no_product_is_faster_than_the_fastest(rooms):
    kept, fastest = rooms[0].matmul_rates(torch.float32, seconds=0.01)
    assert 0 < kept <= fastest


def test_ratios_are_taken_between_runs_that_alternated(rooms):
    runs = [
        {"tool": tool, "run": run, "steps_s": [time - 0.5, time + 0.5]}
        for tool, times in (("prefopt", (1.0, 2.0)), ("trl", (3.0, 8.0)))
        for run, time in enumerate(times)
    ]
    assert rooms[0].paired_ratios(runs, "trl") == [3.0, 4.0]
    rates = {"prefopt": [100.0, 100.0], "trl": [50.0, 100.0]}  # the machine was slower beside TRL
    runs = [{**run, "matmul_rate": rates[run["tool"]]} for run in runs]
    assert rooms[0].paired_ratios(runs, "trl", at_equal_rate=True) == [2.25, 3.0]


def test_a_reference_that_is_used_once_is_charged_to_the_steps(rooms):
    ours = {"tool": "prefopt", "run": 0, "steps_s": [0.5, 1.5], "reference_s": 4.0, "steps": 4}
    theirs = {"tool": "trl", "run": 0, "steps_s": [6.0, 6.0], "reference_s": 0.0, "steps": 4}
    assert "3.00x over trl" in rooms[1].used_once([ours, theirs], ["prefopt", "trl"])[0]
    assert rooms[1].used_once([ours], ["prefopt"]) == []


def test_memory_that_grows_is_called_so(rooms):
    run = {"workload": "small", "precision": "fp32"}
    flat = rooms[1].growth({**run, "resident_bytes": [2**30] * 40})
    assert "does not grow" in flat[-1]
    assert "GROWS" in rooms[1].growth({**run, "resident_bytes": [2**30 + step * 2**23 for step in range(40)]})[-1]
    assert flat[3] == "| 10 | 1,024 |"


def test_the_pairs_that_are_timed_are_padded_as_all_pairs_are(rooms, tmp_path):
    workloads = rooms[2]
    body = workloads.WORKLOADS["body-256-128"]
    usual, lengths = workloads.write_random_pairs(tmp_path / "pairs.jsonl", body, 16, uncounted=4)
    padding, sharing = workloads.waste(lengths[4:])
    every = workloads.random_lengths(body, 4000, seed=1000)
    assert usual == pytest.approx(workloads.waste(every), rel=0.01)
    assert padding == pytest.approx(usual[0], rel=0.02)
    assert sharing == pytest.approx(workloads.waste(every)[1], rel=0.02)
    first = [workloads.waste(workloads.random_lengths(body, 12, seed=seed))[0] for seed in range(20)]
    assert max(first) - min(first) > 0.1  # what luck alone makes of three steps


def test_real_pairs_are_a_typical_draw_of_those_that_no_trainer_cuts(rooms, tmp_path):
    workloads = rooms[2]
    small = workloads.WORKLOADS["small"]
    tokenizer = workloads.word_tokenizer(small.vocab)
    rows = [
        {"prompt": "w2 " * p + "\n", "chosen": " w3" * c, "rejected": " w4" * r}
        for p, c, r in sorted(workloads.random_lengths(small, 120))  # in batches of their order little is padded
    ]
    rows += [
        {"prompt": "w2\n", "chosen": " w3" * 200, "rejected": " w4"},
        {**rows[0], "chosen": " w4" * 9, "rejected": " w4" * 9},
    ]
    usual, lengths = workloads.write_real_pairs(tmp_path / "pairs.jsonl", rows, tokenizer, 16, 100, uncounted=4)
    assert workloads.waste(lengths[4:]) == pytest.approx(usual, rel=0.02)
    assert usual[0] == pytest.approx(workloads.waste(workloads.random_lengths(small, 4000))[0], rel=0.1)
    written = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()]
    assert [len(tokenizer(row["prompt"])["input_ids"]) for row in written] == [p for p, _, _ in lengths]
    assert all(row in rows[:120] for row in written)
    with pytest.raises(SystemExit, match="found 120"):
        workloads.write_real_pairs(tmp_path / "pairs.jsonl", rows, tokenizer, 121, 100)


def test_large_workloads_have_the_shapes_of_the_models_they_are_named_after(rooms, llama):
    workloads = rooms[2].WORKLOADS
    assert replace(workloads["llama-8b-lora"].shape, last_mlp=0.0) == llama
    billions = {"llama-8b-lora": 6.98, "qwen-7b-lora": 6.53, "qwen-0.5b": 0.358}  # without embedding and head
    for name, expected in billions.items():
        workload = workloads[name]
        assert workload.shape.parameters / 1e9 == pytest.approx(expected, rel=0.002)
        assert workload.large


def test_a_model_is_made_as_its_workload_says(rooms, tmp_path):
    workloads = rooms[2]
    small = workloads.WORKLOADS["small-qlora"]
    workloads.make_model(tmp_path, small, workloads.word_tokenizer(small.vocab))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    layers = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers
    assert sum(p.numel() for p in layers.parameters() if p.ndim > 1) == small.shape.parameters


MISTAKES = [
    ("compare_trl", "--workload llama-8b-lora", "expected --device cuda"),
    ("compare_trl", "--device cuda", "expected an accelerator"),
    ("compare_trl", "--trl-micro-batch 3", "expected a divisor of 4"),
    ("compare_trl", "--trl-micro-batch 0", "expected a divisor of 4"),
    ("compare_trl", "--growth 3 --small", "expected at least 20 steps"),
    ("compare_trl", "--json /not/there/x.json", "expected a file in a folder that is there"),
    ("compare_trl", "--workload alpaca --data /not/there", "a file"),
    ("compare_trl", "--threads 0", "expected at least 1"),
    ("compare_trl", "--small --max-length 30", "expected --workload alpaca"),
    ("profile_step", "--warmup 0", "expected at least 1"),
    ("profile_step", "--steps 0", "expected at least 1"),
    ("cost_model", "--json /not/there", "is no file"),
    ("cost_model", "--pairs 0", "expected at least 4"),
]


@pytest.mark.parametrize(("program", "options", "expected"), MISTAKES)
def test_what_cannot_be_measured_is_said_before_anything_runs(rooms, monkeypatch, capsys, program, options, expected):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *options.split()])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(program).main()
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_random_words_are_one_token_each(rooms, tmp_path):
    workloads = rooms[2]
    small = workloads.WORKLOADS["small"]
    _, lengths = workloads.write_random_pairs(tmp_path / "pairs.jsonl", small, 8)
    tokenizer = workloads.word_tokenizer(small.vocab)
    for row, (prompt, *answers) in zip(map(json.loads, (tmp_path / "pairs.jsonl").open()), lengths, strict=True):
        assert len(tokenizer(row["prompt"])["input_ids"]) == prompt
        for name, length in zip(("chosen", "rejected"), answers):
            assert len(tokenizer(row["prompt"] + row[name] + "</s>")["input_ids"]) == prompt + length


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_comparison_runs_and_agrees(rooms, tmp_path):
    file = tmp_path / "figures.json"
    command = [str(BENCHMARKS / "compare_trl.py"), "--small", "--runs", "1", "--threads", "1", "--json", str(file)]
    command += ["--trl-micro-batch", "2"]
    printed = run(*command, "--tools", *rooms[0].TOOLS)
    runs = json.loads(file.read_text())["runs"]
    tools = rooms[0].TOOLS
    lora = ["trl-adapter-off" if tool == "trl" else tool for tool in tools]
    assert [(one["workload"], one["tool"]) for one in runs] == [
        *(("small", tool) for tool in tools),
        *(("small-lora", tool) for tool in lora),
        *(("small-qlora", tool) for tool in lora),
    ]
    for one in runs:
        assert len(one["steps_s"]) == len(one["scored"]) == 2
        assert len(one["losses"]) == 3
        assert one["floor_bytes"] < one["peak_bytes"]
    assert "Sharing alone" in printed
    assert "prefopt chose shared prompts" in printed
    predicted = run(str(BENCHMARKS / "cost_model.py"), "--workload", "small", "--json", str(file))
    assert len(predicted.strip().splitlines()) == 2 + len(tools)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_step_is_taken_apart():
    printed = run(str(BENCHMARKS / "profile_step.py"), "--workload", "small", "--steps", "2", "--threads", "1")
    assert "Outside the model" in printed
    assert "| aten::mm |" in printed


def run(*command: str) -> str:
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "losses")))
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

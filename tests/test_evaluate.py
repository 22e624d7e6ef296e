"""What is measured on held-out data is what it is called."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, group, tiny_model
from world import make_recipe, quiet, train

from prefopt.batching import make_batch
from prefopt.data.groups import PromptGroup
from prefopt.errors import RecipeError
from prefopt.evaluate import load_gold_reward, wilson_interval
from prefopt.evaluate_run import evaluate_run
from prefopt.forward import Scorer
from prefopt.preflight import check_recipe
from prefopt.sampling import sample

TOKENIZER = SimpleNamespace(eos_token_id=2, pad_token_id=0)


def write(scorer, prompts, **changes):
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 0, "precision": "fp32", **changes}
    return sample(scorer, prompts, TOKENIZER, **settings)


def test_sampling_is_repeatable_and_leaves_the_random_state_alone():
    scorer = Scorer(tiny_model("llama"))
    prompts = [group(n, [1], seed=n).prompt for n in (3, 7, 5)]
    before = torch.get_rng_state()
    first, again, other = write(scorer, prompts), write(scorer, prompts), write(scorer, prompts, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    texts = [[one.completions[0].tolist() for one in run] for run in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_padding_on_the_left_does_not_change_what_is_written():
    """The sampled token's probabilities must be those of the unpadded prompt: compare the greedy choice."""
    scorer = Scorer(tiny_model("gemma2"))
    prompts = [group(n, [1], seed=n).prompt for n in (3, 9)]
    together = write(scorer, prompts, temperature=1e-4)
    apart = [write(scorer, [prompt], temperature=1e-4)[0] for prompt in prompts]
    assert [one.completions[0].tolist() for one in together] == [one.completions[0].tolist() for one in apart]


def test_a_sample_ends_with_the_first_end_of_sequence_token():
    scorer = Scorer(tiny_model("llama"))
    for one in write(scorer, [group(3, [1]).prompt] * 60, max_new_tokens=40):
        ids = one.completions[0].tolist()
        assert 2 not in ids[:-1]


def test_the_sampled_kl_is_the_kl():
    """One-token completions: the exact divergence is a sum over the vocabulary."""
    policy, reference = Scorer(tiny_model("llama", seed=0)), Scorer(tiny_model("llama", seed=1))
    prompt = group(4, [1]).prompt
    every_token = PromptGroup(prompt, tuple(np.array([token]) for token in range(VOCABULARY)), ())
    with torch.no_grad():
        logps = [model(make_batch([every_token])).sums for model in (policy, reference)]
        exact = float((logps[0].exp() * (logps[0] - logps[1])).sum())
        batch = make_batch(write(policy, [prompt] * 3000, max_new_tokens=1))
        ratios = (policy(batch).sums - reference(batch).sums).double().numpy()
    error = ratios.std() / math.sqrt(len(ratios))
    assert abs(ratios.mean() - exact) < 4 * error
    assert error < 0.2 * exact


def test_wilson_interval_against_its_definition():
    low, high = wilson_interval(0.7, 50)
    for edge in (low, high):
        assert abs(0.7 - edge) == pytest.approx(1.96 * math.sqrt(edge * (1 - edge) / 50))
    assert wilson_interval(0.5, 0) == (0.0, 1.0)


def test_a_gold_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def words(prompt, completion):\n    return len(completion.split())\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = train(tmp_path, eval={"gold_reward": "my_rewards:words"})
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert result["eval"]["gold_reward"]["policy"] == pytest.approx(
        np.mean([len(row["policy"].split()) for row in rows])
    )


def test_a_gold_reward_that_is_not_there():
    with pytest.raises(RecipeError, match=r"eval\.gold_reward"):
        load_gold_reward("no_such_module:reward")


def test_eval_computes_a_finished_run_again(tmp_path):
    result = train(tmp_path)
    again = evaluate_run(tmp_path / "run", quiet())
    for name, value in result["eval"].items():
        assert again[name] == pytest.approx(value, abs=1e-5), name


def test_eval_of_an_adapter(tmp_path):
    result = train(tmp_path, adapter={"rank": 4})
    again = evaluate_run(tmp_path / "run", quiet())
    assert again["loss"] == pytest.approx(result["eval"]["loss"], abs=1e-5)


def test_check_trains_and_writes_nothing(tmp_path):
    recipe = make_recipe(tmp_path)
    check_recipe(recipe, quiet())
    assert not (tmp_path / "run").exists()

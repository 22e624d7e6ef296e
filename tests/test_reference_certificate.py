"""A quantized reference states its error: on a sample, with intervals, for the recipe's own loss; or it is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from certificates import made_certificate, made_sample, opened
from rich.console import Console
from world import make_model, make_pairs, make_recipe, quiet, train

import prefopt.reference.certifying as certifying_room
import prefopt.reference.full_precision as full_precision_room
from prefopt.data.groups import Comparison
from prefopt.errors import CacheError, ModelError
from prefopt.invariant import StepZero, check_step_zero
from prefopt.models import load_model
from prefopt.prepare import prepare, reference_source
from prefopt.probe import plain_logps
from prefopt.reference.certificate_file import certificate_file, read_certificate, store_certificate
from prefopt.reference.certificate_table import WIDTH, certificate_table, sentence
from prefopt.reference.certified_sample import cached_part, draw
from prefopt.reference.certifying import refuse_large_error, why_no_certificate
from prefopt.reference.full_precision import full_precision, why_not_held
from prefopt.reference.loss_effect import loss_effect, why_not_stated
from prefopt.reference.opening import cached_reference, open_cache
from prefopt.reference.verify import verify_cache
from prefopt_losses import METHODS, LogProbs, get_loss


@pytest.fixture(autouse=True)
def cache_of_this_test(tmp_path, monkeypatch):
    """A certificate belongs to a cache: one that other tests filled with the same tiny model has another sample."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "own-cache"))


# Samples and losses -------------------------------------------------------------------------------------------------


def test_the_errors_of_a_certificate_are_cached_minus_full():
    sample = made_sample()
    errors = made_certificate(sample).errors
    chosen, rejected = np.arange(0, 80, 2), np.arange(1, 80, 2)
    per_completion = sample.cached - sample.full
    margin = per_completion[chosen] - per_completion[rejected]
    means = per_completion / sample.lengths
    assert errors["token"].count == sample.lengths.sum()
    assert errors["token"].rms == pytest.approx(np.sqrt((sample.token_errors.astype(float) ** 2).mean()))
    assert errors["completion"].mean_abs == pytest.approx(np.abs(per_completion).mean())
    assert errors["margin"].max_abs == pytest.approx(np.abs(margin).max())
    assert errors["margin_per_token"].mean == pytest.approx((means[chosen] - means[rejected]).mean())


def test_a_sign_changes_where_the_reference_itself_ranks_the_other_way():
    full, cached = [-1.0, -2.0, -1.0, -9.0, -3.0, -1.0], [-2.5, -2.0, -1.5, -9.0, -3.5, -1.0]
    sample = replace(
        made_sample(3), full=np.array(full), cached=np.array(cached),
        comparisons=tuple(Comparison(2 * n, 2 * n + 1, None, n) for n in range(3)),
    )  # fmt: skip
    changes = made_certificate(sample).sign_changes
    assert changes["all"].share == pytest.approx(1 / 3)
    assert changes["confident"].share == 0


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_the_effect_on_dpo_is_that_of_the_written_formula(beta):
    sample = made_sample()
    effect = loss_effect(get_loss("dpo", beta=beta), sample)
    errors = sample.cached - sample.full
    x = -beta * (errors[::2] - errors[1::2])
    weight = 2 / (1 + np.exp(x))
    assert effect.at_reference == pytest.approx(math.log(2))
    assert effect.margin.mean_abs == pytest.approx(np.abs(x).mean())
    assert effect.value.mean == pytest.approx((np.log1p(np.exp(-x)) - math.log(2)).mean())
    assert effect.gradient_weight.p95_abs == pytest.approx(np.quantile(np.abs(weight - 1), 0.95, method="inverted_cdf"))
    assert effect.weight_changes.share == pytest.approx((np.abs(weight - 1) > 0.1).mean())


def test_a_loss_of_means_sees_the_error_per_token():
    sample = made_sample()
    means = (sample.cached - sample.full) / sample.lengths
    x = -(means[::2] - means[1::2])
    effect = loss_effect(get_loss("ipo", beta=0.1), sample)
    half = 1 / (2 * 0.1)
    assert effect.gradient_weight.mean == pytest.approx(((x - half) / -half - 1).mean())
    assert effect.value.rms == pytest.approx(np.sqrt((((x - half) ** 2 - half**2) ** 2).mean()))


def test_token_losses_see_the_errors_of_tokens():
    sample, loss = made_sample(), get_loss("ld_dpo")
    generator = torch.Generator().manual_seed(0)
    policy = -torch.rand(80, 20, generator=generator, dtype=torch.float64)
    reference, begin = policy.clone(), 0
    for row, length in enumerate(sample.lengths):
        reference[row, :length] += torch.from_numpy(sample.token_errors[begin : begin + length].astype(float))
        begin += length
    lengths = torch.from_numpy(sample.lengths)
    sides = {"chosen": slice(0, None, 2), "rejected": slice(1, None, 2)}
    record = LogProbs(**{
        name: value
        for side, rows in sides.items()
        for name, value in (
            (f"{side}_token_logps", policy[rows]), (f"ref_{side}_token_logps", reference[rows]),
            (f"{side}_lengths", lengths[rows]),
        )
    })  # fmt: skip
    effect = loss_effect(loss, sample)
    assert effect.margin.mean == pytest.approx(float(loss.margin(record).mean()), rel=1e-4)
    assert effect.at_reference + effect.value.mean == pytest.approx(float(loss(record, check=False).mean()), rel=1e-4)


def test_every_loss_has_its_effect_stated_or_a_reason_why_not():
    paired, labelled = made_sample(), made_sample(unpaired=True)
    for name in METHODS:
        loss = get_loss(name)
        effects = [loss_effect(loss, paired), *([] if loss.needs.pairs else [loss_effect(loss, labelled)])]
        if why_not_stated(loss) is not None:
            assert effects[0] is None
            continue
        if loss.needs.preference_probability:
            effects = effects[:1]  # labels of single completions have none
        for effect in effects:
            assert effect is not None, name
            assert np.isfinite([effect.margin.max_abs, effect.value.mean]).all(), name


def test_an_exact_reference_changes_nothing():
    sample = made_sample()
    exact = replace(sample, cached=sample.full, token_errors=np.zeros_like(sample.token_errors))
    for name in ("dpo", "ipo", "kto", "bco", "sppo_hard", "ld_dpo", "aot"):
        effect = loss_effect(get_loss(name), exact)
        assert (effect.margin.max_abs, effect.value.max_abs) == (0, 0), name
        assert effect.gradient_weight.max_abs == pytest.approx(0), name
        assert effect.weight_changes.share == 0


def test_labels_take_their_own_side_of_the_loss():
    sample = made_sample(unpaired=True)
    loss = get_loss("sppo_hard")
    effect = loss_effect(loss, sample)
    own = [one.rejected if one.chosen is None else one.chosen for one in sample.comparisons]
    errors = (sample.cached - sample.full)[own]
    beta = loss.ranking_term.beta
    assert effect.margin.mean == pytest.approx(-beta * errors.mean())
    x = -beta * errors * np.where([one.chosen is None for one in sample.comparisons], -1, 1)
    assert effect.value.mean == pytest.approx((((x - 1) ** 2 - 1) / beta**2).mean())


def test_the_sample_depends_on_content_alone(tmp_path):
    lines = make_pairs(tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "shuffled.jsonl").write_text("".join(reversed(lines)))
    drawn = []
    for name in ("pairs", "shuffled"):
        data = {"train": str(tmp_path / f"{name}.jsonl"), "eval_fraction": 0, "eval": None}
        dataset = prepare(make_recipe(tmp_path, data=data), quiet=True).data.train
        groups = [(dataset[group].prompt.tobytes(), numbers) for group, numbers in draw(dataset, 10)]
        assert sum(len(numbers) for _, numbers in groups) == 10
        drawn.append(sorted(groups))
    assert drawn[0] == drawn[1]


def test_every_prompt_is_asked_once_before_any_is_asked_twice(tmp_path):
    rows = [{"prompt": f"w{n % 5}", "chosen": f"w{n} w1", "rejected": f"w{n} w2"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = prepare(make_recipe(tmp_path, data={"eval_fraction": 0}), quiet=True).data.train

    def prompts(count):
        hashes = dataset.layout.prompt_hashes
        return [int(hashes[group]) for group, numbers in draw(dataset, count) for _ in numbers]

    assert len(set(prompts(5))) == 5
    assert np.unique(prompts(10), return_counts=True)[1].tolist() == [2] * 5


# Certificates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_a_certificate_states_the_difference_of_the_two_models(tmp_path, quantization, precision):
    # int8 rounds activations, so sums in another order can be other numbers: the yardstick's own kernel, then.
    attended = {"path": str(tmp_path / "base"), "attention_backend": "sdpa" if quantization == "int8" else "auto"}
    recipe = make_recipe(
        tmp_path, reference={"quantization": quantization}, train={"precision": precision}, model=attended
    )
    cache, found = opened(recipe)
    prepared = prepare(recipe, quiet=True)
    assert found.comparisons == len(prepared.data.train.layout.chosen)
    part = cached_part(prepared.data.train, cache)
    if precision == "bf16":  # autocast is the scorer's business
        assert 0 < found.errors["margin"].mean_abs < 30
        return
    source = reference_source(recipe)
    quantized, full = load_model(source), load_model(full_precision(source))
    expected = torch.cat([plain_logps(quantized, one) - plain_logps(full, one) for one in part.groups])
    np.testing.assert_allclose(found.sample.completion_errors, expected.numpy(), atol=5e-3)
    assert found.quantization == quantization
    assert found.full_precision == "float32"


def test_4_bits_err_more_than_8(tmp_path):
    errors = {
        kind: opened(make_recipe(tmp_path, reference={"quantization": kind}))[1].errors["margin"].rms
        for kind in ("int8", "nf4", "fp4")
    }
    assert errors["int8"] < errors["nf4"] < errors["fp4"]


def test_a_certificate_is_read_again_without_a_model(tmp_path):
    recipe = make_recipe(tmp_path, reference={"quantization": "nf4"})
    cache, made = opened(recipe)
    _, again = opened(make_recipe(tmp_path, reference={"quantization": "nf4"}, loss="ipo"), forbid=True)
    for name, statistics in made.errors.items():
        assert again.errors[name] == statistics
    assert again.sign_changes == made.sign_changes
    assert again.effect(get_loss("ipo")) == made.effect(get_loss("ipo"))
    stored = json.loads(certificate_file(cache).read_text())
    assert stored["errors"]["margin"]["p95_abs"] == made.errors["margin"].p95_abs
    assert {"torch", "transformers", "bitsandbytes"} == set(stored["versions"])
    assert [path.name for path in cache.folder.iterdir() if path.name.endswith(".partial")] == []


def test_a_larger_sample_replaces_a_smaller_one_and_no_smaller_a_larger(tmp_path):
    pairs = make_pairs(tmp_path / "pairs.jsonl", 60)
    lines = pairs.read_text().splitlines(keepends=True)
    place = {"quantization": "nf4", "cache": str(tmp_path / "cache")}
    pairs.write_text("".join(lines[:12]))
    _, small = opened(make_recipe(tmp_path, reference=place))
    pairs.write_text("".join(lines))
    cache, large = opened(make_recipe(tmp_path, reference=place))
    assert small.comparisons < 12 < large.comparisons
    pairs.write_text("".join(lines[:12]))
    assert opened(make_recipe(tmp_path, reference=place), forbid=True)[1].comparisons == large.comparisons
    assert store_certificate(cache, small).comparisons == large.comparisons
    assert read_certificate(cache).comparisons == large.comparisons


@pytest.mark.parametrize("content", ["other", "torn", "[]", '{"format": 99}'])
def test_a_certificate_of_another_reference_or_a_torn_one_is_not_used(tmp_path, content):
    recipe = make_recipe(tmp_path, reference={"quantization": "nf4", "cache": str(tmp_path / "cache")})
    cache, made = opened(recipe)
    file = certificate_file(cache)
    if content == "other":
        file.write_text(json.dumps({**json.loads(file.read_text()), "fingerprint": "0" * 64}))
    else:
        file.write_text(file.read_text()[:500] if content == "torn" else content)
    assert read_certificate(cache) is None
    assert opened(recipe)[1].errors == made.errors
    assert read_certificate(cache) is not None


def test_the_limit_is_about_95_percent_of_the_margins(tmp_path):
    recipe = make_recipe(tmp_path, reference={"quantization": "nf4"})
    error = opened(recipe)[1].errors["margin"].p95_abs
    within = make_recipe(tmp_path, reference={"quantization": "nf4", "max_margin_error": error * 1.01})
    opened(within, forbid=True)
    with pytest.raises(ModelError, match=r"reference\.max_margin_error") as refusal:
        opened(make_recipe(tmp_path, reference={"quantization": "nf4", "max_margin_error": error * 0.99}), forbid=True)
    assert "95 %" in str(refusal.value)
    refuse_large_error(recipe, made_certificate(made_sample(scale=100.0)))  # no limit, no refusal


def test_what_is_exact_by_definition_is_not_certified(tmp_path):
    assert "not quantized" in why_no_certificate(make_recipe(tmp_path))
    alike = {"model": {"path": str(tmp_path / "base"), "quantization": "nf4"}, "adapter": {"rank": 2}}
    assert "alike" in why_no_certificate(make_recipe(tmp_path, **alike, reference={"quantization": "nf4"}))
    cache, found = opened(make_recipe(tmp_path), forbid=True)
    assert found is None
    assert not certificate_file(cache).exists()


def test_a_model_that_does_not_fit_costs_the_certificate_and_not_the_run(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, reference={"quantization": "int8", "cache": str(tmp_path / "cache")})
    assert why_not_held(full_precision(reference_source(recipe))) is None
    monkeypatch.setattr(full_precision_room, "free_memory", lambda device: 1000)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    _, found = opened(recipe, forbid=True, console=console)
    assert found is None
    said = console.export_text()
    assert "no certificate of the int8 reference" in said
    assert "GiB" in said


def test_the_bytes_of_a_model_are_those_of_its_dtype(tmp_path):
    folder = make_model(tmp_path / "base")
    source = reference_source(make_recipe(tmp_path))
    model = load_model(source)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert folder.exists()
    assert full_precision_room._weights_bytes(source) == 4 * counted
    assert full_precision_room._weights_bytes(replace(source, dtype=torch.bfloat16)) == 2 * counted


# What people see ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("scale", [1e-6, 2.0, 200.0])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "kto", "wpo", "aot_unpaired"])
def test_the_table_fits_a_terminal(width, loss, scale):
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(certificate_table(made_certificate(made_sample(scale=scale)), get_loss(loss)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= max(WIDTH, width)
    assert "…" not in text
    assert "per margin" in text
    assert ("no effect on the loss" in text) == (loss in ("simpo", "wpo"))


def test_the_sentence_names_size_and_effect():
    said = sentence(made_certificate(), get_loss("dpo", beta=0.5))
    assert "nf4" in said
    assert "dpo, beta 0.5" in said
    assert said.endswith(".")


def test_result_and_card_state_the_certificate(tmp_path):
    result = train(tmp_path, reference={"quantization": "nf4"})
    stated = result["reference"]["certificate"]
    assert stated["effect"]["loss"]["name"] == "dpo"
    assert stated["errors"]["margin"]["p95_abs"] > 0
    assert "sample" not in stated
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert stated["sentence"] in card
    exact = train(tmp_path, output=str(tmp_path / "exact"))
    assert exact["reference"]["certificate"] is None


def test_step_0_agrees_with_the_certificate_or_the_run_is_refused(tmp_path):
    recipe = make_recipe(tmp_path, reference={"quantization": "nf4"})
    certificate = made_certificate()
    errors = certificate.sample.completion_errors
    lengths, margins = certificate.sample.lengths, certificate.sample.margins(errors)
    said = check_step_zero(recipe, StepZero(-errors, lengths, -margins), certificate)
    assert "agree with the certificate" in said
    assert "QLoRA" in said
    assert "int8" in said
    for factor in (30, 0.01):
        with pytest.raises(ModelError, match="certificate says"):
            check_step_zero(recipe, StepZero(-factor * errors, lengths, -factor * margins), certificate)
    limited = make_recipe(tmp_path, reference={"quantization": "nf4", "max_margin_error": 1e-3})
    with pytest.raises(ModelError, match="max_margin_error"):
        check_step_zero(limited, StepZero(-errors, lengths, -margins))


# prefopt cache verify -----------------------------------------------------------------------------------------------


def verified(recipe):
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    verify_cache(recipe, console, rehash=False)
    return console.export_text()


def test_verify_says_what_it_looked_at(tmp_path):
    recipe = make_recipe(tmp_path, reference={"quantization": "nf4", "cache": str(tmp_path / "cache")})
    cached_reference(prepare(recipe, quiet=True), quiet())
    for file in (tmp_path / "cache").glob("certificate-*"):
        file.unlink()
    said = verified(recipe)
    for words in ("every shard", "scored again", "tolerance", "per margin", "the cache is sound"):
        assert words in said
    assert read_certificate(open_cache(recipe)) is not None
    assert "no certificate: the reference is not quantized" in _verified_without_quantization(tmp_path)


def _verified_without_quantization(folder):
    recipe = make_recipe(folder, reference={"cache": str(folder / "exact")})
    cached_reference(prepare(recipe, quiet=True), quiet())
    return verified(recipe)


def test_verify_says_which_versions_differ_and_goes_on(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, reference={"cache": str(tmp_path / "cache")})
    cached_reference(prepare(recipe, quiet=True), quiet())
    assert "note:" not in verified(recipe)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    said = verified(recipe)
    assert "torch is 0.0.1 here" in said
    assert torch.__version__ in said
    assert "the cache is sound" in said


def test_verify_refuses_a_damaged_shard_by_name(tmp_path):
    recipe = make_recipe(tmp_path, reference={"cache": str(tmp_path / "cache")})
    cached_reference(prepare(recipe, quiet=True), quiet())
    shard = next((tmp_path / "cache").glob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(CacheError, match=shard.name):
        verified(recipe)


def test_a_certificate_does_not_need_the_sample_of_a_launch_twice(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, reference={"quantization": "nf4", "cache": str(tmp_path / "cache")})
    prepared = prepare(recipe, quiet=True)
    cache = cached_reference(prepared, quiet()).cache
    certificate_file(cache).unlink(missing_ok=True)
    monkeypatch.setenv("RANK", "1")
    loaded = []
    assert certifying_room.certify(prepared, cache, quiet(), open_model=loaded.append) is None
    assert not loaded

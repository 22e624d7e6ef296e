"""Every published method, under every option: its formula, its value at the reference, its numerics.

The formulas stand in `published`, written out by hand for one example; here is what must hold of all of them.
"""

from dataclasses import replace

import pytest
import torch
from published import BACKWARDS, DETACHED, OTHER_VALUES, OVERFLOWS, PUBLISHED
from published.records import (
    POLICY,
    alike,
    at_reference,
    examples,
    list_examples,
    make_lists,
    make_record,
    split,
    with_gradients,
)

from prefopt_losses import METHODS, LogProbs, LossError, get_loss, loss_from_config
from prefopt_losses.hyperparameters import schema
from prefopt_losses.methods import FAMILIES


def variations():
    """Yield each method with its defaults, and with each hyper-parameter changed alone."""
    for name, method in METHODS.items():
        yield name, {}
        for key, each in schema(method.make).items():
            others = [choice for choice in each.choices or () if choice != each.default]
            other = OTHER_VALUES.get(f"{name}.{key}", OTHER_VALUES.get(key))
            for value in others or [1.7 * each.default if other is None else other]:
                yield name, {key: value}


def label(case):
    return case if isinstance(case, str) else ",".join(f"{k}={v}" for k, v in case.items()) or "defaults"


every_option = pytest.mark.parametrize(("name", "options"), list(variations()), ids=label)
every_method = pytest.mark.parametrize("name", METHODS)
every_pair_method = pytest.mark.parametrize("name", [name for name in METHODS if not get_loss(name).needs.lists])


def record_for(loss, dtype=torch.float64, size=None):
    if loss.needs.lists:
        return make_lists(dtype, sizes=(2, 4, 3, 2, 5)[:size])
    return make_record(dtype, batch=size or 7)


def published(name, loss, record):
    rows = list_examples(record) if loss.needs.lists else examples(record)
    return torch.tensor([PUBLISHED[name](e, **loss.hyperparameters) for e in rows], dtype=torch.float64)


def gradients(value, policy):
    return torch.autograd.grad(value, policy, materialize_grads=True)


def test_every_method_has_its_formula():
    assert set(PUBLISHED) == set(METHODS)


@every_option
def test_it_equals_the_published_formula(name, options):
    loss = get_loss(name, **options)
    record = record_for(loss)
    torch.testing.assert_close(loss(record), published(name, loss, record), rtol=1e-11, atol=1e-12)


@every_option
def test_its_gradient_passes_gradcheck(name, options):
    loss = get_loss(name, **options)
    if name in DETACHED:
        pytest.skip(DETACHED[name])
    record = record_for(loss)
    names = ["logps"] if loss.needs.lists else [each for each in POLICY if each in loss.needs.tensors]

    def function(*tensors):
        return loss(replace(record, **dict(zip(names, tensors))), check=False)

    leaves = [getattr(record, each).clone().requires_grad_() for each in names]
    assert torch.autograd.gradcheck(function, leaves)


@every_option
def test_a_policy_equal_to_its_reference_starts_at_margin_zero(name, options):
    loss = get_loss(name, **options)
    record = record_for(loss, torch.float32)
    # Without a reference in the reward, two completions of equal likelihood start equal.
    record = at_reference(record) if loss.needs.lists or loss.ranking_term.score.reference else alike(record)
    policy, record = with_gradients(record)
    value = loss(record)
    torch.testing.assert_close(value, published(name, loss, record).float(), rtol=2e-5, atol=1e-5)
    assert all(slope.isfinite().all() for slope in gradients(value.sum(), policy))
    if not loss.needs.lists:
        assert torch.equal(loss.margin(record), torch.zeros(7))


@every_option
def test_a_step_down_the_gradient_separates_the_pair(name, options):
    """Chosen up (or, in apo_down, less far down) relative to rejected, at the reference."""
    loss = get_loss(name, **options)
    if name in BACKWARDS or loss.needs.lists:
        pytest.skip(BACKWARDS.get(name, "a list has no chosen side"))
    record = at_reference(replace(make_record(), preference_probability=torch.full((7,), 0.9).double()))
    policy, record = with_gradients(record)
    slopes = dict(zip(POLICY, gradients(loss(record).sum(), policy)))
    chosen, rejected = (
        slopes[f"{side}_logps"] + slopes[f"{side}_token_logps"].sum(-1) for side in ("chosen", "rejected")
    )
    assert bool((-chosen + rejected > 0).all())


@every_option
@pytest.mark.parametrize("size", [1, 2, 5])
def test_it_gives_one_value_per_example(name, options, size):
    loss = get_loss(name, **options)
    if size < loss.needs.minimum_batch:
        with pytest.raises(LossError, match="at least 2 examples"):
            loss(record_for(loss, size=size))
    else:
        assert loss(record_for(loss, size=size)).shape == (size,)


@every_pair_method
@pytest.mark.parametrize("sizes", [[3, 4], [1, 5, 1], [1] * 7])
def test_any_split_into_micro_batches_gives_equal_values_and_gradients(name, sizes):
    """Or the loss declares that it does not decompose, and then it really does not."""
    loss = get_loss(name)
    if min(sizes) < loss.needs.minimum_batch:
        pytest.skip("smaller than the loss allows")
    tokens = make_record().chosen_lengths.double().mean().item()
    policy, whole = with_gradients(make_record())
    parts = [loss(part) for part in split(whole, sizes, tokens_per_example=tokens)]
    expected, given = gradients(loss(whole).mean(), policy), gradients(torch.cat(parts).sum() / 7, policy)
    same = [torch.allclose(ours, theirs, rtol=1e-12, atol=1e-15) for ours, theirs in zip(given, expected)]
    if loss.needs.batch:
        assert not all(same)
    else:
        assert all(same)
        torch.testing.assert_close(torch.cat(parts), loss(whole), rtol=1e-12, atol=1e-14)


def test_without_the_steps_token_count_a_token_mean_does_depend_on_the_split():
    """The need for tokens_per_example is real, and `needs` declares it."""
    record, loss = make_record(), get_loss("sft")
    halves = [loss(part) for part in split(record, [3, 4])]
    assert not torch.allclose(torch.cat(halves), loss(record))
    assert loss.needs.step_tokens


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_finite_far_from_the_reference(name, options, dtype, sign):
    """Policy and reference 1e4 nats apart on completions of one token, 30 on completions of 4000."""
    loss = get_loss(name, **options)
    if name in OVERFLOWS:
        pytest.skip(OVERFLOWS[name])
    record = far_lists(dtype, sign) if loss.needs.lists else far_pairs(dtype, sign)
    policy, record = with_gradients(record)
    value = loss(record)
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert all(slope.isfinite().all() for slope in gradients(value.sum(), policy))


def far_pairs(dtype, sign):
    lengths, zero = torch.tensor([1, 4000, 1]), torch.zeros(3, dtype=dtype)
    far = torch.tensor([-1e4, -30.0, -1e4], dtype=dtype)
    sides = {"chosen": far, "rejected": zero} if sign < 0 else {"chosen": zero, "rejected": far}
    tensors = {}
    for side, value in sides.items():
        tokens = torch.zeros(3, 4000, dtype=dtype)
        tokens[:, 0] = value
        tensors |= {f"{side}_logps": value, f"ref_{side}_logps": zero, f"{side}_lengths": lengths}
        tensors |= {f"{side}_token_logps": tokens, f"ref_{side}_token_logps": torch.zeros_like(tokens)}
        tensors |= {f"{side}_relative_logps": value, f"{side}_sequential_kl": -value}
    return LogProbs(
        **tensors,
        preference_probability=zero + 0.5,
        chosen_scores=zero + 2,
        rejected_scores=zero + 1,
        values=zero + 1,
        gold_logps=far,
        gold_lengths=lengths,
        mismatched_logps=far,
        ref_mismatched_logps=zero,
    )


def far_lists(dtype, sign):
    record = make_lists(dtype, sizes=(2, 3))
    far = torch.tensor([-1e4, 0, -30.0, 0, -1e4], dtype=dtype)
    zero = torch.zeros(5, dtype=dtype)
    policy, reference = (far, zero) if sign < 0 else (zero, far)
    return replace(record, logps=policy, ref_logps=reference)


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_documented_overflow_is_real(name):
    loss = get_loss(name)
    values = [loss(far_lists(torch.float32, s) if loss.needs.lists else far_pairs(torch.float32, s)) for s in (1, -1)]
    assert not torch.cat(values).isfinite().all()


@pytest.mark.parametrize(("name", "options"), [case for case in variations() if case[1]], ids=label)
def test_every_hyper_parameter_changes_the_result(name, options):
    loss = get_loss(name)
    record = record_for(loss)
    assert not torch.allclose(get_loss(name, **options)(record), loss(record))


SAME_AS_ANOTHER = {"gpo": "of its default f it is dpo"}


def test_every_name_is_its_own_loss():
    record, lists = make_record(), make_lists()
    values = {}
    for name, method in METHODS.items():
        beta = {"beta": 1.0} if "beta" in schema(method.make) else {}
        loss = get_loss(name, **beta)
        value = loss(lists if loss.needs.lists else record)
        values[name] = tuple(round(each, 6) for each in value.tolist())
    distinct = [value for name, value in values.items() if name not in SAME_AS_ANOTHER]
    assert len(set(distinct)) == len(distinct)


LENGTHS = ("chosen_lengths", "rejected_lengths")


def test_duplicating_every_token_leaves_means_alone_and_doubles_sums():
    record = make_record()
    doubled = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", *LENGTHS)
    twice = replace(record, **{name: 2 * getattr(record, name) for name in doubled})
    mean, total = get_loss("ipo", normalize="mean"), get_loss("ipo", normalize="sum")
    assert torch.equal(mean(twice), mean(record))
    assert torch.equal(total.margin(twice), 2 * total.margin(record))


def test_sum_and_mean_differ_exactly_by_the_token_count():
    lengths = torch.full((7,), 16)
    record = replace(make_record(), chosen_lengths=lengths, rejected_lengths=lengths)
    mean, total = get_loss("ipo", beta=0.8), get_loss("ipo", beta=0.05, normalize="sum")
    assert torch.equal(mean.margin(record), total.margin(record))  # tau 0.8 per token is tau 0.05 of 16 tokens
    assert torch.equal(16**2 * mean(record), total(record))


def test_ipo_is_squared_gpo_at_twice_tau():
    record = make_record()
    ours = get_loss("gpo_squared", beta=0.2)(record) / (4 * 0.1**2)
    torch.testing.assert_close(get_loss("ipo", beta=0.1, normalize="sum")(record), ours)


def test_smoothing_of_zero_is_dpo():
    record = make_record()
    for name in ("cdpo", "robust_dpo"):
        assert torch.equal(get_loss(name, label_smoothing=0.0)(record), get_loss("dpo")(record))


def test_robust_dpo_is_unbiased_under_flipped_labels():
    """(1 - eps) * loss(pair) + eps * loss(flipped pair) is DPO's loss of the clean pair."""
    record, loss = make_record(), get_loss("robust_dpo", label_smoothing=0.3)
    r = record
    flipped = LogProbs(r.rejected_logps, r.chosen_logps, r.ref_rejected_logps, r.ref_chosen_logps)
    torch.testing.assert_close(0.7 * loss(r) + 0.3 * loss(flipped), get_loss("dpo")(r))


def test_soft_labels_are_never_used_unasked():
    record = make_record()
    blind = replace(record, preference_probability=None)
    for name in METHODS:
        needs = get_loss(name).needs
        if not needs.lists and not needs.preference_probability:
            assert torch.equal(get_loss(name)(record), get_loss(name)(blind))


def test_orpo_is_finite_at_probabilities_near_one_and_near_zero():
    near = torch.tensor([-1e-7, -1e-3, -50.0, 0.0])
    one = torch.ones(4, dtype=torch.int64)
    policy = [near.clone().requires_grad_(), near.flip(0).clone().requires_grad_()]
    value = get_loss("orpo")(LogProbs(*policy, chosen_lengths=one, rejected_lengths=one))
    assert value.isfinite().all()
    assert all(slope.isfinite().all() for slope in gradients(value.sum(), policy))


def test_a_callable_is_a_gpo_function_like_any_other():
    record = make_record()
    ours = get_loss("gpo", f=lambda x: torch.exp(-x), beta=0.05)
    assert torch.equal(ours(record), get_loss("gpo_exponential", beta=0.05)(record))


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("dpoo", {}, r"no loss 'dpoo'. Did you mean \"dpo\"\?"),
        ("sigmoid", {}, r'It is called "dpo" here'),
        ("nothing_of_the_kind", {}, "Known: dpo, cdpo"),
        ("dpo", {"loss_type": "ipo"}, "it is the name of the loss here"),
        ("gpo", {"f": lambda x: x.sum() - x}, "whose value at a point depends on the other points"),
        ("gpo", {"f": lambda x: x.detach().exp()}, "no gradient flows through"),
        ("gpo", {"f": lambda x: torch.sqrt(x)}, "finite value and slope at x = 0"),
        ("gpo", {"f": lambda x: torch.exp(-x).half()}, "expected fp32 for fp32 or wider"),
        ("gpo", {"f": lambda x: x.mul_(-1).exp()}, "leaves its argument alone"),
        ({"name": "dpo", "beta": 0.2}, {}, "is for loss_from_config"),
        (
            "dpo",
            {"betta": 0.1},
            r"dpo.betta: no such hyper-parameter. Did you mean \"beta\"\? Accepted: beta",
        ),
        ("dpo", {"beta": 0}, "dpo.beta: expected a number > 0, given 0"),
        ("dpo", {"beta": "0.1"}, "expected a number > 0, given '0.1'"),
        ("dpo", {"beta": True}, "expected a number > 0, given True"),
        ("dpo", {"beta": float("nan")}, "given nan"),
        ("dpo", {"beta": float("inf")}, "given inf"),
        ("dpo", {"soft_labels": 1}, "expected true or false, given 1"),
        ("dpo", {"label_smoothing": 0.1}, "cdpo mixes with label_smoothing, robust_dpo corrects"),
        ("robust_dpo", {"label_smoothing": 0.5}, "expected a number >= 0 and < 0.5, given 0.5"),
        ("cdpo", {"label_smoothing": -0.1}, "given -0.1"),
        ("ipo", {"normalize": "tokens"}, "expected 'mean' or 'sum', given 'tokens'"),
        ("ipo", {"tau": 0.1}, "called beta here"),
        ("simpo", {"gamma": 0.5}, "absolute margin gamma = beta \\* gamma_beta_ratio"),
        ("simpo", {"simpo_gamma": 0.5}, "simpo_gamma 0.5 at beta 2.0 is gamma_beta_ratio 0.25"),
        ("orpo", {"beta": 0.1}, "TRL's beta is the paper's lambda"),
        ("gpo", {"f": "logistik"}, r"gpo.f: no function 'logistik'. Did you mean \"logistic\""),
        ("gpo", {"f": torch.sum}, r"gpo.f: sum: expected an elementwise function"),
        ("gpo", {"f": lambda x: x.nothing}, "failed on a float64 tensor"),
        ("gpo", {"f": 3}, "the name of a function or a callable"),
        ("dpo+sft", {"beta": 0.2}, "Add losses instead"),
        ("dpo+2x*sft", {}, "expected weight \\* name"),
        (None, {}, "expected the name of a loss"),
    ],
)
def test_what_cannot_be_right_is_refused_with_what_to_do(name, hyperparameters, message):
    with pytest.raises(LossError, match=message):
        get_loss(name, **hyperparameters)


def test_all_problems_of_a_config_come_at_once_with_their_paths():
    config = ["dpo", {"name": "simpo", "beta": -1, "gamma": 0.5, "weight": -2}, {"name": "noo"}, {"beta": 1}]
    with pytest.raises(LossError) as caught:
        loss_from_config(config)
    places = [problem.split(": ")[0] for problem in caught.value.problems]
    assert places == ["loss[1].weight", "loss[1].beta", "loss[1].gamma", "loss[2]", "loss[3]"]


@pytest.mark.parametrize("config", [[], {}, None, 3, {"name": 3}, [[]]])
def test_a_config_of_the_wrong_shape_is_refused(config):
    with pytest.raises(LossError, match="expected"):
        loss_from_config(config)


def test_configs_of_every_kind_build_the_same_loss():
    dpo_loss = get_loss("dpo")
    assert loss_from_config("dpo") == loss_from_config({"name": "dpo"}) == dpo_loss
    mixed = dpo_loss + 0.5 * get_loss("sft")
    assert loss_from_config(["dpo", {"name": "sft", "weight": 0.5}]) == mixed
    assert loss_from_config("dpo + 0.5*sft") == get_loss("dpo+0.5*sft") == mixed
    assert loss_from_config({"name": "dpo", "weight": 2.0}) == 2 * dpo_loss


@every_method
def test_every_row_says_where_it_comes_from(name):
    method = METHODS[name]
    assert method.summary.endswith(".")
    assert method.link.startswith("https://") or name == "sft"
    assert method.family in FAMILIES

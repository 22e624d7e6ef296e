"""Every published method, under every option: its formula, its value at the reference, its numerics.

The formulas are written out by hand for one example in Python floats and share nothing with the algebra.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from prefopt_losses import METHODS, LogProbs, LossError, get_loss, loss_from_config
from prefopt_losses.hyperparameters import schema


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def soft(f, x, e, soft_labels):
    return e.p * f(x) + (1 - e.p) * f(-x) if soft_labels else f(x)


# `e` is one example: l_w, l_l policy and r_w, r_l reference sums; n_w, n_l lengths; p soft label;
# tokens: mean chosen tokens over the batch.
def dpo(e, beta, soft_labels):
    return soft(lambda x: -log_sigmoid(x), beta * ((e.l_w - e.r_w) - (e.l_l - e.r_l)), e, soft_labels)


def cdpo(e, beta, label_smoothing):
    x = beta * ((e.l_w - e.r_w) - (e.l_l - e.r_l))
    return -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def robust_dpo(e, beta, label_smoothing):
    x = beta * ((e.l_w - e.r_w) - (e.l_l - e.r_l))
    clean, flipped = -log_sigmoid(x), -log_sigmoid(-x)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(e, beta, normalize, soft_labels):
    n_w, n_l = (e.n_w, e.n_l) if normalize == "mean" else (1, 1)
    rho = (e.l_w - e.r_w) / n_w - (e.l_l - e.r_l) / n_l
    return soft(lambda rho: (rho - 1 / (2 * beta)) ** 2, rho, e, soft_labels)


def hinge(e, beta, soft_labels):
    return soft(lambda x: max(0, 1 - x), beta * (e.l_w - e.r_w - e.l_l + e.r_l), e, soft_labels)


def gpo_squared(e, beta, soft_labels):
    return soft(lambda x: (x - 1) ** 2, beta * (e.l_w - e.r_w - e.l_l + e.r_l), e, soft_labels)


def gpo_exponential(e, beta, soft_labels):
    return soft(lambda x: math.exp(-x), beta * (e.l_w - e.r_w - e.l_l + e.r_l), e, soft_labels)


def gpo_truncated_quadratic(e, beta, soft_labels):
    return soft(lambda x: max(0, 1 - x) ** 2, beta * (e.l_w - e.r_w - e.l_l + e.r_l), e, soft_labels)


def gpo_savage(e, beta, soft_labels):
    return soft(lambda x: 1 / (1 + math.exp(x)) ** 2, beta * (e.l_w - e.r_w - e.l_l + e.r_l), e, soft_labels)


def gpo(e, f, beta, soft_labels):
    return {"logistic": dpo, "savage": gpo_savage}[f](e, beta, soft_labels)


def sft(e, normalize):
    return -e.l_w / (e.tokens if normalize == "token" else e.n_w)


def slic_hf(e, delta, lambda_coef):
    return max(0, delta - e.l_w + e.l_l) - lambda_coef * e.l_w


def simpo(e, beta, gamma_beta_ratio):
    return -log_sigmoid(beta * (e.l_w / e.n_w - e.l_l / e.n_l) - gamma_beta_ratio * beta)


def cpo(e, beta, alpha):
    return -log_sigmoid(beta * (e.l_w - e.l_l)) + alpha * sft(e, "token")


def orpo(e, lambda_coef):
    p_w, p_l = math.exp(e.l_w / e.n_w), math.exp(e.l_l / e.n_l)
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return sft(e, "token") - lambda_coef * log_sigmoid(math.log(odds_ratio))


def bco_pair(e, beta):
    return -log_sigmoid(beta * (e.l_w - e.r_w)) - log_sigmoid(-beta * (e.l_l - e.r_l))


def nca_pair(e, beta):
    r_w, r_l = beta * (e.l_w - e.r_w), beta * (e.l_l - e.r_l)
    return -log_sigmoid(r_w) - 0.5 * log_sigmoid(-r_w) - 0.5 * log_sigmoid(-r_l)


def sppo_hard(e, beta):
    return (e.l_w - e.r_w - 0.5 / beta) ** 2 + (e.l_l - e.r_l + 0.5 / beta) ** 2


def apo_zero(e, beta):
    return 1 - sigmoid(beta * (e.l_w - e.r_w)) + sigmoid(beta * (e.l_l - e.r_l))


def apo_down(e, beta):
    return sigmoid(beta * (e.l_w - e.r_w)) + 1 - sigmoid(beta * (e.l_w - e.r_w - e.l_l + e.r_l))


PUBLISHED = {
    f.__name__: f
    for f in (
        *(dpo, cdpo, robust_dpo, ipo, hinge, gpo, gpo_squared, gpo_exponential, gpo_truncated_quadratic),
        *(gpo_savage, slic_hf, simpo, cpo, orpo, sft, bco_pair, nca_pair, sppo_hard, apo_zero, apo_down),
    )
}
OTHER_VALUES = {"f": "savage", "label_smoothing": 0.3}  # every other number is multiplied by 1.7


def variations():
    """Yield each method with its defaults, and with each hyper-parameter changed alone."""
    for name, method in METHODS.items():
        yield name, {}
        for key, each in schema(method.make).items():
            others = [choice for choice in each.choices or () if choice != each.default]
            for value in others or [OTHER_VALUES.get(key) or 1.7 * each.default]:
                yield name, {key: value}


def label(case):
    return case if isinstance(case, str) else ",".join(f"{k}={v}" for k, v in case.items()) or "defaults"


every_option = pytest.mark.parametrize(("name", "options"), list(variations()), ids=label)
every_method = pytest.mark.parametrize("name", METHODS)


def make_record(dtype=torch.float64, batch=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 25, (2, batch), generator=generator)
    logps = -1.5 * torch.rand(2, batch, generator=generator, dtype=torch.float64) * lengths - 0.5
    reference = logps + 6 * torch.randn(2, batch, generator=generator, dtype=torch.float64)
    probability = torch.rand(batch, generator=generator, dtype=torch.float64)
    tensors = (*logps.to(dtype), *reference.to(dtype), *lengths)
    return LogProbs(*tensors, preference_probability=probability.to(dtype))


def examples(record):
    columns = {
        "l_w": record.chosen_logps,
        "l_l": record.rejected_logps,
        "r_w": record.ref_chosen_logps,
        "r_l": record.ref_rejected_logps,
        "n_w": record.chosen_lengths,
        "n_l": record.rejected_lengths,
        "p": record.preference_probability,
    }
    tokens = record.chosen_lengths.double().mean().item()
    rows = zip(*(column.tolist() for column in columns.values()))
    return [SimpleNamespace(**dict(zip(columns, row)), tokens=tokens) for row in rows]


def with_gradients(record):
    policy = [record.chosen_logps.clone().requires_grad_(), record.rejected_logps.clone().requires_grad_()]
    return policy, replace(record, chosen_logps=policy[0], rejected_logps=policy[1])


def gradients(value, policy):
    return torch.autograd.grad(value, policy, materialize_grads=True)


def test_every_method_has_its_formula_here():
    assert set(PUBLISHED) == set(METHODS)


@every_option
def test_it_equals_the_published_formula(name, options):
    record, loss = make_record(), get_loss(name, **options)
    expected = [PUBLISHED[name](e, **loss.hyperparameters) for e in examples(record)]
    torch.testing.assert_close(loss(record), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-12)


@every_option
def test_its_gradient_passes_gradcheck(name, options):
    record, loss = make_record(), get_loss(name, **options)

    def function(chosen, rejected):
        return loss(replace(record, chosen_logps=chosen, rejected_logps=rejected), check=False)

    policy, _ = with_gradients(record)
    assert torch.autograd.gradcheck(function, policy)


@every_option
def test_a_policy_equal_to_its_reference_starts_at_margin_zero(name, options):
    loss, record = get_loss(name, **options), make_record(torch.float32)
    if loss.needs.reference:
        record = replace(record, ref_chosen_logps=record.chosen_logps, ref_rejected_logps=record.rejected_logps)
    else:  # without a reference, two completions of equal likelihood start equal
        record = replace(record, rejected_logps=record.chosen_logps, rejected_lengths=record.chosen_lengths)
    policy, record = with_gradients(record)
    value = loss(record)
    assert torch.equal(loss.margin(record), torch.zeros(7))
    expected = [PUBLISHED[name](e, **loss.hyperparameters) for e in examples(record)]
    torch.testing.assert_close(value, torch.tensor(expected))
    assert all(slope.isfinite().all() for slope in gradients(value.sum(), policy))


@every_option
def test_a_step_down_the_gradient_separates_the_pair(name, options):
    """Chosen up (or, in apo_down, less far down) relative to rejected, at the reference."""
    loss, record = get_loss(name, **options), make_record()
    record = replace(record, ref_chosen_logps=record.chosen_logps, ref_rejected_logps=record.rejected_logps)
    policy, record = with_gradients(replace(record, preference_probability=torch.full((7,), 0.9).double()))
    chosen, rejected = gradients(loss(record).sum(), policy)
    assert bool((-chosen + rejected > 0).all())


@every_option
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_it_gives_one_value_per_example(name, options, batch):
    assert get_loss(name, **options)(make_record(batch=batch)).shape == (batch,)


@every_method
def test_examples_do_not_touch_each_other(name):
    """Given the step's token count, an example's value is the same alone and in a batch."""
    record, loss = make_record(), get_loss(name)
    tokens = record.chosen_lengths.double().mean().item()
    together = loss(replace(record, tokens_per_example=tokens))
    alone = torch.cat([loss(part) for part in split(record, [1] * 7, tokens)])
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=0)


@every_method
@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 5, 1], [1] * 7])
def test_any_split_into_micro_batches_gives_equal_gradients(name, sizes):
    record, loss = make_record(), get_loss(name)
    tokens = record.chosen_lengths.double().mean().item()
    policy, whole = with_gradients(record)
    expected = gradients(loss(whole).mean(), policy)
    accumulated = sum(loss(part).sum() for part in split(whole, sizes, tokens)) / 7
    for ours, theirs in zip(gradients(accumulated, policy), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def split(record, sizes, tokens):
    names = [name for name, value in vars(record).items() if value is not None]
    columns = zip(*(getattr(record, name).split(sizes) for name in names))
    return [LogProbs(**dict(zip(names, column)), tokens_per_example=tokens) for column in columns]


def test_without_the_steps_token_count_a_token_mean_does_depend_on_the_split():
    """The need for tokens_per_example is real, and `needs` declares it."""
    record, loss = make_record(), get_loss("sft")
    halves = [loss(replace(part, tokens_per_example=None)) for part in split(record, [3, 4], 1.0)]
    assert not torch.allclose(torch.cat(halves), loss(record))
    assert loss.needs.step_tokens


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_finite_far_from_the_reference(name, options, dtype, sign):
    lengths, zero = torch.tensor([1, 4000]), torch.zeros(2, dtype=dtype)
    far = torch.tensor([-1e4, -30.0], dtype=dtype)
    sides = (far, zero) if sign < 0 else (zero, far)
    probability = torch.full((2,), 0.5, dtype=dtype)
    record = LogProbs(*sides, zero, zero, lengths, lengths, probability)
    policy, record = with_gradients(record)
    value = get_loss(name, **options)(record)
    both_tails = options.get("soft_labels", False)
    if name == "gpo_exponential" and (sign < 0 or both_tails):
        assert value[0].isinf()  # e^1000: documented
        return
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert all(slope.isfinite().all() for slope in gradients(value.sum(), policy))


@pytest.mark.parametrize(("name", "options"), [case for case in variations() if case[1]], ids=label)
def test_every_hyper_parameter_changes_the_result(name, options):
    record = make_record()
    assert not torch.allclose(get_loss(name, **options)(record), get_loss(name)(record))


def test_every_name_is_its_own_loss():
    """At log-ratios u = (+-3, -+3), likelihoods apart by 6 and beta = 1 where there is one; lengths 2."""
    ones = torch.ones(2)
    u, lengths = torch.tensor([3.0, -3.0]), torch.full((2,), 2)
    record = LogProbs(-10 + u, -10 - u, -10 * ones, -10 * ones, lengths, lengths)
    values = {}
    for name, method in METHODS.items():
        beta = {"beta": 1.0} if "beta" in schema(method.make) else {}
        values[name] = tuple(round(value, 4) for value in get_loss(name, **beta)(record).tolist())
    assert values == {
        "dpo": (0.0025, 6.0025),
        "cdpo": (0.6025, 5.4025),
        "robust_dpo": (-0.7475, 6.7525),
        "ipo": (6.25, 12.25),
        "hinge": (0.0, 7.0),
        "gpo": (0.0025, 6.0025),  # of its default f: dpo
        "gpo_squared": (25.0, 49.0),
        "gpo_exponential": (0.0025, 403.4288),
        "gpo_truncated_quadratic": (0.0, 49.0),
        "gpo_savage": (0.0, 0.9951),
        "slic_hf": (0.7, 8.3),
        "simpo": (0.062, 3.288),
        "cpo": (3.5025, 12.5025),
        "orpo": (3.5047, 6.8076),
        "sft": (3.5, 6.5),
        "bco_pair": (0.0972, 6.0972),
        "nca_pair": (1.5972, 4.5972),
        "sppo_hard": (12.5, 24.5),
        "apo_zero": (0.0949, 1.9051),
        "apo_down": (0.955, 1.045),
    }
    distinct = {name: value for name, value in values.items() if name != "gpo"}
    assert len(set(distinct.values())) == len(distinct)


def test_duplicating_every_token_leaves_means_alone_and_doubles_sums():
    record = make_record()
    tensors = {name: value for name, value in vars(record).items() if value is not None}
    twice = LogProbs(**{k: v if k == "preference_probability" else 2 * v for k, v in tensors.items()})
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
        ("dpoo", {}, r"no loss 'dpoo'. Did you mean \"dpo\"\? Known: dpo, cdpo"),
        ("sigmoid", {}, r'It is called "dpo" here'),
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
        ("gpo", {"f": torch.sum}, "must be elementwise"),
        ("gpo", {"f": lambda x: x.nothing}, "failed on a float tensor"),
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
    assert method.family in ("pairwise", "reference_free", "pointwise")

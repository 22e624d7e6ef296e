"""The microscope: what it says of functions whose behaviour is known by hand, and of functions that are broken."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from prefopt_losses import (
    CHOSEN,
    FUNCTIONS,
    METHODS,
    NEGATED_CHOSEN,
    PAIR,
    FromRecord,
    Loss,
    LossError,
    Score,
    Term,
    get_loss,
)
from prefopt_losses.convex import hinge, logistic
from prefopt_losses.profiles.convexity import PROOFS
from prefopt_losses.profiles.matched_beta import match_beta
from prefopt_losses.profiles.profile import profile, profile_terms
from prefopt_losses.profiles.verdicts import cures, verdicts

# f(0), f'(0), f''(0), kappa, where a certain label rests, and the lower bound, worked out by hand.
AT_ZERO = {
    "logistic": (math.log(2), -1 / 2, 1 / 4, 1 / 2, None, 0),
    "hinge": (1, -1, 0, 0, 1, 0),
    "squared": (1, -2, 2, 1, 1, 0),
    "exponential": (1, -1, 1, 1, None, 0),
    "truncated_quadratic": (1, -2, 2, 1, 1, 0),
    "savage": (1 / 4, -1 / 4, 1 / 8, 1 / 2, None, 0),
}
# -f'(x) / |f'(0)| at -4, -2, -1, 0, 1, 2, 4, from the derivatives on paper.
SIGMOID = torch.sigmoid(-torch.tensor([-4.0, -2, -1, 0, 1, 2, 4], dtype=torch.float64))
WEIGHTS = {
    "logistic": 2 * SIGMOID,
    "hinge": torch.tensor([1, 1, 1, 1, 0, 0, 0]),
    "squared": torch.tensor([5, 3, 2, 1, 0, -1, -3]),
    "exponential": SIGMOID / (1 - SIGMOID),  # the odds e^-x
    "truncated_quadratic": torch.tensor([5, 3, 2, 1, 0, 0, 0]),
    "savage": 8 * SIGMOID.square() * (1 - SIGMOID),
}
TAILS = {
    "logistic": ("levels off", "fades"),
    "hinge": ("levels off", "is zero"),
    "squared": ("grows", "turns round"),
    "exponential": ("grows exponentially", "fades"),
    "truncated_quadratic": ("grows", "is zero"),
    "savage": ("fades", "fades"),
    "linear": ("levels off", "levels off"),
}
CLASSES = {
    "logistic": ("logistic", 1),
    "savage": ("logistic", 1),
    "exponential": ("logistic", 2),
    "squared": ("linear", 1),
    "truncated_quadratic": ("linear", 1),
    "hinge": ("step", 1),
    "linear": ("constant", None),
    "ramp": ("constant", None),
    "quadratic": ("none", None),
}
LOG_RATIO = Score()


def lrml(tau):
    """DiscoPOP's log-ratio modulated loss, as its paper writes it."""

    def f(x):
        modulation = torch.sigmoid(x / tau)
        return (1 - modulation) * F.softplus(-x) + modulation * torch.exp(-x)

    return f


def padll(x):
    return 0.9 * (1 - 0.5 * (x < 0).to(x.dtype)) * F.softplus(-x)


# The six of GPO


@pytest.mark.parametrize("name", AT_ZERO)
def test_the_six_of_gpo_at_zero(name):
    seen = profile(name)
    given = (seen.value, seen.slope, seen.curvature, seen.kappa, seen.rest, seen.lower_bound.value)
    assert given == pytest.approx(AT_ZERO[name], abs=1e-9)
    assert seen.starts == "forwards"


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_pull_of_right_and_wrong_pairs(name):
    assert [weight for _, weight in profile(name).weights] == pytest.approx(WEIGHTS[name].tolist(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", TAILS)
def test_both_tails(name):
    seen = profile(name)
    assert (seen.left.kind, seen.right.kind) == TAILS[name]


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_of_the_population_optimum(name):
    seen = profile(name).population
    assert (seen.kind, seen.scale) == pytest.approx(CLASSES[name])


def test_the_squared_function_leaves_the_unit_interval():
    assert dict(profile("squared").win_probability)[2.0] == pytest.approx(1.5)
    assert dict(profile("truncated_quadratic").win_probability)[2.0] == 1


@pytest.mark.parametrize("name", ["exponential", "cell"])
def test_where_the_exponential_overflows(name):
    fp32, bf16 = profile(name).overflow
    assert fp32.below == bf16.below == pytest.approx(-math.log(torch.finfo(torch.float32).max), abs=0.1)
    assert fp32.above is None
    assert fp32.radius == pytest.approx(88.7)


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"exponential", "cell"}))
def test_the_others_are_finite_out_to_ten_thousand(name):
    assert [each.radius for each in profile(name).overflow] == [None, None]


# Convexity


@pytest.mark.parametrize("name", PROOFS)
def test_a_certificate_is_never_at_odds_with_sampling(name):
    assert profile(name).convexity.status == "certified"
    f = FUNCTIONS[name]
    assert profile(lambda x: f(x)).convexity.status == "not refuted"


def test_savage_is_refuted_below_minus_log_two_with_a_chord_that_proves_it():
    verdict = profile("savage").convexity
    assert verdict.status == "refuted"
    assert verdict.reason == "below x = -0.693"
    ((low, edge),) = verdict.regions
    assert (low, edge) == pytest.approx((-20, -math.log(2)), abs=1e-6)
    x, h = verdict.witness, verdict.width
    left, here, right = FUNCTIONS["savage"](torch.tensor([x - h, x, x + h], dtype=torch.float64)).tolist()
    assert here > (left + right) / 2


@pytest.mark.parametrize(
    ("f", "where"),
    [
        (FUNCTIONS["ramp"], "below x = 0.000"),
        (padll, "at x = 0.000"),
        (lambda x: -x.abs() - x, "at x = 0.000"),  # a concave kink
        (lambda x: torch.exp(-x) + (x > 0.3).double(), "at x = 0.300"),  # a jump, between grid points
        (lambda x: -x - x.square(), "everywhere on [-20, 20]"),
        (lambda x: -x + 1e-3 * torch.cos(x).clamp(max=0.0), "between"),
    ],
)
def test_what_is_not_convex_is_refuted_where_it_bends(f, where):
    verdict = profile(f).convexity
    assert verdict.status == "refuted"
    assert verdict.reason.startswith(where)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: F.softplus(-x.float()),  # 7 digits inside
        lambda x: -torch.log(torch.sigmoid(x)),
        lambda x: (1 - x).clamp(min=0) ** 3,
        lambda x: torch.maximum(-x, 2 - 4 * x),
        lambda x: 1e8 + F.softplus(-x),  # noise of the values is larger than most chords
        lambda x: F.softplus(-3 * x) / 3,  # torch's is a line from 20 on, with a step of 2e-9
    ],
)
def test_rounding_never_refutes_what_is_convex(f):
    assert profile(f).convexity.status == "not refuted"


def test_a_label_between_zero_and_one_keeps_the_certificate_and_beyond_one_loses_it():
    assert profile(get_loss("cdpo")).convexity.status == "certified"
    assert profile(get_loss("robust_dpo")).convexity.status == "not refuted"
    assert profile(Term(hinge, LOG_RATIO, q=1.125)).convexity.status == "refuted"
    assert profile(Term(FUNCTIONS["savage"], LOG_RATIO, q=0.9)).convexity.status == "refuted"
    assert profile(get_loss("dpo", soft_labels=True)).convexity.status == "certified"


# A function that starts backwards


def test_discopop_starts_backwards_at_its_default_and_forwards_at_one():
    seen = profile(lrml(0.05))
    by_hand = (1 - math.log(2)) / (4 * 0.05) - 0.75
    assert seen.slope == pytest.approx(by_hand)
    assert round(seen.slope, 3) == 0.784
    assert seen.starts == "backwards"
    assert [(each.kind, round(each.x, 3)) for each in seen.stationary] == [("minimum", -0.119), ("maximum", 0.072)]
    assert round(seen.rest, 3) == -0.119
    assert seen.convexity.status == "refuted"
    assert round(profile(lrml(1.0)).slope, 3) == -0.673
    said = verdicts(seen)["start"]
    for text in ("BACKWARDS", "+0.784", "LESS likely", "x = -0.119", "barrier at x = +0.072"):
        assert text in said


def test_the_discopop_of_the_table_is_that_function_and_tau_of_one_cures_it():
    assert profile(get_loss("discopop")).slope == pytest.approx(profile(lrml(0.05)).slope)
    assert cures(get_loss("discopop")) == ["tau = 1 removes it: f'(0) = -0.673"]
    assert cures(get_loss("dpo")) == []


def test_a_dead_start_at_a_kink_is_said():
    seen = profile(lambda x: torch.relu(-x))
    assert (seen.starts, seen.curvature, seen.kappa) == ("nowhere", None, None)
    assert seen.one_sided == pytest.approx((-1, 0))
    assert "autograd takes f'(0) = 0 at the kink" in verdicts(seen)["start"]


# Places


def test_stationary_points_are_found_and_told_apart():
    seen = profile(lambda x: x**4 / 4 - 2 * x**3 / 3 + x**2 / 2 - x**3 / 3 + x**2 - x, radius=5)  # f' = (x - 1)^3
    assert [(each.kind, each.x) for each in seen.stationary] == [("minimum", pytest.approx(1, abs=1e-4))]
    (flat,) = profile("hinge").stationary
    assert (flat.kind, flat.x, flat.end) == ("flat", 1.0, 20.0)
    inflection = profile(lambda x: -((x - 1) ** 3), radius=4).stationary
    assert [(each.kind, each.x) for each in inflection] == [("inflection", 1.0)]


def test_kinks_are_found_with_both_slopes():
    (kink,) = profile("hinge").kinks
    assert (kink.x, kink.left, kink.right) == pytest.approx((1, -1, 0))
    assert profile("truncated_quadratic").kinks == ()
    (jump,) = profile(padll).kinks
    assert (jump.x, jump.left, jump.right) == pytest.approx((0, -0.225, -0.45), abs=1e-6)


def test_a_function_that_ends_somewhere_is_looked_at_where_it_exists():
    seen = profile(lambda x: -torch.log(x + 2))
    assert seen.domain == pytest.approx((-2, 20), abs=0.006)
    assert seen.convexity.status == "not refuted"
    assert seen.overflow[0].below == pytest.approx(-2, abs=0.1)


def test_where_a_function_has_ended_nothing_is_said_of_its_slope():
    seen = profile(lambda x: -torch.log(x + 2))  # whose slope is finite at x = -4
    assert dict(seen.weights)[-4.0] is None
    assert dict(seen.win_probability)[4.0] is None
    assert "f does not reach x = -4: it ends at x = -2" in str(seen)


def test_the_widest_places_where_it_bends_are_named():
    # Where 1 - tanh^2 runs out of digits there are many spurious ones.
    assert profile(lambda x: -torch.tanh(x)).convexity.reason.endswith(" and 0.000")


@pytest.mark.parametrize(
    ("f", "left", "right"),
    [
        (get_loss("chi_po").terms[0].f, "is zero", "is zero"),  # clipped at 10, where autograd still has a slope
        (lambda x: -torch.tanh(x), "fades", "fades"),
        (lambda x: F.softplus(-x) + 0.1 * torch.sin(3 * x), "levels off", "turns round"),  # ripples are no trend
    ],
)
def test_a_tail_is_more_than_three_points(f, left, right):
    seen = profile(f)
    assert (seen.left.kind, seen.right.kind) == (left, right)


@pytest.mark.parametrize(
    ("f", "said"),
    [
        (lambda x: x**4, "asks for x = 0 and does not rank"),
        (lambda x: F.relu(-x - 1), "f is flat here"),
        (lambda x: 1 / (1 + x.square()), "this is a maximum"),
        (lambda x: -(x**3), "f only pauses here"),
    ],
)
def test_a_start_that_goes_nowhere_says_what_lies_around_it(f, said):
    assert said in verdicts(profile(f))["start"]


@pytest.mark.parametrize(
    ("f", "value", "at"),
    [
        (lambda x: F.relu(-x - 1), 0, 0),  # reached all along
        (lambda x: 0 * x + 1, 1, 0),
        (lambda x: F.softplus(-x) + (x >= 1).double(), math.log1p(math.exp(-1)), 1),  # before a jump, off the grid
    ],
)
def test_a_bound_is_the_least_value_wherever_it_lies(f, value, at):
    bound = profile(f).lower_bound
    assert (bound.value, bound.at) == pytest.approx((value, at), abs=1e-8)


@pytest.mark.parametrize(
    ("f", "unbounded"),
    [
        (Term(logistic, LOG_RATIO, q=1.125), True),
        (Term(hinge, LOG_RATIO, q=1.125), True),
        (Term(FUNCTIONS["exponential"], LOG_RATIO, q=1.125), True),
        (Term(FUNCTIONS["squared"], LOG_RATIO, q=1.125), False),
        (FUNCTIONS["linear"], True),
    ],
)
def test_what_is_unbounded_below_has_a_witness(f, unbounded):
    bound = profile(f).lower_bound
    assert bound.unbounded == unbounded
    assert not unbounded or bound.witness < -1000


def test_a_bound_that_is_not_reached_is_not_claimed():
    bound = profile(lambda x: -torch.asinh(x)).lower_bound  # falls like -log x, for ever
    assert (bound.value, bound.unbounded) == (None, False)
    towards = profile("logistic").lower_bound
    assert (towards.value, towards.at) == (0, math.inf)


# Terms and losses


def test_a_term_is_profiled_with_its_label():
    seen = profile(Term(logistic, LOG_RATIO, q=0.9))
    assert seen.slope == pytest.approx(-0.4)
    assert seen.kappa == pytest.approx(0.25 / 0.4)
    assert seen.rest == pytest.approx(math.log(9))  # s(x) = 0.9
    assert (seen.population.kind, seen.q) == ("logistic", 0.9)
    assert seen.name == "0.9 logistic(x) + 0.1 logistic(-x)"


def test_what_comes_from_the_record_is_named():
    label = FromRecord(
        "how sure", reads=("preference_probability",), value=lambda record: record.preference_probability
    )
    shift = FromRecord("length gap", reads=("chosen_lengths",), value=lambda record: record.chosen_lengths)
    seen = profile(Term(logistic, LOG_RATIO, q=label, shift=shift))
    assert seen.from_record == (("shift", "length gap"), ("q", "how sure"))
    assert "q (how sure); profiled at q = 1" in verdicts(seen)["from the data"]


def test_a_shift_moves_the_start():
    seen = profile(get_loss("simpo", beta=2.0, gamma_beta_ratio=0.25))
    assert seen.start == -0.5
    assert seen.slope_at_start == pytest.approx(-1 / (1 + math.exp(-0.5)))


def test_a_loss_gives_the_profile_of_the_term_that_ranks_and_of_every_term():
    loss = get_loss("dpo+0.5*sft")
    assert profile(loss).name == "logistic"
    assert [seen.name for seen in profile_terms(loss)] == ["logistic", "linear"]


def test_words_name_the_completion_that_moves():
    assert "makes the chosen completion more likely" in verdicts(profile(Term(logistic, LOG_RATIO, CHOSEN)))["start"]
    assert (
        "makes the chosen completion less likely"
        in verdicts(profile(Term(logistic, LOG_RATIO, NEGATED_CHOSEN)))["start"]
    )


def test_accumulation_is_what_the_loss_declares():
    assert profile(get_loss("dpo")).accumulation.decomposes
    assert "tokens_per_example" in profile(get_loss("sft")).accumulation.reason
    coupled = [loss for loss in map(get_loss, METHODS) if loss.needs.batch and not loss.needs.lists]
    assert coupled
    for loss in coupled:
        seen = profile(loss).accumulation
        assert not seen.decomposes
        assert loss.needs.batch[0] in seen.reason


def test_a_loss_of_lists_is_refused():
    for name in METHODS:
        if get_loss(name).needs.lists:
            with pytest.raises(LossError, match="no scalar function"):
                profile(get_loss(name))


@pytest.mark.parametrize("name", [*FUNCTIONS, "dpo", "robust_dpo", "orpo"])
def test_a_profile_is_plain_data_and_reads_as_text(name):
    seen = profile(name)
    assert json.loads(json.dumps(seen.as_dict(), allow_nan=False))["name"] == seen.name
    assert str(seen).startswith(f"{seen.name}\n  start ")
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen.slope = 1.0


# Functions that cannot be profiled


@pytest.mark.parametrize(
    ("f", "said"),
    [
        (lambda x: x.mean(), "elementwise"),
        (lambda x: torch.exp(-(x - x.mean())), "depends on the other points"),
        (lambda x: x if x > 0 else -x, "torch.where"),
        (lambda x: x.detach() ** 2, "no gradient flows"),
        (lambda x: torch.zeros_like(x), "no gradient flows"),
        (lambda x: x.int(), "floating-point"),
        (lambda x: 3.0, "expected a tensor"),
        (lambda x: x * math.nan, "finite value and slope at x = 0"),
        (lambda x: -torch.log(x), "finite value and slope at x = 0"),
        (lambda x: x.sqrt().abs(), "finite value and slope at x = 0"),
        (lambda x: x * torch.rand_like(x), "randomness"),
        (lambda x, y: x, "failed on a float64 tensor"),
        (lambda x: torch.from_numpy(x.numpy()), "differentiated"),
        (7, "expected a name"),
        ("savge", 'Did you mean "savage"'),
    ],
)
def test_what_cannot_be_profiled_is_said(f, said):
    with pytest.raises(LossError, match=said):
        profile(f)


@pytest.mark.parametrize("radius", [0, -3, math.nan, math.inf, "wide"])
def test_a_radius_that_cannot_be_right_is_refused(radius):
    with pytest.raises(LossError, match="radius"):
        profile("logistic", radius=radius)


# Matched beta


@pytest.mark.parametrize(
    ("name", "near_zero", "at_three_quarters"),
    [
        ("dpo", 0.1, 0.1),
        ("gpo_squared", 0.05, 0.1 * 0.5 / math.log(3)),
        ("gpo_exponential", 0.05, 0.05),
        ("gpo_truncated_quadratic", 0.05, 0.1 * 0.5 / math.log(3)),
        ("gpo_savage", 0.1, 0.1),
        ("hinge", None, 0.1 / math.log(3)),
        ("cdpo", 0.08, 0.1 * math.log(0.7 / 0.3) / math.log(3)),
    ],
)
def test_the_beta_that_matches_dpo_at_a_tenth(name, near_zero, at_three_quarters):
    match = match_beta(get_loss(name), get_loss("dpo", beta=0.1))
    assert match.near_zero == pytest.approx(near_zero)
    assert match.at_strength == pytest.approx(at_three_quarters)
    assert match.unit == "per nat of the whole completion"


def test_hinge_has_no_local_match_and_says_why():
    match = match_beta(get_loss("hinge"), get_loss("dpo", beta=0.1))
    assert match.near_zero_reason == "its curvature is a kink at x = 1 (kappa = 0)"


def test_ipo_is_matched_in_the_papers_tau_and_its_mean_form_says_that_units_are_crossed():
    dpo = get_loss("dpo", beta=0.1)
    for normalize in ("sum", "mean"):
        match = match_beta(get_loss("ipo", normalize=normalize), dpo)
        assert match.near_zero == pytest.approx(0.025)
        assert match.times_tokens == (normalize == "mean")
        assert ("normalize: sum" in match.note) == (normalize == "mean")


def test_a_match_does_not_depend_on_the_beta_that_the_loss_has_and_goes_both_ways():
    there = match_beta(get_loss("ipo", beta=7.0, normalize="sum"), get_loss("dpo", beta=0.3))
    back = match_beta(get_loss("dpo"), get_loss("ipo", beta=there.near_zero, normalize="sum"))
    assert back.near_zero == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("simpo", "no reference"),
        ("sft", "no reference"),
        ("nca_pair", "one by one"),
        ("dpo_shift", "unevenly"),
        ("dpo+sft", "a sum of methods"),
    ],
)
def test_what_has_no_match_says_why(name, reason):
    match = match_beta(get_loss(name), get_loss("dpo"))
    assert (match.near_zero, match.at_strength) == (None, None)
    assert reason in match.near_zero_reason


def test_a_function_that_starts_backwards_has_no_match():
    loss = Loss("mine", (Term(lrml(0.05), LOG_RATIO, PAIR, beta=0.1),), {"beta": 0.1})
    assert "starts backwards" in match_beta(loss, get_loss("dpo")).near_zero_reason
    with pytest.raises(LossError, match="nothing can be matched to it: it starts backwards"):
        match_beta(get_loss("dpo"), loss)


@pytest.mark.parametrize("p", [0.5, 1.0, 0.2])
def test_a_strength_is_above_one_half_and_below_one(p):
    with pytest.raises(LossError, match=r"above 0\.5 and below 1"):
        match_beta(get_loss("dpo"), get_loss("dpo"), p=p)

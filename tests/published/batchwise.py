"""A pair among the others of its batch; carried numbers are those after this batch alone, started from 0."""

import statistics

from published.arithmetic import log_sigmoid, mean


def smoothed(x, label_smoothing):
    return -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def rank(value, values):
    return sorted(values).index(value)


def aot(e, beta, label_smoothing):
    policy = [each.l_w - each.l_l for each in e.batch]
    reference = sorted(each.r_w - each.r_l for each in e.batch)
    own = e.l_w - e.l_l
    return smoothed(beta * (own - reference[rank(own, policy)]), label_smoothing)


def aot_unpaired(e, beta, label_smoothing):
    chosen = [each.l_w - each.r_w for each in e.batch]
    rejected = sorted(each.l_l - each.r_l for each in e.batch)
    own = e.l_w - e.r_w
    return smoothed(beta * (own - rejected[rank(own, chosen)]), label_smoothing)


def rho(e):
    return (e.l_w - e.r_w) - (e.l_l - e.r_l)


def beta_dpo(e, beta, alpha, filtered, decay):
    running = (1 - decay) * mean(rho(each) for each in e.batch)
    nearest = sorted(e.batch, key=lambda each: abs(rho(each) - running))
    last = nearest[max(1, int(len(nearest) * (1 - filtered))) - 1]
    kept = [each for each in e.batch if abs(rho(each) - running) <= abs(rho(last) - running)]
    if not any(each is e for each in kept):
        return 0.0
    dynamic = max(0.001, beta * (1 + alpha * (mean(rho(each) for each in kept) - running)))
    return -log_sigmoid(dynamic * rho(e)) * len(e.batch) / len(kept)


def rho_per_token(e):
    return (e.l_w - e.r_w) / e.n_w - (e.l_l - e.r_l) / e.n_l


def alpha_dpo(e, beta, gamma_beta_ratio, alpha, decay):
    margins = [rho_per_token(each) for each in e.batch]
    center, spread = (1 - decay) * mean(margins), (1 - decay) * statistics.stdev(margins)
    standardised = (rho_per_token(e) - center) / spread if spread else 0.0
    target = gamma_beta_ratio + alpha * standardised
    return -log_sigmoid(beta * (e.l_w / e.n_w - e.l_l / e.n_l - target))


PUBLISHED = {f.__name__: f for f in (aot, aot_unpaired, beta_dpo, alpha_dpo)}
OTHER_VALUES = {"filtered": 0.5, "decay": 0.5}
OVERFLOWS = {}
BACKWARDS = {}
DETACHED = {
    "beta_dpo": "its beta and weights, functions of all margins",
    "alpha_dpo": "its target, a function of the margin",
}

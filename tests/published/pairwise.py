"""A pair against a reference."""

import math

from published.arithmetic import log_sigmoid, soft


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


PUBLISHED = {
    f.__name__: f
    for f in (
        *(dpo, cdpo, robust_dpo, ipo, hinge, gpo, gpo_squared, gpo_exponential, gpo_truncated_quadratic),
        *(gpo_savage,),
    )
}
OTHER_VALUES = {"f": "savage", "label_smoothing": 0.3}
OVERFLOWS = {"gpo_exponential": "e^-x, at x = -1000"}
BACKWARDS = {}

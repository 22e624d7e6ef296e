"""A pair against a reference."""

import math

from published.arithmetic import log_sigmoid, sigmoid, soft


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


def dpo_norm(e, beta):
    return -log_sigmoid(beta * ((e.l_w - e.r_w) / e.n_w - (e.l_l - e.r_l) / e.n_l))


def exo(e, beta, label_smoothing):
    p = sigmoid(beta * (e.l_w - e.r_w - e.l_l + e.r_l))
    return p * math.log(p / (1 - label_smoothing)) + (1 - p) * math.log((1 - p) / label_smoothing)


def discopop(e, beta, tau):
    x = beta * (e.l_w - e.r_w - e.l_l + e.r_l)
    return -(1 - sigmoid(x / tau)) * log_sigmoid(x) + sigmoid(x / tau) * math.exp(-x)


def cell(e, beta):
    x = beta * (e.l_w - e.r_w - e.l_l + e.r_l)
    return 0.5 * math.exp(-x) - 0.5 * log_sigmoid(x)


def padll(e, beta):
    x = beta * (e.l_w - e.r_w - e.l_l + e.r_l)
    return -0.9 * (0.5 if x < 0 else 1) * log_sigmoid(x)


def bpo(e, beta, sba_lambda):
    ratio = math.exp(beta * (e.l_l - e.r_l - e.l_w + e.r_w))  # the paper's R, rejected over chosen
    s = 4
    return ratio ** (sba_lambda + 1) / (s * (sba_lambda + 1)) - ratio**-sba_lambda / (s * sba_lambda)


PUBLISHED = {
    f.__name__: f
    for f in (
        *(dpo, cdpo, robust_dpo, ipo, hinge, gpo, gpo_squared, gpo_exponential, gpo_truncated_quadratic),
        *(gpo_savage, dpo_norm, exo, discopop, cell, padll, bpo),
    )
}
OTHER_VALUES = {"f": "savage", "label_smoothing": 0.3}
OVERFLOWS = {
    "gpo_exponential": "e^-x, at x = -1000",
    "cell": "its half e^-x, at x = -500",
    "bpo": "e^(lambda x) and e^(-(1 + lambda) x), at x = 1000 and -1000",
}
BACKWARDS = {"discopop": "f'(0) = +0.78 at the authors' tau"}

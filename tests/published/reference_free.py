"""Without a reference."""

import math

from published.arithmetic import log_sigmoid


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


PUBLISHED = {f.__name__: f for f in (sft, slic_hf, simpo, cpo, orpo)}
OTHER_VALUES = {}
OVERFLOWS = {}
BACKWARDS = {}

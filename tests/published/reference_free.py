"""Without a reference."""

import math

from published.arithmetic import log_sigmoid, mean


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


def alphapo(e, beta, alpha, gamma):
    reward_w = (1 - math.exp(e.l_w / e.n_w) ** -alpha) / alpha
    reward_l = (1 - math.exp(e.l_l / e.n_l) ** -alpha) / alpha
    return -log_sigmoid(beta * (reward_w - reward_l) - gamma)


def simper(e):
    return -math.exp(e.l_w / e.n_w) + math.exp(e.l_l / e.n_l)


def repo(e, gamma):
    return max(0, gamma - (e.l_w / e.n_w - e.l_l / e.n_l))


def gold_nll(e, normalize):
    return -e.l_g / (mean(each.n_g for each in e.batch) if normalize == "token" else e.n_g)


def tpo(e, beta, alpha, normalize):
    return -log_sigmoid(beta * (e.l_w - e.l_l)) + alpha * gold_nll(e, normalize)


def tpo_l(e, beta, gamma, alpha, normalize):
    return -log_sigmoid(beta * (e.l_w / e.n_w - e.l_l / e.n_l) - gamma) + alpha * gold_nll(e, normalize)


PUBLISHED = {f.__name__: f for f in (sft, slic_hf, simpo, alphapo, simper, repo, cpo, tpo, tpo_l, orpo)}
OTHER_VALUES = {}
OVERFLOWS = {"alphapo": "exp(-alpha l / |y|), at l / |y| = -1e4"}
BACKWARDS = {"repo": "pairs beyond the target margin are left alone"}

"""A pair, held by another divergence than reverse KL: the link is f' of the ratio t = policy / reference."""

import math

from published.arithmetic import log_sigmoid


def ratios(e):
    return math.exp(e.l_w - e.r_w), math.exp(e.l_l - e.r_l)


def f_dpo_forward_kl(e, beta):
    t_w, t_l = ratios(e)
    return -log_sigmoid(beta * (-1 / t_w + 1 / t_l))


def f_dpo_js(e, beta):
    t_w, t_l = ratios(e)
    return -log_sigmoid(beta * (math.log(2 * t_w / (1 + t_w)) - math.log(2 * t_l / (1 + t_l))))


def f_dpo_alpha(e, beta, alpha):
    t_w, t_l = ratios(e)
    return -log_sigmoid(beta * ((1 - t_w**-alpha) / alpha - (1 - t_l**-alpha) / alpha))


def chi_po(e, beta, r_max):
    t_w, t_l = ratios(e)
    x = beta * (t_w + math.log(t_w)) - beta * (t_l + math.log(t_l))
    return -log_sigmoid(min(max(x, -2 * r_max), 2 * r_max))


PUBLISHED = {f.__name__: f for f in (f_dpo_forward_kl, f_dpo_js, f_dpo_alpha, chi_po)}
OTHER_VALUES = {}
OVERFLOWS = {}
BACKWARDS = {}

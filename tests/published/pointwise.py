"""Single completions against a reference."""

from published.arithmetic import log_sigmoid, mean, sigmoid


def kto(e, beta, desirable_weight, undesirable_weight):
    z = max(0, mean(each.m - each.rm for each in e.batch))
    desirable = 1 - sigmoid(beta * (e.l_w - e.r_w - z))
    undesirable = 1 - sigmoid(beta * (z - (e.l_l - e.r_l)))
    return desirable_weight * desirable + undesirable_weight * undesirable


def bco(e, beta):
    rewards = [beta * (each.l_w - each.r_w) for each in e.batch] + [beta * (each.l_l - each.r_l) for each in e.batch]
    delta = mean(rewards)
    return -log_sigmoid(beta * (e.l_w - e.r_w) - delta) - log_sigmoid(-(beta * (e.l_l - e.r_l) - delta))


def bco_pair(e, beta):
    return -log_sigmoid(beta * (e.l_w - e.r_w)) - log_sigmoid(-beta * (e.l_l - e.r_l))


def nca_pair(e, beta):
    r_w, r_l = beta * (e.l_w - e.r_w), beta * (e.l_l - e.r_l)
    return -log_sigmoid(r_w) - 0.5 * log_sigmoid(-r_w) - 0.5 * log_sigmoid(-r_l)


def sppo_hard(e, beta):
    return (e.l_w - e.r_w - 0.5 / beta) ** 2 + (e.l_l - e.r_l + 0.5 / beta) ** 2


def sppo(e, beta):
    target = (e.p - 0.5) / beta
    return (e.l_w - e.r_w - target) ** 2 + (e.l_l - e.r_l + target) ** 2


def dro(e, beta):
    chosen = e.s_w - e.v - beta * (e.l_w - e.r_w)
    rejected = e.s_l - e.v - beta * (e.l_l - e.r_l)
    return 0.5 * chosen**2 + 0.5 * rejected**2


def a_star_po(e, beta):
    chosen = beta * (e.l_w - e.r_w) - (e.s_w - e.v)
    rejected = beta * (e.l_l - e.r_l) - (e.s_l - e.v)
    return chosen**2 + rejected**2


def apo_zero(e, beta):
    return 1 - sigmoid(beta * (e.l_w - e.r_w)) + sigmoid(beta * (e.l_l - e.r_l))


def apo_down(e, beta):
    return sigmoid(beta * (e.l_w - e.r_w)) + 1 - sigmoid(beta * (e.l_w - e.r_w - e.l_l + e.r_l))


PUBLISHED = {f.__name__: f for f in (kto, bco, bco_pair, nca_pair, sppo, sppo_hard, apo_zero, apo_down, dro, a_star_po)}
OTHER_VALUES = {}
OVERFLOWS = {}
BACKWARDS = {}
DETACHED = {"bco": "its anchor, a mean of log-ratios"}

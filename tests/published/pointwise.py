"""Single completions against a reference."""

from published.arithmetic import log_sigmoid, sigmoid


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


PUBLISHED = {f.__name__: f for f in (bco_pair, nca_pair, sppo_hard, apo_zero, apo_down)}
OTHER_VALUES = {}
OVERFLOWS = {}
BACKWARDS = {}

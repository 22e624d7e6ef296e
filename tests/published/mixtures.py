"""Published sums."""

from published.arithmetic import log_sigmoid


def irpo(e, beta, alpha):
    return -log_sigmoid(beta * (e.l_w - e.r_w - e.l_l + e.r_l)) - alpha * e.l_w / e.n_w


def mpo(e, beta, preference_weight, quality_weight, generation_weight):
    preference = -log_sigmoid(beta * (e.l_w - e.r_w - e.l_l + e.r_l))
    quality = -log_sigmoid(beta * (e.l_w - e.r_w)) - log_sigmoid(-beta * (e.l_l - e.r_l))
    generation = -e.l_w / e.n_w
    return preference_weight * preference + quality_weight * quality + generation_weight * generation


PUBLISHED = {f.__name__: f for f in (irpo, mpo)}
OTHER_VALUES = {}
OVERFLOWS = {}
BACKWARDS = {}

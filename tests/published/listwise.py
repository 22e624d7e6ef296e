"""Losses of a whole list."""

import math

from published.arithmetic import log_sigmoid


def softmax(values):
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def plackett_luce_dpo(e, beta):
    ranked = sorted(e.completions, key=lambda c: c.s, reverse=True)
    x = [beta * (c.l - c.r) for c in ranked]
    return -sum(math.log(softmax(x[k:])[0]) for k in range(len(x)))


def infonca(e, beta, alpha):
    targets = softmax([c.s / alpha for c in e.completions])
    policy = softmax([beta * (c.l - c.r) for c in e.completions])
    return -sum(t * math.log(p) for t, p in zip(targets, policy, strict=True))


def nca_list(e, beta, alpha):
    targets = softmax([c.s / alpha for c in e.completions])
    x = [beta * (c.l - c.r) for c in e.completions]
    up = sum(t * log_sigmoid(value) for t, value in zip(targets, x, strict=True))
    return -up - sum(log_sigmoid(-value) for value in x) / len(x)


def rrhf(e, rrhf_weight, normalize):
    ranking = sum(max(0, i.l / i.n - j.l / j.n) for i in e.completions for j in e.completions if i.s < j.s)
    best = max(e.completions, key=lambda c: c.s)
    return rrhf_weight * ranking - (best.l if normalize == "sum" else best.l / best.n)


PUBLISHED = {f.__name__: f for f in (plackett_luce_dpo, infonca, nca_list, rrhf)}
OTHER_VALUES = {"infonca.alpha": 0.3, "nca_list.alpha": 0.3}
OVERFLOWS = {}
BACKWARDS = {}

"""Losses that look inside a completion."""

import math

from published.arithmetic import log_sigmoid


def margin(e, weights_w, weights_l):
    u_w = sum(a * (t - r) for a, t, r in zip(weights_w, e.t_w, e.tr_w, strict=True))
    u_l = sum(a * (t - r) for a, t, r in zip(weights_l, e.t_l, e.tr_l, strict=True))
    return u_w - u_l


def ld_dpo(e, beta, alpha):
    shared = min(e.n_w, e.n_l)
    weights_w, weights_l = ([1] * shared + [alpha] * (n - shared) for n in (e.n_w, e.n_l))
    return -log_sigmoid(beta * margin(e, weights_w, weights_l))


def sampo(e, beta, seed):
    weights_w, weights_l = (sampled(seed, 0, *lengths) for lengths in ((e.n_w, e.n_l), (e.n_l, e.n_w)))
    return -log_sigmoid(beta * margin(e, weights_w, weights_l))


def sampled(seed, draw, own, other):
    """The `other` positions of the smallest keys, keys being chained 32-bit hashes; that they are a fair sample
    is tested elsewhere."""
    keys = [chained(0, seed, draw, own, other, position) for position in range(own)]
    kept = sorted(range(own), key=lambda position: (keys[position], position))[:other]
    return [int(position in kept) for position in range(own)]


def chained(state, *parts):
    for part in parts:
        state = (state + part + 2654435769) % 2**32
        for shift, factor in ((16, 2146121005), (15, 2221713035)):
            state = (state ^ (state >> shift)) * factor % 2**32
        state ^= state >> 16
    return state


def d2po(e, beta, gamma):
    weights_w, weights_l = ([gamma**t for t in range(1, n + 1)] for n in (e.n_w, e.n_l))
    return -log_sigmoid(beta * margin(e, weights_w, weights_l))


def wpo(e, beta):
    w_w, w_l = math.exp(e.a_w / e.n_w), math.exp(e.a_l / e.n_l)
    return min(1, w_w * w_l) * -log_sigmoid(beta * (e.l_w - e.r_w - e.l_l + e.r_l))


def tdpo1(e, beta):
    value_w, value_l = e.l_w - e.r_w + e.k_w, e.l_l - e.r_l + e.k_l
    return -log_sigmoid(beta * (value_w - value_l))


def tdpo2(e, beta, alpha):
    return -log_sigmoid(beta * (e.l_w - e.r_w - e.l_l + e.r_l) - beta * alpha * (e.k_l - e.k_w))


PUBLISHED = {f.__name__: f for f in (ld_dpo, sampo, d2po, wpo, tdpo1, tdpo2)}
OTHER_VALUES = {"d2po.gamma": 0.9, "sampo.seed": 5}
OVERFLOWS = {}
BACKWARDS = {}
DETACHED = {"tdpo2": "the chosen completion's sequential KL; test_tokenwise has its gradient"}

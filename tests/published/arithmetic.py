"""Scalar functions of the formulas, from the standard library."""

import math


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x)) if x > -30 else x


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def soft(f, x, e, soft_labels):
    return e.p * f(x) + (1 - e.p) * f(-x) if soft_labels else f(x)


def mean(values):
    values = list(values)
    return sum(values) / len(values)

"""A pair with a margin of its own."""

import math

from published.arithmetic import log_sigmoid, sigmoid


def rho(e):
    return (e.l_w - e.r_w) - (e.l_l - e.r_l)


def odpo(e, beta, alpha):
    return -log_sigmoid(beta * rho(e) - alpha * math.log(e.s_w - e.s_l))


def modpo(e, beta, w):
    chosen = (beta * (e.l_w - e.r_w) - (1 - w) * e.s_w) / w
    rejected = (beta * (e.l_l - e.r_l) - (1 - w) * e.s_l) / w
    return -log_sigmoid(chosen - rejected)


def r_dpo(e, beta, alpha):
    return -log_sigmoid(beta * rho(e) + alpha * (e.n_w - e.n_l))


def dpop(e, beta, lambda_coef):
    return -log_sigmoid(beta * (rho(e) - lambda_coef * max(0, e.r_w - e.l_w)))


def dpo_shift(e, beta, lambda_coef):
    return -log_sigmoid(beta * (e.l_w - e.r_w) - lambda_coef * beta * (e.l_l - e.r_l))


def cal_dpo(e, beta):
    target = 1 / (2 * beta)
    return -log_sigmoid(rho(e)) + (e.l_w - e.r_w - target) ** 2 + (e.l_l - e.r_l + target) ** 2


def reward_distillation(e, beta, eta):
    return (beta * rho(e) - eta * (e.s_w - e.s_l)) ** 2


def pessimistic_distillation(e, beta, eta, gamma):
    forward_kl = ((e.r_w - e.l_w) + (e.r_l - e.l_l)) / 2
    return reward_distillation(e, beta, eta) + gamma * forward_kl


def bernoulli_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def rpo_bwd_kl(e, beta, eta):
    return bernoulli_kl(sigmoid(eta * (e.s_w - e.s_l)), sigmoid(beta * rho(e)))


def rpo_fwd_kl(e, beta, eta):
    return bernoulli_kl(sigmoid(beta * rho(e)), sigmoid(eta * (e.s_w - e.s_l)))


PUBLISHED = {
    f.__name__: f
    for f in (
        *(odpo, modpo, r_dpo, dpop, dpo_shift, cal_dpo, reward_distillation, pessimistic_distillation),
        *(rpo_bwd_kl, rpo_fwd_kl),
    )
}
OTHER_VALUES = {"dpo_shift.lambda_coef": 0.5}
OVERFLOWS = {}
BACKWARDS = {}

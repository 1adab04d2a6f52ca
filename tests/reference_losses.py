"""The four losses from eq. 1 and 2, one element at a time with the standard library; the gradients in closed form."""

import math
from decimal import Decimal, localcontext


def constants(loss, n_positive, n_negative, alpha=0.25, beta=0.9999, scheme="paper"):
    """(w+, w-) of one class as printed, without the focusing factors."""
    if loss == "bce":
        return 1.0, 1.0
    if loss == "wbce":
        if scheme == "pos_weight":
            return n_negative / n_positive, 1.0
        return n_negative / (n_positive + n_negative), n_positive / (n_positive + n_negative)
    if loss == "focal":
        return alpha, 1 - alpha
    return inverse_effective_number(n_positive, beta), inverse_effective_number(n_negative, beta)


def batch_constants(labels, n_positive, n_negative, scheme):
    """WBCE's (w+, w-) of one class from its labels in a batch; where these are all alike, from the training set's
    smallest N-/N+."""
    ones = sum(labels)
    zeros = len(labels) - ones
    if ones == 0 or zeros == 0:
        ratios = [zero / one for one, zero in zip(n_positive, n_negative) if one and zero]
        ratio = min(ratios) if ratios else 1.0
        return (ratio, 1.0) if scheme == "pos_weight" else (ratio / (1 + ratio), 1 / (1 + ratio))
    return constants("wbce", ones, zeros, scheme=scheme)


def inverse_effective_number(n, beta):
    """(1 - beta) / (1 - beta^n) with 60 digits; beta is the exact value of its float."""
    with localcontext() as context:
        context.prec = 60
        base = Decimal(beta)
        return float((1 - base) / (1 - base**n))


def element(z, y, positive, negative, gamma):
    """-[ w+ y log p + w- (1 - y) log(1 - p) ] with w+ = positive (1 - p)^gamma and w- = negative p^gamma."""
    p = 1 / (1 + math.exp(-z))
    q = 1 / (1 + math.exp(z))
    return -(positive * q**gamma * y * math.log(p) + negative * p**gamma * (1 - y) * math.log(q))


def gradient(z, y, positive, negative, gamma):
    """d element / dz, the gradient also flowing through the focusing factors; linear in y."""
    p = 1 / (1 + math.exp(-z))
    q = 1 / (1 + math.exp(z))
    of_positive = positive * (gamma * p * q**gamma * math.log(p) - q ** (gamma + 1))
    of_negative = negative * (-gamma * q * p**gamma * math.log(q) + p ** (gamma + 1))
    return y * of_positive + (1 - y) * of_negative

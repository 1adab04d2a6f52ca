"""Slow references for lib/analysis/metrics.py, one film at a time."""

import math


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def brier(logits, targets) -> float:
    return mean((sigmoid(z) - t) ** 2 for z, t in zip(logits, targets, strict=True))


def calibration_error(logits, targets, n_bins) -> float:
    """Sum over bins of (share of films in the bin) x |mean probability - share of positives|."""
    bins = [[] for _ in range(n_bins)]
    for z, t in zip(logits, targets, strict=True):
        p = sigmoid(z)
        bins[max(b for b in range(n_bins) if p >= b / n_bins)].append((p, t))
    return math.fsum(len(b) / len(logits) * abs(mean(p for p, _ in b) - mean(t for _, t in b)) for b in bins if b)

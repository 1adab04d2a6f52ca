"""Slow references for lib/analysis/statistics.py, written from the definitions: pairs, steps and films really
repeated."""

import numpy as np


def auroc(scores, targets) -> float:
    """Share of (positive, negative) pairs in the right order; a tie counts one half."""
    positives = [score for score, target in zip(scores, targets, strict=True) if target]
    negatives = [score for score, target in zip(scores, targets, strict=True) if not target]
    if not positives or not negatives:
        return np.nan
    right = 0.0
    for a in positives:
        for b in negatives:
            right += 1.0 if a > b else 0.5 if a == b else 0.0
    return right / (len(positives) * len(negatives))


def average_precision(scores, targets) -> float:
    """Sum over the distinct thresholds, from the highest, of (recall step) x precision."""
    n_positive = sum(bool(target) for target in targets)
    if n_positive in (0, len(targets)):
        return np.nan
    total = recall = 0.0
    for threshold in sorted(set(scores), reverse=True):
        selected = [bool(target) for score, target in zip(scores, targets, strict=True) if score >= threshold]
        hits = sum(selected)
        total += (hits / n_positive - recall) * hits / len(selected)
        recall = hits / n_positive
    return total


def resampled_films(patients, n_replicates, seed) -> list[list[int]]:
    """Film indices of each replicate: all films of each drawn patient, once for every time it was drawn."""
    ids = sorted(set(patients))
    generator = np.random.default_rng(seed)
    replicates = []
    for _ in range(n_replicates):
        films = []
        for drawn in generator.integers(len(ids), size=len(ids)):
            films += [i for i, patient in enumerate(patients) if patient == ids[drawn]]
        replicates.append(films)
    return replicates


def percentile_interval(values) -> tuple[float, float]:
    """2.5 % and 97.5 % points, linear between order statistics, of the values that are not NaN."""
    ordered = sorted(value for value in values if not np.isnan(value))
    if not ordered:
        return np.nan, np.nan
    points = []
    for share in (0.025, 0.975):
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        points.append(ordered[below] + (position - below) * (ordered[above] - ordered[below]))
    return points[0], points[1]

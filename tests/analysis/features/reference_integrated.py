"""Integrated feature analysis from the formulas: float64, loops, one film, class and feature at a time."""

import math

import numpy as np

from tests.analysis import reference_cam


def percentile(values, percent):
    ordered = sorted(float(value) for value in np.ravel(values))
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def bilinear(image, size):
    """(h, w) to (size, size), pixel centres at halves, edges repeated."""
    height, width = image.shape
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y = min(max((i + 0.5) * height / size - 0.5, 0), height - 1)
            x = min(max((j + 0.5) * width / size - 0.5, 0), width - 1)
            top, left = int(y), int(x)
            for row, a in ((top, 1 - (y - top)), (min(top + 1, height - 1), y - top)):
                for column, b in ((left, 1 - (x - left)), (min(left + 1, width - 1), x - left)):
                    out[i, j] += a * b * image[row, column]
    return out


def printed_scale(p10, p90):
    """Alpha and beta as the paper prints them, its misprinted denominator read as P10 - P90."""
    alpha = (math.atanh(0.9) - math.atanh(0.1)) / (p90 - p10)
    return alpha, (p90 * math.atanh(0.9) - p10 * math.atanh(0.1)) / (p10 - p90)


def contribution(maps, weights, bias, c, f, method):
    """Sum of the weighted feature f of one film (F, h, w): the map of a head that has this feature only."""
    head = reference_cam.pooled_head(weights[:, f : f + 1], bias)
    return reference_cam.raw_map(maps[f : f + 1], head, c, method).sum()


def importance(maps, weights, bias, labels, method):
    """Equations 3 and 4, (F, C) each; labels (N, C) of 0 and 1."""
    n_classes, n_features = weights.shape
    every, own = np.zeros((2, n_features, n_classes))
    for f in range(n_features):
        for c in range(n_classes):
            terms = [contribution(film, weights, bias, c, f, method) for film in maps]
            chosen = [term for term, row in zip(terms, labels) if row[c] == 1]
            every[f, c] = sum(terms) / len(terms)
            own[f, c] = sum(chosen) / len(chosen) if chosen else math.nan
    return every, own


def top(column, ratio):
    """Principal features of a column as a set."""
    k = max(1, math.ceil(round(ratio * len(column), 9)))
    return set(sorted(range(len(column)), key=lambda f: (-column[f], f))[:k])


def henze_zirkler(x, y):
    n = len(x)
    data = np.stack([x, y])
    inverse = np.linalg.inv(np.cov(data, bias=True))
    centre = data.mean(axis=1)
    b = (1.25 * n) ** (1 / 6) / math.sqrt(2)
    pairs = mean = 0.0
    for j in range(n):
        away = data[:, j] - centre
        mean += math.exp(-(b**2) / (2 * (1 + b**2)) * (away @ inverse @ away))
        for k in range(n):
            away = data[:, j] - data[:, k]
            pairs += math.exp(-(b**2) / 2 * (away @ inverse @ away))
    return pairs / n - 2 * mean / (1 + b**2) + n / (1 + 2 * b**2)


def increase_and_drop(original, masked):
    rises = sum(o > y for y, o in zip(original, masked))
    drops = [max(0.0, y - o) / y for y, o in zip(original, masked) if y > 0]
    return 100 * rises / len(original), 100 * sum(drops) / len(drops)

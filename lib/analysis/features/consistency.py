"""Do class activation maps follow the logits (Li et al., sec. III-B, Tables I and III)? The correlation of the sum of a
film's map with its logit."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy
from numpy.typing import ArrayLike
from torch import Tensor

from lib.analysis.cam import normalise, resize
from lib.analysis.features.scale import s_cam
from lib.analysis.features.survey import SLOW, View, evenly, film_cams, survey, with_principal
from lib.analysis.statistics import patient_replicates

SIGNIFICANCE = 0.05
_BLOCK = 2**21  # float64 values of one intermediate array (16 MiB)
_REPLICATES = 2**20  # weights of replicates at a time, float64 (8 MiB)


def class_totals(
    raw: Tensor,
    alpha: ArrayLike,
    beta: ArrayLike,
    size: int | tuple[int, int],
    *,
    order: str = "resize_first",
    kind: str = "tanh",
) -> dict[str, np.ndarray]:
    """Sum of the class activations of each film and class, at the size of the film, in float64.

    Parameters
    ----------
    raw : float (B, C, h, w)
        Signed maps.
    alpha, beta : float or float (C,)
        Of `scale.tanh_scale` (or `linear_scale`), with `order` and `kind` as for `scale.s_cam`.
    size : int or (int, int)
        Of the film.

    Returns
    -------
    dict of float64 (B, C)
        'raw': the map itself, which is what the authors' code sums after it has undone the scale (A43): Table I.
        'scaled': the S-CAM. 'individual': the usual CAM, rectified, min-max by film, then resampled.
    """
    alpha, beta = (np.broadcast_to(np.asarray(value, dtype=np.float64), raw.shape[1]).copy() for value in (alpha, beta))
    totals = {name: np.empty(tuple(raw.shape[:2])) for name in ("raw", "scaled", "individual")}
    for c in range(raw.shape[1]):  # one class at a time: all of them at film size may not fit
        maps = raw[:, c : c + 1]
        for name, film in (
            ("raw", resize(maps, size)),
            ("scaled", s_cam(maps, alpha[c : c + 1], beta[c : c + 1], size, order=order, kind=kind)),
            ("individual", resize(normalise(maps), size)),
        ):
            totals[name][:, c] = film.flatten(1).cpu().double().sum(dim=1).numpy()
    return totals


class Consistency(NamedTuple):
    """How far two measures of the same films go together.

    Attributes
    ----------
    coefficient : float
        The paper's: `pearson` if the pair is bivariate normal, else `spearman`.
    used : str
        'pearson', 'spearman', or '' where neither exists.
    pearson, spearman : float
        Both, always.
    statistic, p : float
        Of the Henze-Zirkler test.
    normal : bool
        Not rejected at 0.05.
    n : int
    note : str
        Why something is NaN, else ''.
    """

    coefficient: float
    used: str
    pearson: float
    spearman: float
    statistic: float
    p: float
    normal: bool
    n: int
    note: str


def consistency(totals: ArrayLike, logits: ArrayLike) -> Consistency:
    """Correlation of the sums of the class activations with the logits of the selected class (Li et al., sec. III-B,
    Tables I and III).

    Parameters
    ----------
    totals, logits : float (N,)
        One value a film each, e.g. a column of `class_totals`.

    Raises
    ------
    ValueError
        Lengths that differ, or NaN or infinite values.
    """
    pair = [np.asarray(values, dtype=np.float64) for values in (totals, logits)]
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape:
        shapes = f"totals have shape {pair[0].shape} and logits {pair[1].shape}"
        raise ValueError(f"{shapes}: one value a film is needed of both")
    n = len(pair[0])
    for name, values in zip(("totals", "logits"), pair):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: NaN or infinite value of film {int(np.argmin(np.isfinite(values)))}")
    constant = [name for name, values in zip(("totals", "logits"), pair) if n and _constant(values)]
    if n < 3 or constant:
        note = f"{n} films are too few" if n < 3 else f"constant {' and '.join(constant)}"
        return Consistency(np.nan, "", np.nan, np.nan, np.nan, np.nan, False, n, note)
    pearson = float(np.clip(np.mean(_standard(pair[0]) * _standard(pair[1])), -1, 1))
    ranks = [_standard(scipy.stats.rankdata(values)) for values in pair]
    spearman = float(np.clip(np.mean(ranks[0] * ranks[1]), -1, 1))
    statistic, p = henze_zirkler(*pair)
    normal = p > SIGNIFICANCE
    used = "pearson" if normal else "spearman"
    note = "one is a linear function of the other: no bivariate density" if statistic == 4 * n else ""
    return Consistency(pearson if normal else spearman, used, pearson, spearman, statistic, p, normal, n, note)


def henze_zirkler(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Test of bivariate normality (Henze & Zirkler, 1990): its statistic, and p from the log-normal approximation of
    its distribution.

    With ``d = 2``, ``b = (n (2 d + 1) / 4)^(1 / (d + 4)) / sqrt 2`` and the Mahalanobis distances D of the films to
    each other and to the mean (covariance with divisor n), ``HZ = sum_jk exp(-b^2 D_jk / 2) / n - 2 sum_j exp(-b^2 D_j
    / (2 (1 + b^2))) / (1 + b^2) + n / (1 + 2 b^2)``.

    Parameters
    ----------
    x, y : float (N,)

    Returns
    -------
    statistic, p : float
        NaN for fewer than three films or a constant. ``4 n`` and 0, as the authors define it, where x and y are
        linearly dependent (1 - r^2 <= 1e-12). The sum over pairs goes in blocks or, for many films, through its Fourier
        transform (equal to 1e-12).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(x)
    if n < 3 or _constant(x) or _constant(y):
        return np.nan, np.nan
    x, y = _standard(x), _standard(y)
    r = np.mean(x * y)
    if 1 - r**2 <= 1e-12:
        return 4.0 * n, 0.0
    points = np.stack([x, (y - r * x) / np.sqrt(1 - r**2)])  # distances between them are Mahalanobis distances
    b2 = (1.25 * n) ** (1 / 3) / 2
    own = np.exp(-b2 / (2 * (1 + b2)) * (points**2).sum(axis=0)).sum()
    statistic = _gauss_sum(points, b2) / n - 2 * own / (1 + b2) + n / (1 + 2 * b2)

    # Mean and variance of the statistic under normality, d = 2.
    a, w = 1 + 2 * b2, (1 + b2) * (1 + 3 * b2)
    mean = 1 - (1 + 2 * b2 / a + 8 * b2**2 / (2 * a**2)) / a
    variance = (
        2 / (1 + 4 * b2)
        + 2 / a**2 * (1 + 4 * b2**2 / a**2 + 24 * b2**4 / (4 * a**4))
        - 4 / w * (1 + 6 * b2**2 / (2 * w) + 8 * b2**4 / (2 * w**2))
    )
    ratio = 1 + variance / mean**2
    p = scipy.stats.lognorm.sf(statistic, np.sqrt(np.log(ratio)), scale=mean / np.sqrt(ratio))
    return float(statistic), float(p)


def _gauss_sum(points: np.ndarray, b2: float) -> float:
    """``sum_jk exp(-b2 |p_j - p_k|^2 / 2)`` over points (2, N), the terms j = k included."""
    n, b = points.shape[1], np.sqrt(b2)
    # The sum is the integral of |sum_j exp(i t p_j)|^2 against a normal density of variance b2. A trapezoidal sum over
    # t is exact but for the images of the kernel at a distance of 2 pi / step, and the tail of the density: with 8.5 b
    # on either side both are below 1e-15.
    step = 2 * np.pi / (np.ptp(points, axis=1) + 8.5 / b)
    half = np.ceil(8.5 * b / step).astype(int) + 1
    if half.prod() < 6 * n:  # cheaper than n^2 / 2 exponentials
        grid = [step[axis] * np.arange(half[axis]) for axis in (0, 1)]
        waves, width = np.zeros(2 * half), max(1, _BLOCK // int(2 * half.sum()))
        for start in range(0, n, width):
            angle = [np.outer(t, p[start : start + width]) for t, p in zip(grid, points)]
            first, second = (np.concatenate([np.cos(a), np.sin(a)]) for a in angle)
            waves += first @ second.T  # the four products of cosines and sines hold all signs of t
        power = (waves**2).reshape(2, half[0], 2, half[1]).sum(axis=(0, 2))
        density = [step[axis] / (b * np.sqrt(2 * np.pi)) * np.exp(-(t**2) / (2 * b2)) for axis, t in enumerate(grid)]
        for axis in (0, 1):
            density[axis][1:] *= 2
        return float(density[0] @ power @ density[1])
    total, width = 0.0, max(1, _BLOCK // n)
    for start in range(0, n, width):
        block, rest = points[:, start : start + width], points[:, start:]  # each pair once, but both ways in a block
        distance = np.subtract.outer(block[0], rest[0]) ** 2
        distance += np.subtract.outer(block[1], rest[1]) ** 2
        kernel = np.exp(-b2 / 2 * distance, out=distance)
        total += 2 * kernel.sum() - kernel[:, : block.shape[1]].sum()
    return float(total)


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= 8 * np.finfo(np.float64).eps * np.abs(values).max())


def _standard(values: np.ndarray) -> np.ndarray:
    away = values / np.abs(values).max()  # squares of very large or small values would leave the range of float64
    away = away - away.mean()
    return away / np.sqrt(np.mean(away**2))


def activation_sums(
    view: View,
    rows: np.ndarray,
    selected: int,
    scales: Mapping[str, tuple[np.ndarray, np.ndarray]],
    size: int,
    *,
    kind: str = "tanh",
    features: Mapping[str, np.ndarray] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Sum of the class activations of each film for one class, by method and scale, with the class's logit (sec.
    III-B).

    Parameters
    ----------
    selected : int
        Output whose maps are summed.
    scales : mapping of method to (alpha, beta)
        Of `scale.common_scale`; the methods to look at.
    features : mapping of method to 0/1 (F,), optional
        Besides the maps of all features those of these alone, on the same scale.

    Returns
    -------
    DataFrame
        A row per film, method, features ('all', 'principal') and scale ('individual', 'common_raw', 'common_tanh'):
        row, method, features, scale, activation (NaN on a scale of NaN), logit.
    """
    parts, options = [], {"masks": with_principal(features), "classes": [selected], "progress": progress}
    for batch, output, cams in film_cams(view, rows, list(scales), **options):
        logit = output.logits[:, selected].cpu().numpy()
        for (method, label), found in cams.items():
            alpha, beta = (values[selected] for values in scales[method])
            sums = class_totals(found.maps, alpha, beta, size, kind=kind)
            for scale, name in (("individual", "individual"), ("raw", "common_raw"), ("scaled", "common_tanh")):
                names = {"row": np.asarray(batch.rows), "method": method, "features": label, "scale": name}
                parts.append(pd.DataFrame({**names, "activation": sums[scale][:, 0], "logit": logit}))
    return pd.concat(parts, ignore_index=True)


def with_perturbation(
    sums: pd.DataFrame,
    view: View,
    train_rows: np.ndarray,
    test_rows: np.ndarray,
    selected: int,
    n_films: int,
    *,
    size: int,
    kind: str,
    bounds: str,
) -> pd.DataFrame:
    """`sums` and, below, the `activation_sums` of `survey.SLOW`, the methods that perturb the film, on `n_films` test
    films, with a common scale from as many training films, each spread evenly, and a progress bar. 0: `sums` alone."""
    if not n_films:
        return sums
    train, test = (evenly(rows, n_films) for rows in (train_rows, test_rows))
    scales = survey(view, train, SLOW, size=size, progress=True).scales(kind, bounds)
    slow = activation_sums(view, test, selected, scales, size, kind=kind, progress=True)
    return pd.concat([sums, slow], ignore_index=True)


def consistency_table(
    sums: pd.DataFrame, patients: Mapping[int, str], n_replicates: int, seed: int = 0
) -> pd.DataFrame:
    """Correlation of activation sums with logits, a row per method, features and scale, with the interval over patients
    of the chosen one.

    `sums` : of `activation_sums`. `patients` : of each film row. Columns: method, features, scale, pearson, spearman,
    normal, chosen ('pearson' or 'spearman', by the rule of `consistency`; '' where neither exists), n,
    ci_low, ci_high (95 %; NaN for fewer than two patients), note.
    """
    rows = []
    for key, part in sums.groupby(["method", "features", "scale"], sort=False):
        if part["activation"].isna().all():
            found = Consistency(np.nan, "", *[np.nan] * 4, False, len(part), "the class has no common scale")
        else:
            found = consistency(part["activation"], part["logit"])
        bounds = _interval(part, patients, found.used, n_replicates, seed)
        rows.append((*key, found.pearson, found.spearman, found.normal, found.used, found.n, *bounds, found.note))
    names = "method features scale pearson spearman normal chosen n ci_low ci_high note".split()
    return pd.DataFrame(rows, columns=names)


def _interval(
    part: pd.DataFrame, patients: Mapping[int, str], used: str, n_replicates: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of the correlation `used`; ranks are taken anew in every replicate, a film drawn twice
    counting as two."""
    draws = patient_replicates([patients[row] for row in part["row"]], n_replicates, seed)
    if not n_replicates or not used or draws.counts.shape[1] < 2:
        return np.nan, np.nan
    values = [part[name].to_numpy(np.float64) for name in ("activation", "logit")]
    groups = [np.unique(value, return_inverse=True)[1] for value in values]
    starts = [np.searchsorted(np.sort(group), np.arange(group.max() + 1)) for group in groups]
    values = [(value - value.mean()) / value.std() for value in values]
    drawn, step = [], max(1, _REPLICATES // len(part))
    for start in range(0, n_replicates, step):
        weights = draws.counts[start : start + step, draws.patient].astype(np.float64)
        pair = values
        if used == "spearman":
            orders = [np.argsort(group, kind="stable") for group in groups]
            shares = [np.add.reduceat(weights[:, order], first, axis=1) for order, first in zip(orders, starts)]
            pair = [(share.cumsum(1) - share / 2)[:, group] for share, group in zip(shares, groups)]
        drawn.append(_weighted_correlation(*pair, weights))
    drawn = np.concatenate(drawn)
    drawn = drawn[np.isfinite(drawn)]
    return tuple(np.percentile(drawn, [2.5, 97.5])) if len(drawn) else (np.nan, np.nan)


def replicate_correlations(x: ArrayLike, y: ArrayLike, weights: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """Pearson correlation of x and y (N,) under each weighting of patients (R, P), float64 (R,); NaN where one of them
    is constant. `patient` : int (N,), of each film, see `statistics.Replicates`."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    step = max(1, _REPLICATES // len(x))
    blocks = (weights[start : start + step, patient] for start in range(0, len(weights), step))
    return np.concatenate([_weighted_correlation(x, y, block.astype(np.float64)) for block in blocks])


def _weighted_correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation under each row of weights (R, N), of x and y (N,) or (R, N); NaN where one of them is
    constant."""
    total = weights.sum(1, keepdims=True)
    away = [value - (weights * value).sum(1, keepdims=True) / total for value in (x, y)]
    squares = [(weights * value**2).sum(1) for value in away]
    size = [(weights * value**2).sum(1) for value in (x, y)]
    constant = np.logical_or(*(square <= 1e-24 * whole for square, whole in zip(squares, size)))
    both = (weights * away[0] * away[1]).sum(1)
    return np.where(constant, np.nan, both / np.sqrt(np.where(constant, 1, squares[0] * squares[1])))

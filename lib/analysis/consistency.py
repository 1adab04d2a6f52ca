"""Evidence for class activation maps and selected features (Li et al., sec. III): do maps follow the logits, do the features suffice?

Consistency is the correlation of the sum of a film's map with its logit (`class_totals`, `consistency`). A forward pass with some features only
gives the accuracy they keep (`masked_logits`, `masked_layer`), and one of masked films the average increase and drop (`increase_and_drop`).
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor, nn

from lib.analysis.activations import s_cam
from lib.analysis.cam import feature_mask, normalise, resize

SIGNIFICANCE = 0.05
_BLOCK = 2**21                                  # float64 values of one intermediate array (16 MiB)


# --- consistency ----------------------------------------------------------------------------------------------------------------------


def class_totals(raw: Tensor, alpha: ArrayLike, beta: ArrayLike, size: int | tuple[int, int], *, order: str = "resize_first",
                 kind: str = "tanh") -> dict[str, np.ndarray]:
    """Sum of the class activations of each film and class, at the size of the film, in float64.

    Parameters
    ----------
    raw : float (B, C, h, w)
        Signed maps.
    alpha, beta : float or float (C,)
        Of `activations.tanh_scale` (or `linear_scale`), with `order` and `kind` as for `activations.s_cam`.
    size : int or (int, int)
        Of the film.

    Returns
    -------
    dict of float64 (B, C)
        'raw': the map itself, which is what the authors' code sums after it has undone the scale (A43): Table I. 'scaled': the S-CAM.
        'individual': the usual CAM, rectified, min-max by film, then resampled.
    """
    alpha, beta = (np.broadcast_to(np.asarray(value, dtype=np.float64), raw.shape[1]).copy() for value in (alpha, beta))
    totals = {name: np.empty(tuple(raw.shape[:2])) for name in ("raw", "scaled", "individual")}
    for c in range(raw.shape[1]):                               # one class at a time: all of them at film size may not fit
        maps = raw[:, c:c + 1]
        for name, film in (("raw", resize(maps, size)), ("scaled", s_cam(maps, alpha[c:c + 1], beta[c:c + 1], size, order=order, kind=kind)),
                           ("individual", resize(normalise(maps), size))):
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
    """Correlation of the sums of the class activations with the logits of the selected class (Li et al., sec. III-B, Tables I and III).

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
        raise ValueError(f"totals have shape {pair[0].shape} and logits {pair[1].shape}: one value a film is needed of both")
    n = len(pair[0])
    for name, values in zip(("totals", "logits"), pair):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: NaN or infinite value of film {int(np.argmin(np.isfinite(values)))}")
    constant = [name for name, values in zip(("totals", "logits"), pair) if n and _constant(values)]
    if n < 3 or constant:
        note = f"{n} films are too few" if n < 3 else f"constant {' and '.join(constant)}"
        return Consistency(np.nan, "", np.nan, np.nan, np.nan, np.nan, False, n, note)
    pearson = float(np.clip(np.mean(_standard(pair[0]) * _standard(pair[1])), -1, 1))
    ranks = [_standard(stats.rankdata(values)) for values in pair]
    spearman = float(np.clip(np.mean(ranks[0] * ranks[1]), -1, 1))
    statistic, p = henze_zirkler(*pair)
    normal = p > SIGNIFICANCE
    used = "pearson" if normal else "spearman"
    note = "one is a linear function of the other: no bivariate density" if statistic == 4 * n else ""
    return Consistency(pearson if normal else spearman, used, pearson, spearman, statistic, p, normal, n, note)


def henze_zirkler(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Test of bivariate normality (Henze & Zirkler, 1990): its statistic, and p from the log-normal approximation of its distribution.

    With ``d = 2``, ``b = (n (2 d + 1) / 4)^(1 / (d + 4)) / sqrt 2`` and the Mahalanobis distances D of the films to each other and to the mean
    (covariance with divisor n), ``HZ = sum_jk exp(-b^2 D_jk / 2) / n - 2 sum_j exp(-b^2 D_j / (2 (1 + b^2))) / (1 + b^2) + n / (1 + 2 b^2)``.

    Parameters
    ----------
    x, y : float (N,)

    Returns
    -------
    statistic, p : float
        NaN for fewer than three films or a constant. ``4 n`` and 0, as the authors define it, where x and y are linearly dependent
        (1 - r^2 <= 1e-12). The sum over pairs goes in blocks or, for many films, through its Fourier transform (equal to 1e-12).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(x)
    if n < 3 or _constant(x) or _constant(y):
        return np.nan, np.nan
    x, y = _standard(x), _standard(y)
    r = np.mean(x * y)
    if 1 - r**2 <= 1e-12:
        return 4.0 * n, 0.0
    points = np.stack([x, (y - r * x) / np.sqrt(1 - r**2)])                 # distances between them are Mahalanobis distances
    b2 = (1.25 * n) ** (1 / 3) / 2
    own = np.exp(-b2 / (2 * (1 + b2)) * (points**2).sum(axis=0)).sum()
    statistic = _gauss_sum(points, b2) / n - 2 * own / (1 + b2) + n / (1 + 2 * b2)

    # Mean and variance of the statistic under normality, d = 2.
    a, w = 1 + 2 * b2, (1 + b2) * (1 + 3 * b2)
    mean = 1 - (1 + 2 * b2 / a + 8 * b2**2 / (2 * a**2)) / a
    variance = (2 / (1 + 4 * b2) + 2 / a**2 * (1 + 4 * b2**2 / a**2 + 24 * b2**4 / (4 * a**4))
                - 4 / w * (1 + 6 * b2**2 / (2 * w) + 8 * b2**4 / (2 * w**2)))
    ratio = 1 + variance / mean**2
    p = stats.lognorm.sf(statistic, np.sqrt(np.log(ratio)), scale=mean / np.sqrt(ratio))
    return float(statistic), float(p)


def _gauss_sum(points: np.ndarray, b2: float) -> float:
    """``sum_jk exp(-b2 |p_j - p_k|^2 / 2)`` over points (2, N), the terms j = k included."""
    n, b = points.shape[1], np.sqrt(b2)
    # The sum is the integral of |sum_j exp(i t p_j)|^2 against a normal density of variance b2. A trapezoidal sum over t is exact but for
    # the images of the kernel at a distance of 2 pi / step, and the tail of the density: with 8.5 b on either side both are below 1e-15.
    step = 2 * np.pi / (np.ptp(points, axis=1) + 8.5 / b)
    half = np.ceil(8.5 * b / step).astype(int) + 1
    if half.prod() < 6 * n:                     # cheaper than n^2 / 2 exponentials
        grid = [step[axis] * np.arange(half[axis]) for axis in (0, 1)]
        waves, width = np.zeros(2 * half), max(1, _BLOCK // int(2 * half.sum()))
        for start in range(0, n, width):
            angle = [np.outer(t, p[start:start + width]) for t, p in zip(grid, points)]
            first, second = (np.concatenate([np.cos(a), np.sin(a)]) for a in angle)
            waves += first @ second.T           # the four products of cosines and sines hold all signs of t
        power = (waves**2).reshape(2, half[0], 2, half[1]).sum(axis=(0, 2))
        density = [step[axis] / (b * np.sqrt(2 * np.pi)) * np.exp(-t**2 / (2 * b2)) for axis, t in enumerate(grid)]
        for axis in (0, 1):
            density[axis][1:] *= 2
        return float(density[0] @ power @ density[1])
    total, width = 0.0, max(1, _BLOCK // n)
    for start in range(0, n, width):
        block, rest = points[:, start:start + width], points[:, start:]     # each pair once, but both ways within a block
        distance = np.subtract.outer(block[0], rest[0]) ** 2
        distance += np.subtract.outer(block[1], rest[1]) ** 2
        kernel = np.exp(-b2 / 2 * distance, out=distance)
        total += 2 * kernel.sum() - kernel[:, :block.shape[1]].sum()
    return float(total)


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= 8 * np.finfo(np.float64).eps * np.abs(values).max())


def _standard(values: np.ndarray) -> np.ndarray:
    away = values / np.abs(values).max()        # squares of very large or small values would leave the range of float64
    away = away - away.mean()
    return away / np.sqrt(np.mean(away**2))


# --- some features only ---------------------------------------------------------------------------------------------------------------


def masked_logits(pooled: Tensor, weights: Tensor, bias: Tensor, features: ArrayLike) -> Tensor:
    """Logits (B, C) of some features only, for a head that pools and is linear: ``(im pooled) W^T + b`` (Li et al., sec. III-C).

    Parameters
    ----------
    pooled : float (B, F)
        Spatial means of the feature maps.
    weights, bias : float (C, F), (C,)
    features : 0 or 1, (F,) or (C, F)
        One mask for all logits, or one for each (the transpose of what `integrated.select_features` gives); ``~mask`` for the others.
    """
    if pooled.ndim != 2 or weights.ndim != 2 or pooled.shape[1] != weights.shape[1] or bias.shape != weights.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (pooled, weights, bias))
        raise ValueError(f"need pooled features (B, F), weights (C, F) and bias (C,), got {shapes}")
    mask = feature_mask(features, *weights.shape).to(pooled)
    return pooled @ (weights.to(pooled) * mask).T + bias.to(pooled)


@contextmanager
def masked_layer(model: nn.Module, layer: str, features: ArrayLike, axis: int = 1) -> Iterator[None]:
    """Within the context the output of `layer` is multiplied by the mask, and every forward pass of `model` continues from there.

    Parameters
    ----------
    model : nn.Module
    layer : str
        Dotted name of a module whose output is one tensor.
    features : 0 or 1, (F,)
    axis : int
        Of the features in that output: 1 for maps (B, F, h, w), -1 for tokens (B, T, F).

    Raises
    ------
    ValueError
        No such module, an output without these features, or a layer that no forward pass came through.
    """
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f"the model has no module {layer!r}; there are {', '.join(name for name in modules if name)}")
    mask = torch.as_tensor(features)
    if mask.ndim != 1:
        raise ValueError(f"the mask of a layer must be a list, one entry a feature, got shape {tuple(mask.shape)}")
    mask = feature_mask(mask, 1, len(mask))
    used = False

    def multiply(module, inputs, output):
        nonlocal used
        used = True
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(output, Tensor) or not -output.ndim <= axis < output.ndim or output.shape[axis] != len(mask):
            raise ValueError(f"layer {layer!r} gives {shape}, which has no {len(mask)} features along axis {axis}")
        lead = [1] * output.ndim
        lead[axis] = len(mask)
        return output * mask.to(output).reshape(lead)

    handle = modules[layer].register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()
    if not used:
        raise ValueError(f"no forward pass went through layer {layer!r} within the context: nothing was masked")


# --- masked films ---------------------------------------------------------------------------------------------------------------------


def masked_films(films: Tensor, raw: Tensor, *, threshold: float | None = None, rectify: bool = True) -> Tensor:
    """Films (B, K, H, W) times their class activation maps in [0, 1], at the films' size; for `increase_and_drop`.

    Parameters
    ----------
    films : float (B, K, H, W)
        As the model sees them. Where the map is 0 the film becomes 0: in films normalised by ImageNet's mean, a mid-grey.
    raw : float (B, h, w)
        Signed map of each film. Min-max by film at its own size (without contrast: zeros), then resampled.
    threshold : float, optional
        Values of the mask below it become 0. The text speaks of thresholded maps, the authors' code has none (A48); default none.
    rectify : bool
        Negative evidence to 0 before the min-max, as in the usual CAM. False: min-max of the signed map.
    """
    if films.ndim != 4 or raw.ndim != 3 or len(films) != len(raw):
        raise ValueError(f"need films (B, K, H, W) and one map (B, h, w) each, got {tuple(films.shape)} and {tuple(raw.shape)}")
    mask = resize(normalise(raw, rectify), tuple(films.shape[2:])).to(films)
    if threshold is not None:
        mask = torch.where(mask >= threshold, mask, torch.zeros_like(mask))
    return films * mask[:, None]


class IncreaseDrop(NamedTuple):
    """`increase` and `drop` in %, higher and lower is better; the films `n` behind the increase; those left out of the drop, `n_zero`."""

    increase: float
    drop: float
    n: int
    n_zero: int


def increase_and_drop(original: ArrayLike, masked: ArrayLike) -> IncreaseDrop:
    """Average increase and drop of the confidence in the selected class when films are masked by their maps (Li et al., sec. III-A).

    ``increase = 100 / N #{Y < O}`` and ``drop = 100 / N sum max(0, Y - O) / Y``, with Y and O the confidence in the original and the masked film.
    Films with Y = 0 are left out of the drop.

    Parameters
    ----------
    original, masked : float (N,) in [0, 1]
        Y and O.

    Raises
    ------
    ValueError
        No films, lengths that differ, or values that are no confidences.
    """
    y, o = np.asarray(original, dtype=np.float64), np.asarray(masked, dtype=np.float64)
    if y.ndim != 1 or y.shape != o.shape or not len(y):
        raise ValueError(f"need two confidences of each film, got shapes {y.shape} and {o.shape}")
    for name, values in (("original", y), ("masked", o)):
        bad = ~((values >= 0) & (values <= 1))
        if bad.any():
            raise ValueError(f"{name}: film {int(bad.argmax())} has {values[bad][0]}, but a confidence lies in 0..1: "
                             "take the sigmoid or softmax of the logits")
    kept = y > 0
    drop = 100 * np.mean(np.maximum(y[kept] - o[kept], 0) / y[kept]) if kept.any() else np.nan
    return IncreaseDrop(float(100 * np.mean(o > y)), float(drop), len(y), int((~kept).sum()))

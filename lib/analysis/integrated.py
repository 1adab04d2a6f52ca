"""Integrated feature analysis (Li et al.): the distribution of class activations, and the importance of each feature for each class.

The distribution over a whole data set (`ActivationDistribution`) gives one scale for all films (`tanh_scale`, `s_cam`), on which maps can be
compared and negative evidence stays visible. The importance matrix (`ImportanceMatrix`, features x classes) gives the principal features
(`select_features`) and, further down, what else the paper reads from it. How well both hold is measured in `consistency`.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lib.analysis.cam import resize

_LOW_BITS = 14                                  # of a float32's 32 bits, those that the first pass does not tell apart
_BINS = 1 << (32 - _LOW_BITS)


# --- distribution of class activations ------------------------------------------------------------------------------------------------


class Percentiles(NamedTuple):
    """Of one or more classes: ``value`` and ``error``, float64 (K, C) for K percentiles; the true value lies within value +- error."""

    value: np.ndarray
    error: np.ndarray


class ActivationDistribution:
    """Distribution of the class activations of each class over a set of films that is seen once, batch by batch (Li et al., sec. II-A).

    A histogram whose bins are the float32 numbers that agree in their upper 18 bits, so they grow with the value and no outlier can widen
    them: memory is 2 MiB a class, and a percentile is known to half a bin, at most ``2**-10`` of its own size. `second_pass` makes it exact.
    Counts are integers: the result does not depend on the order or the size of the batches.

    Parameters
    ----------
    classes : sequence of str
        The selected classes.
    size : int or (int, int), optional
        The maps are first resampled bilinearly to films of this size, so every pixel of the film counts once (the paper's order, eq. 1).
        Default: the maps at their own size.
    """

    def __init__(self, classes: Sequence[str], size: int | tuple[int, int] | None = None):
        self.classes, self.size = list(classes), size
        n = len(self.classes)
        self.n_pixels = 0                       # of each class
        self.low, self.high = np.full(n, np.inf), np.full(n, -np.inf)
        self._counts = np.zeros((n, _BINS), dtype=np.int64)
        self._sums, self._squares = np.zeros(n), np.zeros(n)
        self._extremes = []

    def update(self, raw: Tensor) -> None:
        """Take in the signed raw maps of some more films, float (B, C, h, w), read as float32.

        Raises
        ------
        ValueError
            Another number of classes, or NaN or infinite values.
        """
        raw = _raw_maps(raw, self.classes)
        if not len(raw):
            return
        self._extremes.append(torch.stack(torch.aminmax(raw.flatten(2), dim=2)).cpu().numpy())      # (2, B, C)
        for c in range(len(self.classes)):
            values = _film_sized(raw[:, c], self.size)
            low, high = (float(value) for value in torch.aminmax(values))
            self.low[c], self.high[c] = min(self.low[c], low), max(self.high[c], high)
            self._counts[c] += torch.bincount(_bins(_keys(values)), minlength=_BINS).cpu().numpy()
            values = values.flatten().double()
            self._sums[c] += float(values.sum())
            self._squares[c] += float(values @ values)
        self.n_pixels += values.numel()

    def percentiles(self, percents: ArrayLike = (10, 90)) -> Percentiles:
        """Percentiles (0..100) of each class, interpolated linearly between neighbouring values, as `numpy.percentile` does."""
        lower, upper, fraction = _ranks(percents, self.n_pixels)
        cumulative = self._counts.cumsum(axis=1)
        bounds = []
        for ranks in (lower, upper):
            bins = np.array([np.searchsorted(row, ranks, side="right") for row in cumulative]).T
            bounds.append(np.clip(_edges(bins), self.low, self.high))                               # (2, K, C)
        low, high = bounds[0] + fraction[:, None] * (bounds[1] - bounds[0])
        return Percentiles((low + high) / 2, (high - low) / 2)

    def second_pass(self, percents: ArrayLike = (10, 90)) -> "ExactPercentiles":
        """The stream that, fed with the same films again, gives these percentiles exactly."""
        return ExactPercentiles(self, percents)

    def image_extremes(self, low: float = 50, high: float = 90) -> np.ndarray:
        """The other reading of P10 and P90 (A41): the median of the films' minima and the 90th percentile of their maxima, at the maps' size.

        Returns
        -------
        float64 (2, C)
        """
        minima, maxima = np.concatenate(self._extremes, axis=1).astype(np.float64)
        return np.stack([np.percentile(minima, low, axis=0), np.percentile(maxima, high, axis=0)])

    def histogram(self, edges: ArrayLike) -> np.ndarray:
        """Pixels between ascending edges (K + 1), float64 (C, K); a bin holds its lower edge, the last one both.

        Each fine bin is taken as uniform, so a count is wrong by at most what two fine bins hold.
        """
        edges = np.asarray(edges, dtype=np.float64)
        below = np.append(np.nextafter(edges[:-1], -np.inf), edges[-1])
        rows = []
        for c, counts in enumerate(self._counts):
            bins = np.flatnonzero(counts)
            cumulative = counts[bins].cumsum()
            points = np.clip(_edges(bins), self.low[c], self.high[c]).T.ravel()
            rows.append(np.diff(np.interp(below, points, np.stack([cumulative - counts[bins], cumulative], axis=1).ravel(), left=0)))
        return np.array(rows)

    def summary(self) -> pd.DataFrame:
        """A row a class: class, n_pixels, mean, sd, low, high."""
        mean = self._sums / max(self.n_pixels, 1)
        sd = np.sqrt(np.maximum(self._squares / max(self.n_pixels, 1) - mean**2, 0))
        return pd.DataFrame({"class": self.classes, "n_pixels": self.n_pixels, "mean": mean, "sd": sd, "low": self.low, "high": self.high})


class ExactPercentiles:
    """Second pass over the same films: the lower bits of the values in the bins where the wanted ranks lie. See `ActivationDistribution`."""

    def __init__(self, first: ActivationDistribution, percents: ArrayLike):
        self._first, self._ranks = first, _ranks(percents, first.n_pixels)
        ranks = np.unique(np.concatenate(self._ranks[:2]))
        self._cumulative = first._counts.cumsum(axis=1)
        self._bins = [np.unique(np.searchsorted(row, ranks, side="right")) for row in self._cumulative]
        self._counts = [np.zeros((len(bins), 1 << _LOW_BITS), dtype=np.int64) for bins in self._bins]

    def update(self, raw: Tensor) -> None:
        """As `ActivationDistribution.update`."""
        raw = _raw_maps(raw, self._first.classes)
        for c, (bins, counts) in enumerate(zip(self._bins, self._counts)):
            keys = _keys(_film_sized(raw[:, c], self._first.size))
            upper, lower = _bins(keys), keys & ((1 << _LOW_BITS) - 1)
            for count, wanted in zip(counts, bins.tolist()):
                count += torch.bincount(lower[upper == wanted], minlength=1 << _LOW_BITS).cpu().numpy()

    def percentiles(self) -> Percentiles:
        """Percentiles, exact for the float32 values; error 0.

        Raises
        ------
        ValueError
            The second pass saw other values than the first.
        """
        lower, upper, fraction = self._ranks
        found = np.empty((2, len(lower), len(self._bins)))
        for c, (bins, counts) in enumerate(zip(self._bins, self._counts)):
            before = self._cumulative[c][bins] - self._first._counts[c][bins]
            if (counts.sum(axis=1) != self._first._counts[c][bins]).any():
                raise ValueError(f"class {self._first.classes[c]!r}: the second pass saw other class activations than the first; "
                                 "give it the same films, in evaluation mode and the same precision")
            cumulative = counts.cumsum(axis=1)
            for which, ranks in enumerate((lower, upper)):
                for k, rank in enumerate(ranks):
                    slot = int(np.searchsorted(bins, np.searchsorted(self._cumulative[c], rank, side="right")))
                    low_bits = np.searchsorted(cumulative[slot], rank - before[slot], side="right")
                    found[which, k, c] = _values((bins[slot] << _LOW_BITS) + low_bits)
        value = found[0] + fraction[:, None] * (found[1] - found[0])
        return Percentiles(value, np.zeros_like(value))


def _raw_maps(raw: Tensor, classes: list[str]) -> Tensor:
    if raw.ndim != 4 or raw.shape[1] != len(classes):
        raise ValueError(f"need raw maps (B, {len(classes)}, h, w), one for each of {', '.join(classes)}; got shape {tuple(raw.shape)}")
    raw = raw.detach().to("cpu" if raw.device.type == "mps" else raw.device, torch.float32)     # MPS has no float64
    if not torch.isfinite(raw).all():
        film, c = torch.nonzero(~torch.isfinite(raw))[0, :2].tolist()
        raise ValueError(f"class {classes[c]!r}: NaN or infinite class activation in film {film} of the batch")
    return raw


def _film_sized(maps: Tensor, size: int | tuple[int, int] | None) -> Tensor:
    return maps if size is None else resize(maps, size)


def _keys(values: Tensor) -> Tensor:
    """The 32 bits of each float32 as an integer in the order of the values, int32, flat."""
    bits = (values.flatten() + 0.0).view(torch.int32)                                           # -0 becomes 0
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def _bins(keys: Tensor) -> Tensor:
    return (keys >> _LOW_BITS).add_(_BINS // 2)


def _values(keys: np.ndarray) -> np.ndarray:
    """The float32 of each key, counted from 0, float64."""
    bits = (np.asarray(keys, dtype=np.int64) - 2**31).astype(np.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32).astype(np.float64)


def _edges(bins: np.ndarray) -> np.ndarray:
    """Smallest and largest value of each bin, float64 (2, ...)."""
    return _values(np.stack([bins << _LOW_BITS, (bins << _LOW_BITS) + (1 << _LOW_BITS) - 1]))


def _ranks(percents: ArrayLike, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each percentile: the two neighbouring ranks (0-based) and how far it lies between them."""
    percents = np.atleast_1d(np.asarray(percents, dtype=np.float64))
    if not ((percents >= 0) & (percents <= 100)).all():
        raise ValueError(f"percentiles must lie in 0..100, got {percents.tolist()}")
    if n == 0:
        raise ValueError("no class activation has been seen yet: call update with the raw maps of some films")
    rank = (n - 1) * percents / 100
    lower = np.floor(rank).astype(np.int64)
    return lower, np.minimum(lower + 1, n - 1), rank - lower


# --- common scale ---------------------------------------------------------------------------------------------------------------------


def tanh_scale(p10: ArrayLike, p90: ArrayLike, low: float = 0.1, high: float = 0.9, classes: Sequence[str] | None = None):
    """Alpha and beta of eq. 1 with ``tanh(alpha P10 + beta) = low`` and ``tanh(alpha P90 + beta) = high``.

    The printed beta has its signs the other way and would give -0.9 and -0.1 (A39).

    Parameters
    ----------
    p10, p90 : float or float (C,)
        Of the raw maps of all films; for selected features too (FS-S-CAM), those of the maps of ALL features.
    low, high : float in (-1, 1)
    classes : sequence of str, optional
        Named in errors.

    Returns
    -------
    alpha, beta : float64, shaped like `p10`

    Raises
    ------
    ValueError
        P10 is not below P90 for some class, or not finite.
    """
    if not -1 < low < high < 1:
        raise ValueError(f"low and high must satisfy -1 < low < high < 1, got {low} and {high}")
    return _line(p10, p90, np.arctanh(low), np.arctanh(high), classes)


def linear_scale(p10: ArrayLike, p90: ArrayLike, low: float = 0.0, high: float = 1.0, classes: Sequence[str] | None = None):
    """Alpha and beta of the linear scale without clipping (A40): P10 goes to `low`, P90 to `high`. Otherwise as `tanh_scale`."""
    return _line(p10, p90, low, high, classes)


def _line(p10, p90, low, high, classes):
    p10, p90 = np.broadcast_arrays(np.asarray(p10, dtype=np.float64), np.asarray(p90, dtype=np.float64))
    with np.errstate(all="ignore"):
        alpha = (high - low) / (p90 - p10)
        beta = (p90 * low - p10 * high) / (p90 - p10)
    bad = np.flatnonzero(~((p10 < p90) & np.isfinite(alpha) & np.isfinite(beta)))
    if len(bad):
        names = [f"class {classes[i] if classes is not None else i!s} ({p10.flat[i]:g} and {p90.flat[i]:g})" for i in bad]
        raise ValueError(f"no common scale: P10 of the class activations must lie below P90, but does not for {', '.join(names)}. "
                         "Leave these classes out, take percentiles further apart (1 and 99), or use image_extremes")
    return alpha[()], beta[()]


def scaled(raw: Tensor, alpha: ArrayLike, beta: ArrayLike, kind: str = "tanh") -> Tensor:
    """Raw maps on the common scale: ``tanh(alpha raw + beta)`` ('tanh') or ``alpha raw + beta`` ('linear'). Signed, no rectification.

    Parameters
    ----------
    raw : float (..., h, w), or (..., C, h, w) for alpha and beta of C classes
    alpha, beta : float or float (C,)
    kind : {'tanh', 'linear'}

    Returns
    -------
    float, shaped like `raw`; 'tanh' in [-1, 1].
    """
    if kind not in ("tanh", "linear"):
        raise ValueError(f"unknown scale {kind!r}; choose tanh or linear")
    alpha, beta = (torch.as_tensor(value, dtype=raw.dtype, device=raw.device)[..., None, None] for value in (alpha, beta))
    line = alpha * raw + beta
    return line.tanh() if kind == "tanh" else line


def s_cam(raw: Tensor, alpha: ArrayLike, beta: ArrayLike, size: int | tuple[int, int], *, order: str = "resize_first", kind: str = "tanh") -> Tensor:
    """S-CAM (eq. 1): raw maps (..., C, h, w) on the common scale, at the size of the film.

    ``order='scale_first'`` scales before it resamples (A42), which is not the same for tanh. The other parameters as for `scaled`.
    """
    if order not in ("resize_first", "scale_first"):
        raise ValueError(f"unknown order {order!r}; choose resize_first or scale_first")
    if order == "resize_first":
        return scaled(resize(raw, size), alpha, beta, kind)
    return resize(scaled(raw, alpha, beta, kind), size)


# --- importance matrix ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Importance:
    """Importance of F features for C classes: the mean over films of the spatial sum of the weighted feature.

    Attributes
    ----------
    all, own, sd : float64 (F, C)
        `all` over all films (eq. 3), with the standard deviation `sd`; `own` over the films of the class (eq. 4), NaN for a class without any.
    n, n_own : int64 (C,)
        Films behind a column of `all` and of `own`.
    """

    all: np.ndarray
    own: np.ndarray
    sd: np.ndarray
    n: np.ndarray
    n_own: np.ndarray

    @property
    def contrast(self) -> np.ndarray:
        """Mean over the class's films minus the mean over all other films, float64 (F, C); NaN where there are none of either."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.own - self.all) * (self.n / (self.n - self.n_own))


class ImportanceMatrix:
    """Importance matrices of all classes (Li et al., eq. 3 and 4) over a stream of films, sums in float64.

    With `cam.channel_contributions` for all classes at once, both cost one forward pass.

    Parameters
    ----------
    classes : sequence of str
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        self._all = None

    def update(self, contributions: Tensor, targets: ArrayLike, correct: ArrayLike | None = None) -> None:
        """Take in some more films.

        Parameters
        ----------
        contributions : float (B, C, F)
            Of `cam.channel_contributions`.
        targets : int (B,) or 0/1 (B, C)
            The film's class, or its labels.
        correct : bool (B, C), optional
            Films that count for a class (A45: the correctly classified, see `correct_predictions`). Default all.

        Raises
        ------
        ValueError
            Shapes that do not fit, targets out of range, NaN or infinite contributions.
        """
        n_classes = len(self.classes)
        if contributions.ndim != 3 or contributions.shape[1] != n_classes:
            raise ValueError(f"need contributions (B, {n_classes}, F), got shape {tuple(contributions.shape)}")
        labels = _labels(targets, n_classes)
        kept = np.ones(labels.shape, dtype=bool) if correct is None else np.asarray(torch.as_tensor(correct).cpu(), dtype=bool)
        if len(labels) != len(contributions) or kept.shape != labels.shape:
            raise ValueError(f"{len(contributions)} films come with {len(labels)} targets and a choice of shape {kept.shape}")
        if not torch.isfinite(contributions).all():
            film, c, feature = torch.nonzero(~torch.isfinite(contributions))[0].tolist()
            raise ValueError(f"class {self.classes[c]!r}: NaN or infinite contribution of feature {feature} in film {film} of the batch")
        if self._all is None:
            self._all, self._squares, self._own = np.zeros((3, n_classes, contributions.shape[2]))
            self._n, self._n_own = np.zeros((2, n_classes), dtype=np.int64)
        values = contributions.detach().to("cpu" if contributions.device.type == "mps" else contributions.device).double().transpose(0, 1)
        weights = torch.as_tensor(np.stack([kept, kept & labels], axis=1).T.astype(np.float64), device=values.device)       # (C, 2, B)
        sums = torch.bmm(weights, values).cpu().numpy()
        self._all += sums[:, 0]
        self._own += sums[:, 1]
        self._squares += torch.bmm(weights[:, :1], values.square())[:, 0].cpu().numpy()
        self._n += kept.sum(axis=0)
        self._n_own += (kept & labels).sum(axis=0)

    def result(self) -> Importance:
        """The matrices; a column without films is NaN."""
        if self._all is None:
            raise ValueError("no film has been seen yet: call update with the contributions of some films")
        with np.errstate(invalid="ignore", divide="ignore"):
            mean, own = self._all.T / self._n, self._own.T / self._n_own
            sd = np.sqrt(np.maximum(self._squares.T / self._n - mean**2, 0))
        return Importance(mean, own, sd, self._n.copy(), self._n_own.copy())


def correct_predictions(logits: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """Films that are classified correctly, bool (B, C): the largest logit at the target (B,), or each logit's sign as its label (B, C)."""
    logits = np.asarray(torch.as_tensor(logits).cpu())
    labels = _labels(targets, logits.shape[1])
    if np.ndim(targets) == 1:
        return np.repeat(labels[np.arange(len(labels)), logits.argmax(axis=1)][:, None], logits.shape[1], axis=1)
    return (logits > 0) == labels


def _labels(targets: ArrayLike, n_classes: int) -> np.ndarray:
    targets = np.asarray(torch.as_tensor(targets).cpu())
    if targets.ndim == 1:
        good = (targets >= 0) & (targets < n_classes) & (targets == np.floor(targets))
        if not good.all():
            raise ValueError(f"targets must be classes 0..{n_classes - 1}, got {targets[~good][0]}")
        return targets[:, None] == np.arange(n_classes)
    if targets.ndim != 2 or targets.shape[1] != n_classes or not ((targets == 0) | (targets == 1)).all():
        raise ValueError(f"targets must be classes (B,) or labels 0 and 1 of shape (B, {n_classes}), got shape {targets.shape}")
    return targets == 1


def select_features(importance: ArrayLike, ratio: float, by: str = "value") -> np.ndarray:
    """The principal features of each class: the top ``k = max(1, ceil(ratio F))`` of its column.

    Parameters
    ----------
    importance : float (F, C)
        A column of NaN (a class without films) selects nothing.
    ratio : float in (0, 1]
        5 % in the paper, 20 % for MNIST, 25 % for ImageNet.
    by : {'value', 'abs_diff'}
        The largest importance, or (A46) the largest ``|importance - mean over the classes|``. Ties go to the lower feature.

    Returns
    -------
    bool (F, C); its complement is ``~mask``.
    """
    importance = _matrix(importance)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    if by not in ("value", "abs_diff"):
        raise ValueError(f"unknown order {by!r}; choose value or abs_diff")
    defined = ~np.isnan(importance).any(axis=0)
    if by == "abs_diff":
        if defined.sum() < 2:
            raise ValueError("abs_diff compares classes and needs at least two with films")
        importance = np.abs(importance - importance[:, defined].mean(axis=1, keepdims=True))
    k = max(1, int(np.ceil(round(ratio * len(importance), 9))))       # 0.07 * 100 is 7.000000000000001
    top = np.argsort(-importance, axis=0, kind="stable")[:k]
    mask = np.zeros(importance.shape, dtype=bool)
    np.put_along_axis(mask, top, True, axis=0)
    return mask & defined


def combined_mask(masks: np.ndarray, selected: int | None = None) -> np.ndarray:
    """One mask (F,) for all films, which may not depend on a film's true class (A49): of more than two classes the union of their masks,
    else that of class `selected` (default the last, the positive one)."""
    mask = masks.any(axis=1) if masks.shape[1] > 2 else masks[:, -1 if selected is None else selected]
    if not mask.any():
        raise ValueError("the mask selects no feature: the classes it is made of have no films")
    return mask


def _matrix(importance: ArrayLike) -> np.ndarray:
    importance = np.asarray(importance, dtype=np.float64)
    if importance.ndim != 2 or not importance.size:
        raise ValueError(f"need an importance matrix (features, classes), got shape {importance.shape}")
    missing = np.isnan(importance)
    if np.isinf(importance).any() or (missing.any(axis=0) != missing.all(axis=0)).any():
        raise ValueError("the importance matrix holds infinite values, or NaN in a part of a column")
    return importance


# --- what the matrix tells ------------------------------------------------------------------------------------------------------------


def train_test_difference(train: Importance, test: Importance, classes: Sequence[str]) -> pd.DataFrame:
    """Overfitting (sec. VI-A): how far the columns of eq. 3 differ between training and test films.

    Returns
    -------
    DataFrame
        One row a class: class, n_train, n_test; difference, ``sum |train - test| / sum |train|``; by_chance, the value expected of that where
        only the choice of films differs (independent films, normal means: too small where patients have several films); correlation
        (Pearson) of the two columns. NaN where a class has no films, or a column no contrast.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.abs(train.all).sum(axis=0)
        size = np.where(size > 0, size, np.nan)
        error = np.sqrt(train.sd**2 / train.n + test.sd**2 / test.n)
        a, b = (matrix.all - matrix.all.mean(axis=0) for matrix in (train, test))
        return pd.DataFrame({
            "class": list(classes), "n_train": train.n, "n_test": test.n, "difference": np.abs(train.all - test.all).sum(axis=0) / size,
            "by_chance": np.sqrt(2 / np.pi) * error.sum(axis=0) / size,
            "correlation": (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))})


def robust_z(values: ArrayLike) -> np.ndarray:
    """``(v - median) / (1.4826 MAD)`` along axis 0, float64; where more than half of the values agree, the mean absolute deviation x 1.2533."""
    values = np.asarray(values, dtype=np.float64)
    away = values - np.median(values, axis=0)
    spread = 1.4826 * np.median(np.abs(away), axis=0)
    spread = np.where(spread == 0, 1.2533 * np.abs(away).mean(axis=0), spread)
    return np.divide(away, spread, out=np.where(np.isnan(away), np.nan, 0.0), where=spread != 0)


def confounder_candidates(importance: ArrayLike, classes: Sequence[str], top: int = 3) -> pd.DataFrame:
    """Features to look at as possible confounders: extreme in the column of a class, and important for that class alone.

    `Importance.contrast` suits this best: what a feature adds on the films of the class and not on the others.

    Returns
    -------
    DataFrame
        `top` rows a class with films, the most extreme first: class, feature, importance, robust_z (within the column), share (of the column's
        positive total), selectivity (its share here over the sum of its shares in all classes; 1 = positive for this class alone).
    """
    importance = _matrix(importance)
    z, share = robust_z(importance), _shares(importance)
    total = np.nansum(share, axis=1)
    rows = []
    for c, name in enumerate(classes):
        if np.isnan(importance[:, c]).any():
            continue
        for f in np.argsort(-z[:, c], kind="stable")[:top]:
            selectivity = share[f, c] / total[f] if total[f] > 0 else np.nan
            rows.append((name, int(f), importance[f, c], z[f, c], share[f, c], selectivity))
    return pd.DataFrame(rows, columns=["class", "feature", "importance", "robust_z", "share", "selectivity"])


def film_distances(contributions: Tensor, targets: ArrayLike, importance: ArrayLike) -> np.ndarray:
    """Outlier films: ``1 - cosine`` of a film's contributions to a class it belongs to and the class's column, float64 (B, C) in [0, 2].

    NaN for classes the film does not belong to, and where either vector is zero or undefined. A film that the column was averaged over pulls
    it towards itself; the only film of a class has distance 0.

    Parameters
    ----------
    contributions : float (B, C, F)
    targets : int (B,) or 0/1 (B, C)
    importance : float (F, C)
        `Importance.own`.
    """
    values, columns = contributions.detach().cpu().double().numpy(), _matrix(importance).T
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.einsum("bcf,cf->bc", values, columns) / (np.linalg.norm(values, axis=2) * np.linalg.norm(columns, axis=1))
    return np.where(_labels(targets, len(columns)), np.clip(1 - cosine, 0, 2), np.nan)


def carriers(importance: ArrayLike, share: float = 0.8) -> np.ndarray:
    """The fewest features whose positive importance adds up to at least `share` of a class's positive total, bool (F, C).

    Their number, ``.sum(axis=0)``, is how many features carry the class. None where nothing is positive.
    """
    shares = np.nan_to_num(_shares(_matrix(importance)))
    order = np.argsort(-shares, axis=0, kind="stable")
    ranked = np.take_along_axis(shares, order, axis=0)
    needed = (ranked.cumsum(axis=0) - ranked < share * (1 - 1e-12)) & (ranked > 0)       # the sum before a feature falls short
    mask = np.zeros(shares.shape, dtype=bool)
    np.put_along_axis(mask, order, needed, axis=0)
    return mask


def participation(importance: ArrayLike) -> np.ndarray:
    """Effective number of features of each class, ``1 / sum share^2`` of the positive importance, float64 (C,) in 1..F; NaN without any."""
    squared = (_shares(_matrix(importance)) ** 2).sum(axis=0)
    return 1 / np.where(squared > 0, squared, np.nan)


def overlap(masks: np.ndarray) -> np.ndarray:
    """Jaccard index of the feature sets (F, C) of each two classes, float64 (C, C); NaN for two empty sets."""
    counts = masks.astype(np.float64)
    both, size = counts.T @ counts, counts.sum(axis=0)
    either = size[:, None] + size - both
    return np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)


def redundancy(importance: ArrayLike) -> np.ndarray:
    """Largest ``|importance|`` of each feature in any class as a share of that column's largest, float64 (F,) in [0, 1].

    Features below a small share, 1 % say, matter to no class; ``np.argsort(..., kind="stable")`` is the order in which to prune.
    """
    size = np.abs(_matrix(importance))
    size = size[:, ~np.isnan(size[0])]
    if not size.size:
        raise ValueError("no class has films: there is no importance to prune by")
    largest = size.max(axis=0)
    return np.divide(size, largest, out=np.zeros_like(size), where=largest > 0).max(axis=1)


def _shares(importance: np.ndarray) -> np.ndarray:
    """Positive part of each column over its sum; 0 without any, NaN for a class without films."""
    positive = np.maximum(importance, 0)
    total = positive.sum(axis=0)
    return np.divide(positive, total, out=np.where(np.isnan(positive), np.nan, 0.0), where=total != 0)

"""Class activations of a whole data set on one common scale (Li et al., sec. II-A, eq. 1 and 2).

The distribution over all films (`ActivationDistribution`) gives two percentiles of each class, and these one scale for
all films (`common_scale`, `s_cam`), on which maps can be compared and negative evidence stays visible.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lib.analysis.bilinear import compiled, fma, taps
from lib.analysis.cam import resize

_LOW_BITS = 14  # of a float32's 32 bits, those that the first pass does not tell apart
_BINS = 1 << (32 - _LOW_BITS)


# ---- distribution of class activations


class Percentiles(NamedTuple):
    """Of one or more classes: ``value`` and ``error``, float64 (K, C) for K percentiles; the true value lies within
    value +- error."""

    value: np.ndarray
    error: np.ndarray


class ActivationDistribution:
    """Distribution of the class activations of each class over a set of films that is seen once, batch by batch (Li et
    al., sec. II-A).

    A histogram whose bins are the float32 numbers that agree in their upper 18 bits, so they grow with the value and no
    outlier can widen them: memory is 2 MiB a class, and a percentile is known to half a bin, at most ``2**-10`` of its
    own size. That is much where the spread is small beside an offset: a common scale needs `second_pass`, which makes
    percentiles exact. Counts are integers: the result does not depend on the order or the size of the batches.

    Parameters
    ----------
    classes : sequence of str
        The selected classes.
    size : int or (int, int), optional
        The maps are first resampled bilinearly to films of this size, so every pixel of the film counts once (the
        paper's order, eq. 1). Default: the maps at their own size.

    Attributes
    ----------
    n_pixels : int
        Of each class.
    low, high : float64 (C,)
        Smallest and largest value of each class.
    """

    def __init__(self, classes: Sequence[str], size: int | tuple[int, int] | None = None):
        self.classes, self.size, self.n_pixels = list(classes), size, 0
        n = len(self.classes)
        self.low, self.high = np.full(n, np.inf), np.full(n, -np.inf)
        self._counts, self._extremes = np.zeros((n, _BINS), dtype=np.int64), []

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
        self._extremes.append(torch.stack(torch.aminmax(raw.flatten(2), dim=2)).numpy())  # (2, B, C)
        options = _film_taps(raw, self.size)
        for c, maps in enumerate(raw.numpy().swapaxes(0, 1)):
            low, high = _values(np.array(_count_bins(maps, options, self._counts[c]), np.int64) + 2**31)
            self.low[c], self.high[c] = min(self.low[c], low), max(self.high[c], high)
        self.n_pixels += _pixels(options, raw)

    def percentiles(self, percents: ArrayLike = (10, 90)) -> Percentiles:
        """Percentiles (0..100) of each class, interpolated linearly between neighbouring values, as `numpy.percentile`
        does."""
        lower, upper, fraction = _ranks(percents, self.n_pixels)
        cumulative = self._counts.cumsum(axis=1)
        bounds = []
        for ranks in (lower, upper):
            bins = np.array([np.searchsorted(row, ranks, side="right") for row in cumulative]).T
            bounds.append(np.clip(_edges(bins), self.low, self.high))  # (2, K, C)
        low, high = bounds[0] + fraction[:, None] * (bounds[1] - bounds[0])
        return Percentiles((low + high) / 2, (high - low) / 2)

    def second_pass(self, percents: ArrayLike = (10, 90)) -> "ExactPercentiles":
        """The stream that, fed with the same films again, gives these percentiles exactly."""
        return ExactPercentiles(self, percents)

    def image_extremes(self, low: float = 50, high: float = 90) -> np.ndarray:
        """The other reading of P10 and P90 (A41): the median of the films' minima and the 90th percentile of their
        maxima, at the maps' size.

        Returns
        -------
        float64 (2, C)
        """
        minima, maxima = np.concatenate(self._extremes, axis=1).astype(np.float64)
        return np.stack([np.percentile(minima, low, axis=0), np.percentile(maxima, high, axis=0)])

    def bars(self, n: int = 80) -> tuple[np.ndarray, np.ndarray]:
        """Edges (n + 1) over the range of all classes together, and the `histogram` (C, n) between them."""
        edges = np.linspace(self.low.min(), self.high.max(), n + 1)
        return edges, self.histogram(edges)

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
            steps = np.stack([cumulative - counts[bins], cumulative], axis=1).ravel()
            rows.append(np.diff(np.interp(below, points, steps, left=0)))
        return np.array(rows)


class ExactPercentiles:
    """Second pass over the same films: the lower bits of the values in the bins where the wanted ranks lie. See
    `ActivationDistribution`."""

    def __init__(self, first: ActivationDistribution, percents: ArrayLike):
        self._first, self._ranks, self.n_pixels = first, _ranks(percents, first.n_pixels), 0
        ranks = np.unique(np.concatenate(self._ranks[:2]))
        self._bins = [np.unique(np.searchsorted(row.cumsum(), ranks, side="right")) for row in first._counts]
        # What lies below is counted anew: a value that a GPU rounds otherwise the second time may change its bin.
        self._below = [np.zeros(len(bins), dtype=np.int64) for bins in self._bins]
        self._counts = [np.zeros((len(bins), 1 << _LOW_BITS), dtype=np.int64) for bins in self._bins]

    def update(self, raw: Tensor) -> None:
        """As `ActivationDistribution.update`."""
        raw = _raw_maps(raw, self._first.classes)
        options = _film_taps(raw, self._first.size)
        for c, maps in enumerate(raw.numpy().swapaxes(0, 1)):
            _count_low_bits(maps, options, self._bins[c], self._below[c], self._counts[c])
        self.n_pixels += _pixels(options, raw)

    def percentiles(self) -> Percentiles:
        """Percentiles, exact for the float32 values of this pass; error 0.

        Raises
        ------
        ValueError
            The second pass saw other values than the first.
        """
        lower, upper, fraction = self._ranks
        found = np.empty((2, len(lower), len(self._bins)))
        for c, (bins, below, counts) in enumerate(zip(self._bins, self._below, self._counts)):
            cumulative = counts.cumsum(axis=1)
            for which, ranks in enumerate((lower, upper)):
                slots = np.searchsorted(below, ranks, side="right") - 1
                inside = ranks - below[slots]
                if (
                    self.n_pixels != self._first.n_pixels
                    or (slots < 0).any()
                    or (inside >= cumulative[slots, -1]).any()
                ):
                    raise ValueError(
                        f"class {self._first.classes[c]!r}: the second pass saw other class activations than the "
                        "first; give it the same films, in evaluation mode and the same precision"
                    )
                low_bits = [np.searchsorted(cumulative[slot], rank, side="right") for slot, rank in zip(slots, inside)]
                found[which, :, c] = _values((bins[slots] << _LOW_BITS) + low_bits)
        value = found[0] + fraction[:, None] * (found[1] - found[0])
        return Percentiles(value, np.zeros_like(value))


def _raw_maps(raw: Tensor, classes: list[str]) -> Tensor:
    if raw.ndim != 4 or raw.shape[1] != len(classes):
        wanted = f"raw maps (B, {len(classes)}, h, w), one for each of {', '.join(classes)}"
        raise ValueError(f"need {wanted}; got shape {tuple(raw.shape)}")
    raw = raw.detach().to("cpu", torch.float32)
    if not torch.isfinite(raw).all():
        film, c = torch.nonzero(~torch.isfinite(raw))[0, :2].tolist()
        raise ValueError(f"class {classes[c]!r}: NaN or infinite class activation in film {film} of the batch")
    return raw


def _film_taps(raw: Tensor, size: int | tuple[int, int] | None) -> tuple[np.ndarray, ...]:
    """`bilinear.taps` of the rows and of the columns of maps (..., h, w) at the size of the film."""
    sides = raw.shape[-2:]
    ends = sides if size is None else (size, size) if isinstance(size, int) else size
    return tuple(part for n, end in zip(sides, ends, strict=True) for part in taps(n, end))


def _pixels(options: tuple[np.ndarray, ...], raw: Tensor) -> int:
    return len(raw) * len(options[0]) * len(options[3])


@compiled
def _keys(a, y_low, y_high, y_start, x_low, x_high, x_start, keys):
    """The pixels of a map (h, w) at the size of the film: the 32 bits of each float32 as an integer in the order of the
    values, int32 (H, W)."""
    height, width = a.shape
    ends = np.empty((2, len(x_low)), np.float32)
    row = np.empty(len(x_low), np.float32)
    bits = row.view(np.int32)
    for y in range(height):
        for end in range(2 * (y_start[y] < y_start[y + 1])):
            source = a[min(y + end, height - 1)]
            for x in range(width):
                left, right = source[x], source[min(x + 1, width - 1)]
                for i in range(x_start[x], x_start[x + 1]):
                    ends[end, i] = fma(left, x_low[i], right * x_high[i])
        for j in range(y_start[y], y_start[y + 1]):
            for i in range(len(row)):
                row[i] = fma(ends[0, i], y_low[j], ends[1, i] * y_high[j]) + np.float32(0)  # -0 becomes 0
            for i in range(len(row)):
                keys[j, i] = ((bits[i] >> 31) & 0x7FFFFFFF) ^ bits[i]


@compiled
def _count_bins(values, taps, counts):
    """Count the pixels of maps (B, h, w) at the size of the film by bin; the smallest and the largest key."""
    keys = np.empty((len(taps[0]), len(taps[3])), np.int32)
    low, high = np.int32(2**31 - 1), np.int32(-(2**31))
    for film in range(len(values)):
        _keys(values[film], *taps, keys)
        low, high = min(low, keys.min()), max(high, keys.max())
        for key in keys.flat:
            counts[(key >> _LOW_BITS) + _BINS // 2] += 1
    return low, high


@compiled
def _count_low_bits(values, taps, bins, below, counts):
    """Count the pixels in each of the ``bins`` by their lower bits, and those ``below`` each."""
    keys = np.empty((len(taps[0]), len(taps[3])), np.int32)
    for film in range(len(values)):
        _keys(values[film], *taps, keys)
        flat = keys.ravel()
        for k in range(len(bins)):
            first = np.int32((bins[k] - _BINS // 2) << _LOW_BITS)
            less, not_more = 0, 0
            for i in range(len(flat)):
                less += flat[i] < first
                not_more += (flat[i] >> _LOW_BITS) <= (first >> _LOW_BITS)
            below[k] += less
            if not_more > less:
                for key in flat:
                    if key >> _LOW_BITS == first >> _LOW_BITS:
                        counts[k, key & ((1 << _LOW_BITS) - 1)] += 1


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


# ---- common scale


def tanh_scale(
    p10: ArrayLike, p90: ArrayLike, low: float = 0.1, high: float = 0.9, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
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
    return linear_scale(p10, p90, np.arctanh(low), np.arctanh(high), classes)


def linear_scale(
    p10: ArrayLike, p90: ArrayLike, low: float = 0.0, high: float = 1.0, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Alpha and beta of the linear scale without clipping (A40): P10 goes to `low`, P90 to `high`. Otherwise as
    `tanh_scale`."""
    p10, p90 = np.broadcast_arrays(np.asarray(p10, dtype=np.float64), np.asarray(p90, dtype=np.float64))
    with np.errstate(all="ignore"):
        alpha = (high - low) / (p90 - p10)
        beta = (p90 * low - p10 * high) / (p90 - p10)
    bad = np.flatnonzero(~((p10 < p90) & np.isfinite(alpha) & np.isfinite(beta)))
    if len(bad):
        names = [f"class {i if classes is None else classes[i]} ({p10.flat[i]:g} and {p90.flat[i]:g})" for i in bad]
        raise ValueError(
            f"no common scale: P10 of the class activations must lie below P90, but does not for {', '.join(names)}. "
            "Leave these classes out, take percentiles further apart (1 and 99), or use image_extremes"
        )
    return alpha[()], beta[()]


def common_scale(low: np.ndarray, high: np.ndarray, kind: str = "tanh") -> tuple[np.ndarray, np.ndarray]:
    """Alpha and beta of each class, float64 (C,) (eq. 2), of its exact P10 and P90. `kind`: 'tanh' or 'linear' (A40).

    A class whose activations do not vary between the bounds has NaN in both: resampled, a constant map varies by
    rounding, so a spread of 8 machine epsilons of float32 does not count.
    """
    alpha, beta = np.full((2, len(low)), np.nan)
    varies = high - low > 8 * np.finfo(np.float32).eps * np.maximum(abs(low), abs(high))
    alpha[varies], beta[varies] = {"tanh": tanh_scale, "linear": linear_scale}[_known(kind)](low[varies], high[varies])
    return alpha, beta


def _known(kind: str) -> str:
    if kind not in ("tanh", "linear"):
        raise ValueError(f"unknown scale {kind!r}; choose tanh or linear")
    return kind


def scaled(raw: Tensor, alpha: ArrayLike, beta: ArrayLike, kind: str = "tanh") -> Tensor:
    """Raw maps on the common scale: ``tanh(alpha raw + beta)`` ('tanh') or ``alpha raw + beta`` ('linear'). Signed, no
    rectification.

    Parameters
    ----------
    raw : float (..., h, w), or (..., C, h, w) for alpha and beta of C classes
    alpha, beta : float or float (C,)
    kind : {'tanh', 'linear'}

    Returns
    -------
    float, shaped like `raw`; 'tanh' in [-1, 1].
    """
    alpha, beta = (torch.as_tensor(v, dtype=raw.dtype, device=raw.device)[..., None, None] for v in (alpha, beta))
    line = alpha * raw + beta
    return line.tanh() if _known(kind) == "tanh" else line


def s_cam(
    raw: Tensor,
    alpha: ArrayLike,
    beta: ArrayLike,
    size: int | tuple[int, int],
    *,
    order: str = "resize_first",
    kind: str = "tanh",
) -> Tensor:
    """S-CAM (eq. 1): raw maps (..., C, h, w) on the common scale, at the size of the film.

    ``order='scale_first'`` scales before it resamples (A42), which is not the same for tanh. The other parameters as
    for `scaled`.
    """
    if order not in ("resize_first", "scale_first"):
        raise ValueError(f"unknown order {order!r}; choose resize_first or scale_first")
    if order == "resize_first":
        return scaled(resize(raw, size), alpha, beta, kind)
    return resize(scaled(raw, alpha, beta, kind), size)

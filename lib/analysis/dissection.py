"""Pathology-related concepts of single channels (Khakzar et al., sections 3.2 and 4, after Bau et al.).

Three steps over the annotated films: the threshold of each channel over the whole set (`StreamingQuantile`), the connected components of
the thresholded maps that meet a box (`count_concepts`), and their totals per film (`concept_totals`).
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from lib.analysis.localization import grouped_pixel_boxes


def _compiled(function):
    """Compile to machine code without the interpreter lock, cached on disk where some cache folder can be written."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:                                        # numba found no writable cache folder
        return njit(nogil=True)(function)


# --- thresholds ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholds:
    """Per channel, float32 (F,): ``tau`` (the quantile), ``low``, ``high`` (extremes); bool (F,) ``usable``, see `StreamingQuantile`."""

    tau: np.ndarray
    low: np.ndarray
    high: np.ndarray
    usable: np.ndarray


class StreamingQuantile:
    """Exact (1 - q)-quantile of each channel over a set of films that is seen once, batch by batch (``P(A_c >= tau_c) = q``).

    Only the largest ``ceil(q N)`` values of a channel (and a quarter more, as room to work) are held: about ``1.25 q`` of all maps.
    The result does not depend on the order or the size of the batches.

    Parameters
    ----------
    q : float in (0, 1)
        Share of the values at or above the threshold.
    n_films : int
        Films that will be seen in all.
    layer : str
        Named in errors.
    """

    def __init__(self, q: float, n_films: int, layer: str = "the layer"):
        if not 0 < q < 1:
            raise ValueError(f"q must lie between 0 and 1, got {q}")
        if n_films < 1:
            raise ValueError(f"a quantile needs at least one film, got {n_films}")
        self.q, self.n_films, self.layer = q, n_films, layer
        self._seen = 0
        self._kept = None

    def update(self, maps: Tensor) -> None:
        """Take in the maps of some more films, float32 (B, F, h, w).

        Raises
        ------
        ValueError
            NaN or infinite values (names layer and channel), another shape than before, more films than announced.
        """
        maps = _float32_maps(maps)
        batch, channels, height, width = maps.shape
        if batch == 0:
            return
        if self._kept is None:
            self._start(channels, height, width)
        if (channels, height, width) != self._shape:
            raise ValueError(f"{self.layer}: maps of {(channels, height, width)} after maps of {self._shape}; one quantile needs one shape")
        if self._seen + batch > self.n_films:
            raise ValueError(f"{self.layer}: more than the {self.n_films} films that were announced")
        for film in maps:                                       # one by one: a film's maps stay in the processor's cache
            low = film.amin(dim=(1, 2)).numpy()
            if not (np.isfinite(low).all() and torch.isfinite(film.max())):     # extremes pass NaN on
                channel = int((~torch.isfinite(film)).flatten(1).any(dim=1).int().argmax())
                raise ValueError(f"{self.layer}: NaN or infinite activation in channel {channel} of film {self._seen}")
            self._seen += 1
            np.minimum(self._low, low, out=self._low)
            values, channel, word = film.flatten(1).numpy(), 0, 0
            while True:
                channel, word = _collect(values, self._bar, self._kept, self._filled, channel, word)
                if channel == len(values):
                    break
                self._prune(channel)

    def result(self) -> Thresholds:
        """Thresholds after the last film.

        A channel is usable unless it is dead or constant (``high - low <= 1e-6 max(|low|, |high|)``) or so sparse that ``tau <= low``:
        there ``>= tau`` selects the whole film and P = q cannot hold.
        """
        if self._seen != self.n_films:
            raise ValueError(f"{self.layer}: {self._seen} films were seen, {self.n_films} announced")
        tau, high = np.empty((2, len(self._kept)), dtype=np.float32)
        for channel, filled in enumerate(self._filled):
            high[channel] = self._kept[channel, :filled].max()
            lowest = filled - self._m
            ranks = [lowest, min(lowest + 1, filled - 1)]
            lower, upper = np.partition(self._kept[channel, :filled], ranks)[ranks].astype(np.float64)
            # In float64 and from the nearer end, as np.quantile does; the rank too, which float32 cannot hold for long streams.
            step, fraction = upper - lower, self._fraction
            tau[channel] = lower + step * fraction if fraction < 0.5 else upper - step * (1 - fraction)
        magnitude = np.maximum(np.abs(self._low), np.abs(high)).astype(np.float64)
        spread = high.astype(np.float64) - self._low
        usable = (spread > 1e-6 * magnitude) & (tau > self._low)
        return Thresholds(tau, self._low.copy(), high, usable)

    def _start(self, channels: int, height: int, width: int) -> None:
        total = self.n_films * height * width
        rank = (total - 1) * (1 - self.q)
        self._fraction = rank - np.floor(rank)
        self._m = total - int(np.floor(rank))
        self._shape = (channels, height, width)
        room = min(self._m + max(64, self._m // 4), total + 16)
        self._kept = np.empty((channels, room), dtype=np.float32)
        self._filled = np.zeros(channels, dtype=np.int64)
        self._bar = np.full(channels, -np.inf, dtype=np.float32)    # a value at or below it is not among the m largest
        self._low = np.full(channels, np.inf, dtype=np.float32)

    def _prune(self, channel: int) -> None:
        held = self._kept[channel, :self._filled[channel]]
        surplus = len(held) - self._m
        held.partition(surplus)
        self._bar[channel] = held[surplus]
        self._kept[channel, :self._m] = held[surplus:].copy()
        self._filled[channel] = self._m


@_compiled
def _collect(values, bar, kept, filled, channel, word):
    """Append the values above each channel's bar to its list, from ``channel``, ``word`` on; return where a list was full, or the end."""
    channels, n = values.shape
    room = kept.shape[1]
    flags = np.zeros(-(-n // 8) * 8, np.uint8)
    words = flags.view(np.uint64)                               # eight flags at a time: most hold nothing
    while channel < channels:
        level, source, target, count = bar[channel], values[channel], kept[channel], filled[channel]
        for i in range(n):
            flags[i] = source[i] > level
        while word < len(words):
            if words[word]:
                if count + 8 > room:
                    filled[channel] = count
                    return channel, word
                for i in range(8 * word, min(8 * word + 8, n)):
                    target[count] = source[i]                   # overwritten by the next one unless it counts
                    count += flags[i]
            word += 1
        filled[channel] = count
        channel, word = channel + 1, 0
    return channel, word


# --- components ---------------------------------------------------------------------------------------------------------------------


def count_concepts(maps: Tensor, tau: np.ndarray, boxes: Sequence, image_size: int, *, resolution: str = "image", connectivity: int = 8,
                   clip: bool = False, rounding: str = "outward", usable: np.ndarray | None = None) -> np.ndarray:
    """Connected components of ``A >= tau`` that share at least one pixel with the union of the film's boxes, for every film and channel.

    The full mask is labelled, then tested: a component that a box cuts, or that two boxes touch, counts once.

    Parameters
    ----------
    maps : float32 (B, F, h, w)
    tau : float (F,)
        Thresholds, from `StreamingQuantile`.
    boxes : sequence of B arrays (K, 4)
        All boxes of each film, of any class: x1, y1, x2, y2 in pixels at ``image_size``, x2 and y2 exclusive.
    image_size : int
        Side of the film in pixels.
    resolution : {'image', 'native'}
        'image': the maps are enlarged bilinearly to the film before the threshold (in float32, as torch does it). 'native': the mask of the
        map itself; a box covers every cell that one of its pixels lies in.
    connectivity : {8, 4}
    clip : bool
        The mask is multiplied by the boxes before it is labelled (the other reading): a component that boxes cut counts several times.
    rounding : {'outward', 'trunc'}
        See `localization.pixel_boxes`.
    usable : bool (F,), optional
        Channels to count; the others give 0. Default all.

    Returns
    -------
    int32 (B, F)

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown option, maps that are not float32 (counts from bfloat16 differ), NaN or infinity above tau.
    """
    maps = _float32_maps(maps)
    batch, channels, height, width = maps.shape
    tau = np.ascontiguousarray(tau, dtype=np.float32)
    usable = np.ones(channels, dtype=bool) if usable is None else np.ascontiguousarray(usable, dtype=bool)
    if tau.shape != (channels,) or usable.shape != (channels,):
        raise ValueError(f"need one threshold for each of {channels} channels, got tau {tau.shape} and usable {usable.shape}")
    if np.isnan(tau[usable]).any():
        raise ValueError(f"tau of channel {int(np.flatnonzero(np.isnan(tau) & usable)[0])} is NaN")
    if len(boxes) != batch:
        raise ValueError(f"need one list of boxes a film: {batch} films, {len(boxes)} lists")
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity must be 4 or 8, got {connectivity!r}")
    values = maps.numpy()
    counts = np.zeros((batch, channels), dtype=np.int32)
    reach = int(connectivity == 8)
    pieces, film = grouped_pixel_boxes(boxes, image_size, rounding=rounding)
    if resolution == "native":                                  # the cells that at least one pixel of a box lies in
        sides = np.array([width, height])
        pieces = np.concatenate([pieces[:, :2] * sides // image_size, -(-pieces[:, 2:] * sides // image_size)], axis=1)
        inside = _running(pieces, film, batch, height, width)
        bad = _count_native(values.reshape(batch, channels, height * width), width, tau, usable, inside, reach, clip, counts)
    elif resolution == "image":
        inside = _running(pieces, film, batch, image_size, image_size)
        # Cells whose corners are all below this cannot reach tau, not even through rounding.
        level = tau.astype(np.float64)
        level = np.nextafter((level - 1e-6 * np.abs(level) - 1e-44).astype(np.float32), np.float32(-np.inf))
        bad = _count_image(values, tau, level, usable, inside, reach, clip, *_taps(height, image_size), *_taps(width, image_size), counts)
    else:
        raise ValueError(f"resolution must be 'image' or 'native', got {resolution!r}")
    if bad >= 0:
        raise ValueError(f"NaN or infinite activation in channel {bad % channels} of film {bad // channels} of the batch")
    return counts


@_compiled
def _running(pieces, film, batch, height, width):
    """int32 (B, height, width + 1): how many covered pixels of a row lie left of each column; a run meets the boxes where it grows."""
    inside = np.zeros((batch, height, width + 1), np.int32)
    for k in range(len(pieces)):
        for y in range(pieces[k, 1], pieces[k, 3]):
            for x in range(pieces[k, 0], pieces[k, 2]):
                inside[film[k], y, x + 1] = 1
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                inside[b, y, x + 1] += inside[b, y, x]
    return inside


def _taps(n: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float32 weights of the lower and upper native cell of each output pixel, as torch rounds them, and where each cell's pixels start."""
    half = np.float32(0.5)
    source = (np.arange(size, dtype=np.float32) + half) * (np.float32(n) / np.float32(size)) - half
    source = np.maximum(source, np.float32(0)) if n != size else np.arange(size, dtype=np.float32)
    low = np.minimum(np.floor(source).astype(np.int64), n - 1)
    upper = np.clip(source - low.astype(np.float32), np.float32(0), np.float32(1))
    return (np.float32(1) - upper).astype(np.float32), upper, np.searchsorted(low, np.arange(n + 1))


@intrinsic
def _fma(typing_context, a, b, c):
    """``a b + c`` rounded once, which is how torch's kernel is compiled."""
    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)
    return types.float32(types.float32, types.float32, types.float32), generate


@_compiled
def _components(n_runs, row, start, end, touches, parent, reach):
    """Components among runs sorted by row and column that hold a run which touches a box; ``touches`` and ``parent`` are overwritten."""
    if n_runs == 1:
        return int(touches[0])
    first = 0
    for r in range(n_runs):
        parent[r] = r
        above = row[r] - 1
        while first < r and (row[first] < above or (row[first] == above and end[first] + reach <= start[r])):
            first += 1
        other = first
        while other < r and row[other] == above and start[other] < end[r] + reach:
            a = other
            while parent[a] != a:
                parent[a] = parent[parent[a]]
                a = parent[a]
            b = r
            while parent[b] != b:
                parent[b] = parent[parent[b]]
                b = parent[b]
            if a != b:
                a, b = min(a, b), max(a, b)
                parent[b] = a
                touches[a] |= touches[b]
            other += 1
    total = 0
    for r in range(n_runs):
        total += parent[r] == r and touches[r]
    return total


@_compiled
def _add_run(n_runs, row, start, end, touches, y, begin, stop, inside, clip):
    """Append pixels [begin, stop) of row ``y`` to the runs, cut to the boxes with ``clip``; ``inside`` as from `_running`."""
    if not clip:
        row[n_runs] = y
        start[n_runs] = begin
        end[n_runs] = stop
        touches[n_runs] = inside[stop] > inside[begin]
        return n_runs + 1
    x = begin
    while x < stop:
        if inside[x + 1] == inside[x]:
            x += 1
            continue
        row[n_runs] = y
        start[n_runs] = x
        touches[n_runs] = True
        while x < stop and inside[x + 1] > inside[x]:
            x += 1
        end[n_runs] = x
        n_runs += 1
    return n_runs


@_compiled
def _at_least(values, level, flags, words, index):
    """Positions of the values not below ``level`` (NaN is found too); returns how many. ``words`` is ``flags`` read eight at a time."""
    n = len(values)
    for i in range(n):
        flags[i] = not (values[i] < level)
    found = 0
    for word in range(len(words)):
        if words[word]:
            for i in range(8 * word, 8 * word + 8):
                index[found] = i
                found += flags[i]
    return found


@_compiled
def _count_native(values, width, tau, usable, inside, reach, clip, counts):
    """Fill ``counts``; return -1, or film * channels + channel of the first map with a value that is not finite."""
    batch, channels, n = values.shape
    row, start, end, parent = np.empty((4, n // width * (width // 2 + 1)), np.int32)
    touches = np.empty(len(row), np.bool_)
    flags = np.zeros(-(-n // 8) * 8, np.uint8)
    words = flags.view(np.uint64)
    index = np.empty(len(flags) + 8, np.int32)
    for film in range(batch):
        if inside[film, :, -1].max() == 0:
            continue
        for channel in range(channels):
            if not usable[channel]:
                continue
            found = _at_least(values[film, channel], tau[channel], flags, words, index)
            if found == 0:
                continue
            n_runs, k = 0, 0
            while k < found:
                first = index[k]
                y = first // width
                length = 0
                while k < found and index[k] == first + length and index[k] < (y + 1) * width:
                    if not np.isfinite(values[film, channel, index[k]]):
                        return film * channels + channel
                    k += 1
                    length += 1
                begin = first - y * width
                n_runs = _add_run(n_runs, row, start, end, touches, y, begin, begin + length, inside[film, y], clip)
            counts[film, channel] = _components(n_runs, row, start, end, touches, parent, reach)
    return -1


@_compiled
def _count_image(values, tau, level, usable, inside, reach, clip, y_low, y_high, y_start, x_low, x_high, x_start, counts):
    """As `_count_native`, on the enlarged maps.

    A cell is the square between four native points; its pixels are interpolated from these alone. A cell without a point at ``level`` (just
    below tau) is skipped. Along a row of a cell the map is a straight line, so its two ends tell where it crosses tau.
    """
    batch, channels, height, width = values.shape
    size = inside.shape[1]
    n = height * width
    row, start, end, parent = np.empty((4, size * (size // 2 + 1)), np.int32)
    touches = np.empty(len(row), np.bool_)
    flags = np.zeros(-(-n // 8) * 8, np.uint8)
    words = flags.view(np.uint64)
    index = np.empty(len(flags) + 8, np.int32)
    active = np.zeros((height, width), np.bool_)
    row_active = np.zeros(height, np.bool_)
    top, bottom = np.empty((2, size), np.float32)
    cells = np.empty(width, np.int64)
    slack = np.empty(width, np.float32)
    for film in range(batch):
        if inside[film, :, -1].max() == 0:
            continue
        for channel in range(channels):
            if not usable[channel]:
                continue
            a = values[film, channel]
            threshold, floor = tau[channel], level[channel]
            flat = a.reshape(n)
            found = _at_least(flat, floor, flags, words, index)
            if found == 0:
                continue
            for k in range(found):
                if not np.isfinite(flat[index[k]]):
                    return film * channels + channel
                y = index[k] // width
                x = index[k] - y * width
                for up in range(max(y - 1, 0), y + 1):
                    row_active[up] = True
                    for left in range(max(x - 1, 0), x + 1):
                        active[up, left] = True
            n_runs = 0
            for y in range(height):
                if not row_active[y]:
                    continue
                row_active[y] = False
                below = min(y + 1, height - 1)
                n_cells = 0
                for x in range(width):
                    if not active[y, x]:
                        continue
                    active[y, x] = False
                    if x_start[x] == x_start[x + 1]:
                        continue
                    beside = min(x + 1, width - 1)
                    tl, tr, bl, br = a[y, x], a[y, beside], a[below, x], a[below, beside]
                    for i in range(x_start[x], x_start[x + 1]):
                        top[i] = _fma(tl, x_low[i], tr * x_high[i])
                        bottom[i] = _fma(bl, x_low[i], br * x_high[i])
                    cells[n_cells] = x
                    # Where the step from pixel to pixel exceeds what rounding can move, a row of the cell rises or falls strictly.
                    largest = max(abs(tl), abs(tr), abs(bl), abs(br))
                    slack[n_cells] = np.float32(1e-6 * (x_start[x + 1] - x_start[x])) * max(largest, np.float32(1e-30))
                    n_cells += 1
                for j in range(y_start[y], y_start[y + 1]):
                    up, down = y_low[j], y_high[j]
                    begin, stop = -1, -1
                    for k in range(n_cells):
                        first, last = x_start[cells[k]], x_start[cells[k] + 1] - 1
                        low = _fma(top[first], up, bottom[first] * down)
                        high = _fma(top[last], up, bottom[last] * down)
                        if slack[k] < abs(high - low) < np.inf:
                            if low < threshold and high < threshold:
                                continue
                            i, until = first, last + 1
                            if low < threshold:                 # rises: from the crossing of the line step to the first pixel at tau
                                i = first + int((last - first) * ((threshold - low) / (high - low)))
                                while _fma(top[i], up, bottom[i] * down) >= threshold:
                                    i -= 1
                                while _fma(top[i], up, bottom[i] * down) < threshold:
                                    i += 1
                            elif high < threshold:              # falls
                                until = first + int((last - first) * ((threshold - low) / (high - low)))
                                while _fma(top[until], up, bottom[until] * down) < threshold:
                                    until -= 1
                                while _fma(top[until], up, bottom[until] * down) >= threshold:
                                    until += 1
                            if i != stop:
                                if begin >= 0:
                                    n_runs = _add_run(n_runs, row, start, end, touches, j, begin, stop, inside[film, j], clip)
                                begin = i
                            stop = until
                            continue
                        for i in range(first, last + 1):
                            if _fma(top[i], up, bottom[i] * down) >= threshold:
                                if i != stop:
                                    if begin >= 0:
                                        n_runs = _add_run(n_runs, row, start, end, touches, j, begin, stop, inside[film, j], clip)
                                    begin = i
                                stop = i + 1
                    if begin >= 0:
                        n_runs = _add_run(n_runs, row, start, end, touches, j, begin, stop, inside[film, j], clip)
            counts[film, channel] = _components(n_runs, row, start, end, touches, parent, reach)
    return -1


# --- totals -------------------------------------------------------------------------------------------------------------------------


def concept_totals(counts: np.ndarray) -> pd.DataFrame:
    """Per film: ``disjoint``, the concepts of all channels, and ``unique``, the channels with at least one; from counts (B, F)."""
    counts = np.asarray(counts)
    return pd.DataFrame({"disjoint": counts.sum(axis=1), "unique": (counts > 0).sum(axis=1)})


def concept_means(totals: pd.DataFrame, weights: np.ndarray | None = None) -> pd.Series:
    """Disjoint and Unique of a set of films (Khakzar et al., section 4): totals divided by the number of films.

    ``weights`` (one a film, such as its number of (image, label) pairs) gives the other reading, in which a film counts once for every box.
    """
    values = np.average(totals[["disjoint", "unique"]].to_numpy(np.float64), axis=0, weights=weights)
    return pd.Series(values, index=["disjoint", "unique"])


def _float32_maps(maps: Tensor) -> Tensor:
    maps = torch.as_tensor(maps)
    if maps.ndim != 4 or maps.dtype != torch.float32:
        raise ValueError(f"maps must be float32 (B, F, h, w), got {maps.dtype} {tuple(maps.shape)}; counts need full precision features")
    return maps.detach().cpu().contiguous()

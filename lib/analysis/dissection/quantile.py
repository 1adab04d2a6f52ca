"""The threshold of each channel: an exact quantile over a whole set of films, seen once, batch by batch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.analysis.bilinear import compiled
from lib.analysis.dissection.components import enlarged, float32_maps


@dataclass(frozen=True)
class Thresholds:
    """Per channel, float32 (F,): ``tau`` (the quantile), ``low``, ``high`` (extremes of the native maps); bool (F,)
    ``usable``, see `StreamingQuantile.result`."""

    tau: np.ndarray
    low: np.ndarray
    high: np.ndarray
    usable: np.ndarray


class StreamingQuantile:
    """Exact (1 - q)-quantile of each channel over a set of films that is seen once, batch by batch (``P(A_c >= tau_c) =
    q``).

    Only the largest ``ceil(q N)`` values of a channel (and a quarter more, as room to work) are held: about ``1.25 q``
    of all maps. The result does not depend on the order or the size of the batches.

    Parameters
    ----------
    q : float in (0, 1)
        Share of the values at or above the threshold.
    n_films : int
        Films that will be seen in all.
    layer : str
        Named in errors.
    image_size : int, optional
        Side of the film in pixels: the values are those of the maps enlarged to it bilinearly (the authors' code).
        Default the native maps (Bau et al.). What is held is then a share of the enlarged maps: 880 films at 224 pixels
        with 512 channels and q = 0.01 take 1.1 GB, with 1024 channels and q = 0.04 9 GB.
    """

    def __init__(self, q: float, n_films: int, layer: str = "the layer", image_size: int | None = None):
        if not 0 < q < 1:
            raise ValueError(f"q must lie between 0 and 1, got {q}")
        if n_films < 1:
            raise ValueError(f"a quantile needs at least one film, got {n_films}")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        self.q, self.n_films, self.layer, self.image_size = q, n_films, layer, image_size
        self._seen = 0
        self._kept = None

    def update(self, maps: Tensor) -> None:
        """Take in the maps of some more films, float32 (B, F, h, w).

        Raises
        ------
        ValueError
            NaN or infinite values (names layer and channel), another shape than before, more films than announced.
        """
        maps = float32_maps(maps)
        batch, channels, height, width = maps.shape
        if batch == 0:
            return
        if self._kept is None:
            self._start(channels, height, width)
        if (channels, height, width) != self._shape:
            shapes = f"maps of {(channels, height, width)} after maps of {self._shape}"
            raise ValueError(f"{self.layer}: {shapes}; one quantile needs one shape")
        if self._seen + batch > self.n_films:
            raise ValueError(f"{self.layer}: more than the {self.n_films} films that were announced")
        for film in maps:  # one by one: a film's maps stay in the processor's cache
            low, high = film.amin(dim=(1, 2)).numpy(), film.amax(dim=(1, 2)).numpy()
            if not (np.isfinite(low).all() and np.isfinite(high).all()):  # extremes pass NaN on
                channel = int((~torch.isfinite(film)).flatten(1).any(dim=1).int().argmax())
                raise ValueError(f"{self.layer}: NaN or infinite activation in channel {channel} of film {self._seen}")
            self._seen += 1
            np.minimum(self._low, low, out=self._low)
            np.maximum(self._high, high, out=self._high)
            for first, part in [(0, film)] if self.image_size is None else enlarged(film, self.image_size):
                self._take_in(part.flatten(1).numpy(), first)

    def result(self) -> Thresholds:
        """Thresholds after the last film.

        A channel is usable unless it is dead or constant (``high - low <= 1e-6 max(|low|, |high|)``) or so sparse that
        ``tau <= low``: there ``>= tau`` selects the whole film and P = q cannot hold. Of enlarged maps ``tau`` counts
        as ``low`` within 1e-6 of it, because interpolation rounds.
        """
        if self._seen != self.n_films:
            raise ValueError(f"{self.layer}: {self._seen} films were seen, {self.n_films} announced")
        tau = np.empty(len(self._kept), dtype=np.float32)
        for channel, filled in enumerate(self._filled):
            lowest = filled - self._m
            ranks = [lowest, min(lowest + 1, filled - 1)]
            lower, upper = np.partition(self._kept[channel, :filled], ranks)[ranks].astype(np.float64)
            # In float64 and from the nearer end, as np.quantile does; the rank too, which float32 cannot hold for long
            # streams.
            step, fraction = upper - lower, self._fraction
            tau[channel] = lower + step * fraction if fraction < 0.5 else upper - step * (1 - fraction)
        low, high = self._low.astype(np.float64), self._high.astype(np.float64)
        rounding = 0 if self.image_size is None else 1e-6 * np.abs(low)
        usable = (high - low > 1e-6 * np.maximum(np.abs(low), np.abs(high))) & (tau > low + rounding)
        return Thresholds(tau, self._low.copy(), self._high.copy(), usable)

    def _start(self, channels: int, height: int, width: int) -> None:
        total = self.n_films * (height * width if self.image_size is None else self.image_size**2)
        rank = (total - 1) * (1 - self.q)
        self._fraction = rank - np.floor(rank)
        self._m = total - int(np.floor(rank))
        self._shape = (channels, height, width)
        room = min(self._m + max(64, self._m // 4), total + 16)
        self._kept = np.empty((channels, room), dtype=np.float32)
        self._filled = np.zeros(channels, dtype=np.int64)
        self._bar = np.full(channels, -np.inf, dtype=np.float32)  # a value at or below it is not among the m largest
        self._low = np.full(channels, np.inf, dtype=np.float32)
        self._high = np.full(channels, -np.inf, dtype=np.float32)

    def _take_in(self, values: np.ndarray, first: int) -> None:
        those = slice(first, first + len(values))
        bar, kept, filled = self._bar[those], self._kept[those], self._filled[those]
        channel, word = 0, 0
        while True:
            channel, word = _collect(values, bar, kept, filled, channel, word)
            if channel == len(values):
                return
            self._prune(first + channel)

    def _prune(self, channel: int) -> None:
        held = self._kept[channel, : self._filled[channel]]
        surplus = len(held) - self._m
        held.partition(surplus)
        self._bar[channel] = held[surplus]
        self._kept[channel, : self._m] = held[surplus:].copy()
        self._filled[channel] = self._m


def batch_thresholds(maps: Tensor, q: float, layer: str = "the layer", image_size: int | None = None) -> Thresholds:
    """Thresholds of these maps alone, float32 (B, F, h, w): quantiles of a batch, as the authors' code takes them, not
    of the whole set.

    What a film counts then depends on which films share its batch; for comparison only. Parameters as
    `StreamingQuantile`.
    """
    quantile = StreamingQuantile(q, len(maps), layer, image_size)
    quantile.update(maps)
    return quantile.result()


@compiled
def _collect(values, bar, kept, filled, channel, word):
    """Append the values above each channel's bar to its list, from ``channel``, ``word`` on; return where a list was
    full, or the end."""
    channels, n = values.shape
    room = kept.shape[1]
    flags = np.zeros(-(-n // 8) * 8, np.uint8)
    words = flags.view(np.uint64)  # eight flags at a time: most hold nothing
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
                    target[count] = source[i]  # overwritten by the next one unless it counts
                    count += flags[i]
            word += 1
        filled[channel] = count
        channel, word = channel + 1, 0
    return channel, word

"""Do the channels that dissection counts answer to the lesion? A causal test, where a film can be had without it.

Dissection counts a channel where one of its regions meets a box. That is a coincidence of places: a channel that is
busy everywhere meets boxes too. Where films are simulated the same film exists with and without its lesion, all else
equal to the pixel, so that whatever a channel changes the lesion has caused.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import scipy

from lib.analysis.dissection.components import count_concepts
from lib.analysis.dissection.quantile import Thresholds
from lib.analysis.inference import Output, layer_maps

RESPONDS = 1.0  # standard deviations over films


class Readings(NamedTuple):
    """What each channel shows of each pair.

    Attributes
    ----------
    activation : ndarray, float64 (P, F)
        Mean over the lesion.
    counted : ndarray, bool (P, F)
        Whether a region above the channel's threshold meets the boxes: a concept.
    """

    activation: np.ndarray
    counted: np.ndarray


def channel_readings(
    outputs: Iterable[Output],
    lesions: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    thresholds: Thresholds,
    *,
    layer: str,
    image_size: int,
    **options,
) -> Readings:
    """Read every channel where the lesion of each pair lies, or would lie.

    Parameters
    ----------
    outputs : iterable of Output
        A film a pair, in the order of the pairs, with maps of `layer`.
    lesions : sequence of P arrays, bool (S, S)
        Pixels of the lesion, at any size.
    boxes : sequence of P arrays (K, 4)
        Of the lesion, in pixels of films of `image_size`.
    thresholds : Thresholds
        Of the films as they are: the same for films with the lesion and without.
    layer, image_size, options
        As of the dissection, see `components.count_concepts`.

    Raises
    ------
    ValueError
        A lesion without a pixel, or as many films as pairs are not there.
    """
    activation, counted, start = [], [], 0
    for output in outputs:
        maps = layer_maps(output, layer).float().cpu().contiguous()
        those = slice(start, start + len(maps))
        start += len(maps)
        shape = maps.shape[:1:-1]  # OpenCV's order: width, height
        shares = [cv2.resize(one.astype(np.float64), shape, interpolation=cv2.INTER_AREA) for one in lesions[those]]
        weights = np.stack(shares)
        if len(weights) < len(maps) or not (weights.sum(axis=(1, 2)) > 0).all():
            raise ValueError("every film must have a pair of its own, and every pair a lesion with a pixel")
        inside = np.einsum("pfhw,phw->pf", maps.double().numpy(), weights, optimize=True)
        activation.append(inside / weights.sum(axis=(1, 2))[:, None])
        found = count_concepts(maps, thresholds.tau, boxes[those], image_size, usable=thresholds.usable, **options)
        counted.append(found > 0)
    if start != len(lesions):
        raise ValueError(f"{len(lesions)} pairs, but {start} films")
    return Readings(np.concatenate(activation), np.concatenate(counted))


def responses(present: Readings, absent: Readings) -> np.ndarray:
    """How far the lesion moves each channel, float64 (P, F): the paired difference of the films with and without it,
    in standard deviations of the channel over the films without (Glass's delta, pair by pair). NaN for a channel that
    is the same on all of those."""
    spread = absent.activation.std(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, (present.activation - absent.activation) / spread, np.nan)


def causal_summary(present: Readings, absent: Readings) -> dict[str, float]:
    """Whether what dissection counts is what the lesion causes.

    Parameters
    ----------
    present, absent : Readings
        Of the films with the lesion, and of the same films without.

    Returns
    -------
    dict of float, NaN where it is undefined
        concepts: channels that are counted, a pair. survive: the share of these counts that stand, too, when the lesion
        is gone. responds_counted, responds_uncounted: shares of the counts, and of the channels that are not counted on
        a film, that the lesion moves by `RESPONDS` or more, either way. agreement: Spearman's correlation over the
        channels between how often each is counted and how far, either way, lesions move it on the mean.
    """
    moved, counted = responses(present, absent), present.counted
    known = np.isfinite(moved).all(axis=0)
    responds = np.abs(moved[:, known]) >= RESPONDS
    often, far = counted[:, known].mean(axis=0), np.abs(moved[:, known]).mean(axis=0)
    defined = len(often) > 1 and np.ptp(often) > 0 and np.ptp(far) > 0
    return {
        "concepts": float(counted.sum(axis=1).mean()),
        "survive": _share(absent.counted[counted]),
        "responds_counted": _share(responds[counted[:, known]]),
        "responds_uncounted": _share(responds[~counted[:, known]]),
        "agreement": float(scipy.stats.spearmanr(often, far).statistic) if defined else np.nan,
    }


def _share(chosen: np.ndarray) -> float:
    return float(chosen.mean()) if len(chosen) else np.nan

"""Straight rulers: maps and channels whose score is known beforehand, made from the phantom's exact lesion masks."""

import cv2
import numpy as np
import torch

from lib.analysis.localization import box_mask

UNHEALTHY = "Unhealthy"


def lesion_maps(masks, classes, boxed, boxes, size):
    """Maps that a perfect class activation would give, 1 on the lesion and 0 elsewhere, and how well they can score.

    A finding may have parts outside its box, which is drawn around the largest one: the maps hold what lies in the
    boxes.

    Parameters
    ----------
    masks : sequence of P dictionaries
        Class to bool (S, S), the lesions of each pair's film.
    classes : sequence of P str
        Class of each pair; 'Unhealthy' takes the lesions of all classes in `boxed`.
    boxed : collection of str
        Classes that radiologists box.
    boxes : sequence of P arrays (K, 4)
        Boxes of each pair, in pixels of films of side `size`.
    size : int
        Side of the maps.

    Returns
    -------
    maps : ndarray, float32 (P, size, size) in [0, 1]
    attainable : ndarray, float64 (P,)
        Share of the boxes that the lesion fills: no map that keeps to the lesion has a higher IoBB.
    """
    maps, attainable = np.zeros((len(classes), size, size), np.float32), np.full(len(classes), np.nan)
    for p, (lesions, name, corners) in enumerate(zip(masks, classes, boxes)):
        lesion = union(lesions, name, boxed)
        if lesion is None:
            continue
        inside = box_mask(np.asarray(corners) * len(lesion) / size, len(lesion))
        attainable[p] = (lesion & inside).sum() / max(inside.sum(), 1)
        resized = cv2.resize((lesion & inside).astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
        maps[p] = np.clip(resized, 0, 1) * box_mask(corners, size)
    return maps, attainable


def union(lesions, name, boxed):
    """Pixels of the lesions that count for class `name`, bool (S, S), or None where the film has none."""
    wanted = [mask for key, mask in lesions.items() if key == name or (name == UNHEALTHY and key in boxed)]
    return np.any(wanted, axis=0) if wanted else None


def planted_channels(masks, boxed, size, rng):
    """Feature maps with a known answer: a lesion detector, the same maps on other films, noise, and a dead channel.

    Parameters
    ----------
    masks, boxed, size
        As in `lesion_maps`, N films.
    rng : numpy.random.Generator

    Returns
    -------
    maps : Tensor, float32 (N, 4, size, size)
    names : list of 4 str
    q : float
        Share of all positions that lie on a lesion: at this q the detector's threshold cuts out just the lesions.
    """
    exact = np.zeros((len(masks), size, size), np.float32)
    for n, lesions in enumerate(masks):
        lesion = union(lesions, UNHEALTHY, boxed)
        if lesion is not None:
            exact[n] = np.clip(cv2.resize(lesion.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA), 0, 1)
    noise = rng.random(exact.shape, dtype=np.float32)
    maps = np.stack([exact, exact[rng.permutation(len(exact))], noise, np.zeros_like(exact)], axis=1)
    names = ["lesion detector", "detector, films shuffled", "noise", "dead"]
    return torch.from_numpy(maps), names, float((exact >= 0.5).mean().clip(1e-6, 0.5))

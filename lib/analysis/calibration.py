"""Straight rulers: maps and channels whose score is known beforehand, made from the phantom's exact lesion masks."""

import cv2
import numpy as np
import torch

UNHEALTHY = "Unhealthy"


def lesion_maps(masks, classes, boxed, size):
    """Maps that a perfect class activation would give: 1 on the lesion, 0 elsewhere, averaged over the cells at the border.

    Parameters
    ----------
    masks : sequence of P dictionaries
        Class to bool (S, S), the lesions of each pair's film.
    classes : sequence of P str
        Class of each pair; 'Unhealthy' takes the lesions of all classes in `boxed`.
    boxed : collection of str
        Classes that radiologists box.
    size : int
        Side of the maps.

    Returns
    -------
    ndarray, float32 (P, size, size) in [0, 1]
    """
    maps = np.zeros((len(classes), size, size), np.float32)
    for p, (lesions, name) in enumerate(zip(masks, classes, strict=True)):
        wanted = [mask for key, mask in lesions.items() if key == name or (name == UNHEALTHY and key in boxed)]
        if wanted:
            maps[p] = cv2.resize(np.any(wanted, axis=0).astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    return maps.clip(0, 1)  # averages of ones may round to more than 1


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
    """
    exact = lesion_maps(masks, [UNHEALTHY] * len(masks), boxed, size)
    noise = rng.random(exact.shape, dtype=np.float32)
    maps = np.stack([exact, exact[rng.permutation(len(exact))], noise, np.zeros_like(exact)], axis=1)
    return torch.from_numpy(maps), ["lesion detector", "detector, films shuffled", "noise", "dead"]

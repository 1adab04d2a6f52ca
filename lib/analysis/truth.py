"""Straight rulers: maps and channels whose score is known beforehand, made from the phantom's exact lesion masks."""

from collections.abc import Collection, Mapping, Sequence

import cv2
import numpy as np
import pandas as pd
import torch

from lib.analysis.cam import normalise
from lib.analysis.dissection.components import count_concepts
from lib.analysis.dissection.quantile import StreamingQuantile
from lib.analysis.localization import box_mask, box_masks, soft_overlap

UNHEALTHY = "Unhealthy"


def lesion_maps(
    masks: Sequence[Mapping[str, np.ndarray]],
    classes: Sequence[str],
    boxed: Collection[str],
    boxes: Sequence[np.ndarray],
    size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Maps that are 1 on the lesion and 0 elsewhere, and how much of its box each lesion fills.

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
        Side of the maps; a cell holds the share of it that the lesion covers.

    Returns
    -------
    maps : ndarray, float32 (P, size, size) in [0, 1]
    filled : ndarray, float64 (P,)
        Share of the boxes that the lesion fills, in the masks' own pixels; NaN where the film has no such lesion.
    """
    maps, filled = np.zeros((len(classes), size, size), np.float32), np.full(len(classes), np.nan)
    for p, (lesions, name, corners) in enumerate(zip(masks, classes, boxes)):
        lesion = union(lesions, name, boxed)
        if lesion is None:
            continue
        inside = box_mask(np.asarray(corners) * len(lesion) / size, len(lesion))
        filled[p] = (lesion & inside).sum() / max(inside.sum(), 1)
        maps[p] = _shrunk(lesion & inside, size) * box_mask(corners, size)
    return maps, filled


def ruler(
    masks: Sequence[Mapping[str, np.ndarray]],
    classes: Sequence[str],
    boxed: Collection[str],
    boxes: Sequence[np.ndarray],
    others: Sequence[np.ndarray],
    image_size: int,
    grid: int,
) -> pd.DataFrame:
    """Mean IoBB and IoR of maps with a known answer, and the share of the boxes that the lesions fill.

    In the pixels in which it was drawn an exact mask has IoBB `filled` and IoR 1. The same mask in the pixels of a
    smaller film keeps its IoR; its boxes grow to whole pixels there, so it fills less of them, and IoBB is again
    `filled`. In the cells of the model's maps, scaled to [0, 1] as every map is, it spills over the box: IoR is what
    the grid costs. `filled` is no ceiling: IoBB does not ask what lies outside, and a map that is 1 everywhere has 1.
    Only both together say that a map keeps to the lesion.

    Parameters
    ----------
    masks, classes, boxed
        As in `lesion_maps`.
    boxes, others : sequences of P arrays (K, 4)
        The pair's own boxes, and those of another film (`pairs.with_other_boxes`), in pixels of films of `image_size`.
    image_size, grid : int
        Side of the films, and of the maps of the layer that CAM reads.

    Returns
    -------
    DataFrame
        iobb, ior, filled (counted pixel by pixel, for the first two); a row for each kind of map.
    """
    drawn, parts = next(len(mask) for lesions in masks for mask in lesions.values()), []

    def exact(those: slice, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
        own = [np.asarray(corners) * size / image_size for corners in boxes[those]]
        return lesion_maps(masks[those], classes[those], boxed, own, size)[0], own

    for start in range(0, len(classes), 32):  # a few at a time: the films may be large
        rows, those = {}, slice(start, start + 32)
        for pixels, size in (("pixels it was drawn in", drawn), ("pixels of the film", image_size)):
            maps, own = exact(those, size)
            inside = box_masks(own, size)
            filled = (maps * inside).sum((1, 2), dtype=np.float64) / inside.sum((1, 2))
            rows[f"exact mask, {pixels}"] = soft_overlap(maps, own, size).assign(filled=filled)
        cells = normalise(torch.from_numpy(exact(those, grid)[0]))
        rows["exact mask, cells of the model's maps"] = soft_overlap(cells, own, image_size)
        rows["exact mask, boxes of another film"] = soft_overlap(maps, others[those], image_size)
        rows["1 everywhere"] = soft_overlap(np.ones_like(maps), own, image_size)
        parts.append(pd.concat(rows))
    return pd.concat(parts).groupby(level=0, sort=False)[["iobb", "ior", "filled"]].mean()


def union(lesions: Mapping[str, np.ndarray], name: str, boxed: Collection[str]) -> np.ndarray | None:
    """Pixels of the lesions that count for class `name`, bool (S, S), or None where the film has none."""
    wanted = [mask for key, mask in lesions.items() if key == name or (name == UNHEALTHY and key in boxed)]
    return np.any(wanted, axis=0) if wanted else None


def planted_channels(
    masks: Sequence[Mapping[str, np.ndarray]], boxed: Collection[str], size: int, rng: np.random.Generator
) -> tuple[torch.Tensor, list[str], float]:
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
    lesions = [union(film, UNHEALTHY, boxed) for film in masks]
    exact = np.stack([np.zeros((size, size), np.float32) if one is None else _shrunk(one, size) for one in lesions])
    noise = rng.random(exact.shape, dtype=np.float32)
    maps = np.stack([exact, exact[rng.permutation(len(exact))], noise, np.zeros_like(exact)], axis=1)
    names = ["lesion detector", "detector, films shuffled", "noise", "dead"]
    return torch.from_numpy(maps), names, float((exact >= 0.5).mean().clip(1e-6, 0.5))


def planted_concepts(
    masks: Sequence[Mapping[str, np.ndarray]], boxed: Collection[str], boxes: Sequence[np.ndarray], size: int
) -> pd.Series:
    """Share of films on which each of `planted_channels` holds a concept. `boxes` : of every film, in pixels of
    `size`."""
    maps, names, q = planted_channels(masks, boxed, size, np.random.default_rng(0))
    quantile = StreamingQuantile(q, len(maps), "planted channels")
    quantile.update(maps)
    known = quantile.result()
    found = count_concepts(maps, known.tau, list(boxes), size, usable=known.usable)
    return pd.Series((found > 0).mean(0), index=names, name="films with a concept")


def _shrunk(mask: np.ndarray, size: int) -> np.ndarray:
    """The share of each cell that a bool mask covers, float32 (size, size); OpenCV may leave [0, 1] by a rounding."""
    return np.clip(cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA), 0, 1)

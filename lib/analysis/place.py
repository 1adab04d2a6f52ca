"""Where the evidence of a map lies, by scores that neither a constant added to the map nor a scale can move.

A signed map ``sum_k w_k A_k`` has the logit's prior in it: a constant that has nothing to do with the place, which a
rectifier turns into an empty map or a full one. The scores here depend on the order of the map's values alone (hit,
AUPRC), or on the map scaled from its least to its largest value (IoU).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lib.analysis.cam import normalise, resize
from lib.analysis.localization import box_masks, threshold_iou

DRAWS = 32  # random maps that the AUPRC of chance is the mean over
SHARES = tuple(np.round(np.arange(0.05, 1, 0.05), 2).tolist())  # of the way from a map's least to its largest value


def metric_of(score: str, method: str) -> str:
    """The plan's name of a score of a method's maps: 'auprc' of CAM, 'auprc_lrp' of LRP."""
    return score if method == "cam" else f"{score}_{method}"


def place_scores(
    maps: Tensor | np.ndarray, boxes: Sequence, image_size: int, *, rounding: str = "outward"
) -> pd.DataFrame:
    """Hit, AUPRC and IoU of signed maps on the union of each one's boxes.

    Parameters
    ----------
    maps : float (P, h, w)
        Signed, at any size; they are resampled bilinearly to the film.
    boxes : sequence of P arrays (K, 4)
        x1, y1, x2, y2 in pixels of the film, x2 and y2 exclusive.
    image_size : int
        Side of the film in pixels.
    rounding : {'outward', 'trunc'}
        See `localization.pixel_boxes`.

    Returns
    -------
    DataFrame, one row a pair
        hit: the share of the pixels that hold the map's largest value which lie in a box, 1 or 0 but for ties (the
        pointing game of Zhang et al. 2016, without its tolerance). auprc: average precision of the pixels of the boxes
        against the pixels' values. What either is by chance depends on the map's grid, see `by_chance`. iou_<share>, of
        each of `SHARES`: IoU of the boxes with the pixels of which the map, scaled from its least to its largest value
        at its own size, has at least that. NaN where the boxes have no area on the film. Of a constant map hit and
        AUPRC are the share of the film that the boxes take, and IoU is 0.

    Raises
    ------
    ValueError
        A map that holds NaN or infinite values (names the pair), another number of maps than of boxes, an unknown
        option.
    """
    from sklearn.metrics import average_precision_score  # here: names of scores are asked for without it

    maps = torch.as_tensor(maps).detach().cpu().double()
    if maps.ndim != 3 or len(maps) != len(boxes):
        raise ValueError(
            f"need maps (P, h, w) and one list of boxes a map, got {tuple(maps.shape)} and {len(boxes)} lists"
        )
    if not len(maps):
        return pd.DataFrame(columns=["hit", "auprc", *iou_columns()], dtype=float)
    films = _films(maps, image_size)
    masks = box_masks(boxes, image_size, rounding=rounding).reshape(len(maps), -1)
    values = films.flatten(1).numpy()
    top = values == values.max(axis=1, keepdims=True)
    known = masks.any(axis=1)
    scores = pd.DataFrame({"hit": np.full(len(maps), np.nan), "auprc": np.nan})
    scores.loc[known, "hit"] = ((top & masks).sum(axis=1) / top.sum(axis=1))[known]
    scores.loc[known, "auprc"] = [average_precision_score(mask, row) for mask, row in zip(masks[known], values[known])]
    by_share = threshold_iou(films, boxes, image_size, SHARES, rounding=rounding)
    wide = by_share["iou_lesion"].to_numpy().reshape(len(maps), len(SHARES))
    return scores.join(pd.DataFrame(np.where(known[:, None], wide, np.nan), columns=iou_columns()))


def by_chance(grid: tuple[int, int], boxes: Sequence, image_size: int, *, rounding: str = "outward") -> pd.DataFrame:
    """Hit and AUPRC of maps that know nothing: of independent normal values in the cells of the native grid.

    The share of the film that the boxes take would be right for independent pixels. The largest value of a coarse map
    lies at the centre of a cell, and its pixels rise and fall together, by which the precision of the few that come
    first, and with it the mean of average precision, is above the share.

    Parameters
    ----------
    grid : (h, w)
        Of the maps before they are resampled to the film.
    boxes, image_size, rounding
        As in `place_scores`.

    Returns
    -------
    DataFrame, one row a pair
        hit_chance, the mean over the cells that may hold the largest value; auprc_chance, the mean over `DRAWS` maps,
        the same for every pair and run. NaN where the boxes have no area on the film.
    """
    tops, ranks = _of_random_maps(tuple(grid), image_size)
    masks = box_masks(boxes, image_size, rounding=rounding).reshape(len(boxes), image_size**2)
    hits = np.where(masks.any(axis=1), masks @ tops, np.nan)
    return pd.DataFrame({"hit_chance": hits, "auprc_chance": [_mean_precision(ranks[:, mask]) for mask in masks]})


@lru_cache(maxsize=4)
def _of_random_maps(grid: tuple[int, int], image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """How likely each pixel is to hold the largest value, float64 (N,); and of each pixel of `DRAWS` maps, by how many
    pixels its value is reached, int32 (DRAWS, N)."""
    cells = torch.eye(grid[0] * grid[1], dtype=torch.float64).reshape(-1, *grid)  # where one stands out, it is largest
    tops = _films(cells, image_size).flatten(1)
    tops = (tops == tops.amax(1, keepdim=True)).double()
    drawn = torch.from_numpy(np.random.default_rng(0).standard_normal((DRAWS, *grid)))
    values = -_films(drawn, image_size).flatten(1).numpy()
    ranks = [np.searchsorted(np.sort(row), row, side="right").astype(np.int32) for row in values]
    return (tops / tops.sum(1, keepdim=True)).mean(0).numpy(), np.stack(ranks)


def _mean_precision(ranks: np.ndarray) -> float:
    """The mean average precision of several maps, by the `ranks` (K, m) of the m pixels that are looked for."""
    if not ranks.size:
        return np.nan
    ranks = np.sort(ranks, axis=1)
    # Pixels of one value are found together: each counts those up to the last of them.
    found = np.where(np.diff(ranks, axis=1, append=-1), np.arange(1, ranks.shape[1] + 1), ranks.shape[1])
    return float((np.minimum.accumulate(found[:, ::-1], axis=1)[:, ::-1] / ranks).mean())


def _films(maps: Tensor, image_size: int) -> Tensor:
    """Maps scaled from their least to their largest value, resampled to the film, float64 (P, size, size)."""
    # Beyond the centres of the outermost cells pixels hold one value but for the rounding of its interpolation.
    return resize(normalise(maps, rectify=False), image_size).mul(1e9).round_().div_(1e9).clamp_(0, 1)


def iou_columns() -> list[str]:
    """The columns of `place_scores` that hold IoU, in the order of `SHARES`."""
    return [f"iou_{share:g}" for share in SHARES]


def tuned_iou(ious: ArrayLike, patients: ArrayLike, seed: int = 0) -> np.ndarray:
    """IoU of each pair at the threshold that is best for the pairs of other patients.

    Patients are halved at random; the threshold with the largest mean IoU over one half is used for the other, and the
    other way round. A threshold picked on the pairs that are scored would flatter the map.

    Parameters
    ----------
    ious : float (P, T)
        Of P pairs at T thresholds; rows of NaN are left out.
    patients : (P,)
    seed : int
        Of the halves, which depend on it and on the set of patients alone: the same for every run.

    Returns
    -------
    float64 (P,); NaN for a row of NaN, or where the other half has no pair

    Raises
    ------
    ValueError
        Arrays of different lengths.
    """
    ious, patients = np.asarray(ious, dtype=np.float64), np.asarray(patients)
    if ious.ndim != 2 or len(ious) != len(patients):
        raise ValueError(f"need IoU (P, T) and the patient of each pair, got {ious.shape} and {len(patients)} patients")
    names, patient = np.unique(patients, return_inverse=True)
    first = np.isin(patient, np.random.default_rng(seed).permutation(len(names))[: len(names) // 2])
    known, tuned = ~np.isnan(ious).any(axis=1), np.full(len(ious), np.nan)
    for scored in (first, ~first):
        others = ious[known & ~scored]
        if len(others):
            tuned[scored] = ious[scored, others.mean(axis=0).argmax()]
    return tuned

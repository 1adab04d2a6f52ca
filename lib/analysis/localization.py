"""How a map overlaps boxes: soft IoBB, IoR and IoU (Khakzar et al., section 4) without resampling the map, and IoU by
threshold (Nam & Lee).

Bilinear resampling is linear and separable, ``resized = Wy L Wx^T``, so the sum of the resized map over a rectangle of
pixels is ``r^T L c`` with the sums ``r``, ``c`` of the interpolation weights over the rectangle's rows and columns. A
union of boxes is first cut into disjoint rectangles.

To add a metric, write a function of an `Overlap` and name it in `METRICS`: it becomes a column of `soft_overlap`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lib.analysis.cam import resize

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Overlap:
    """P maps with their boxes, as a metric reads them.

    Attributes
    ----------
    cams : ndarray of float64, (P, h, w)
        Maps in [0, 1] at native size.
    boxes : sequence of P arrays (K, 4)
        In pixels of the film of side `image_size`; `rounding` as in `pixel_boxes`.
    inside, mass, area : ndarray of float64, (P,)
        Over the pixels of the film: sum of the resampled map within the boxes, sum of all of it, pixels in the boxes.
    """

    cams: np.ndarray
    boxes: Sequence
    image_size: int
    rounding: str
    inside: np.ndarray
    mass: np.ndarray
    area: np.ndarray

    def films(self) -> np.ndarray:
        """The maps resampled to the film, float64 (P, image_size, image_size)."""
        return resize(torch.from_numpy(self.cams), self.image_size).numpy()

    def masks(self) -> np.ndarray:
        """The union of each map's boxes, bool (P, image_size, image_size)."""
        return box_masks(self.boxes, self.image_size, rounding=self.rounding)


def iobb(overlap: Overlap) -> np.ndarray:
    """``sum(cam M) / sum(M)`` with the mask M of the boxes: 0 for a zero map."""
    return overlap.inside / overlap.area


def ior(overlap: Overlap) -> np.ndarray:
    """``sum(cam M) / sum(cam)``: NaN for a zero map."""
    return overlap.inside / overlap.mass


def iou(overlap: Overlap) -> np.ndarray:
    """``sum(cam M) / (sum(M) + sum(cam) - sum(cam M))``."""
    return overlap.inside / (overlap.area + overlap.mass - overlap.inside)


class Metric(NamedTuple):
    """A localization metric: the name that tables print, what it says, its function, from `Overlap` to (P,), NaN where
    it is undefined; and the column of `soft_overlap` that holds its value for a map laid anywhere. A metric without one
    is recorded, but not compared with chance."""

    label: str
    meaning: str
    score: Callable[[Overlap], np.ndarray]
    chance: str | None = None


METRICS = {
    "iobb": Metric("IoBB", "share of the box that the map fills", iobb, chance="cam_mass"),
    "ior": Metric("IoR", "share of the map that lies in the box", ior, chance="box_area"),
    "iou": Metric("IoU", "what map and box share, of what they cover together", iou),
}


def soft_overlap(
    cams: Tensor | np.ndarray,
    boxes: Sequence,
    image_size: int,
    *,
    rounding: str = "outward",
    zero_policy: str = "skip",
    threshold: float | None = None,
) -> pd.DataFrame:
    """Overlap of each pair's map with the union of that pair's boxes, on the map as it would be resampled to the film.

    Equal to resampling bilinearly and summing, up to rounding; sums in float64.

    Parameters
    ----------
    cams : float (P, h, w) in [0, 1], of any precision
        Normalised maps at native size, one a (film, class) pair.
    boxes : sequence of P arrays (K, 4)
        x1, y1, x2, y2 in pixels of the film at ``image_size``, x2 and y2 exclusive; K may be 0 and differ between
        pairs.
    image_size : int
        Side of the film in pixels.
    rounding : {'outward', 'trunc'}
        See `pixel_boxes`.
    zero_policy : {'skip', 'zero'}
        Value of what is undefined: NaN ('skip'), or 0 as an epsilon in the denominators would give.
    threshold : float, optional
        Hard variant: the resampled map is replaced by the mask ``cam >= threshold``. In (0, 1].

    Returns
    -------
    DataFrame, one row a pair: a column for each of `METRICS`, box_area (share of the film), cam_mass (mean of the
    resampled map). A pair whose boxes have no area in the film has NaN in all metrics.

    Raises
    ------
    ValueError
        Values outside [0, 1] or NaN (names the pair), NaN in a box, a wrong shape, an unknown option.
    """
    if zero_policy not in ("skip", "zero"):
        raise ValueError(f"zero_policy must be 'skip' or 'zero', got {zero_policy!r}")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    cams = torch.as_tensor(cams).detach().cpu()
    cams = cams.to(torch.promote_types(cams.dtype, torch.float32))  # NumPy has no bfloat16
    if cams.ndim != 3 or len(cams) != len(boxes):
        given = f"{tuple(cams.shape)} and {len(boxes)} lists"
        raise ValueError(f"need maps (P, h, w) and one list of boxes a map, got {given}")
    _check_unit(cams, "normalise it first")
    if threshold is not None:
        cams = resize(cams, image_size) >= threshold

    pieces, owner = pixel_boxes(boxes, image_size, rounding=rounding)
    several = np.flatnonzero(np.bincount(owner, minlength=len(cams)) > 1)
    unions = [disjoint_rectangles(pieces[owner == pair]) for pair in several]
    single = ~np.isin(owner, several)
    pieces = np.concatenate([pieces[single], *unions])
    owner = np.concatenate([owner[single], np.repeat(several, [len(union) for union in unions])])
    area = _per_pair((pieces[:, 2] - pieces[:, 0]) * (pieces[:, 3] - pieces[:, 1]), owner, len(cams))

    native = cams.numpy().astype(np.float64)
    rows, columns = (_cumulative_weights(side, image_size) for side in native.shape[1:])
    mass = np.einsum("phw,h,w->p", native, rows[-1], columns[-1], optimize=True)
    r = rows[pieces[:, 3]] - rows[pieces[:, 1]]
    c = columns[pieces[:, 2]] - columns[pieces[:, 0]]
    inside = _per_pair(((r[:, None, :] @ native[owner])[:, 0] * c).sum(axis=1), owner, len(cams))
    inside = np.clip(inside, 0, np.minimum(area, mass))

    overlap = Overlap(native, boxes, image_size, rounding, inside, mass, area)
    with np.errstate(invalid="ignore", divide="ignore"):
        table = pd.DataFrame(
            {name: np.where(area > 0, metric.score(overlap), np.nan) for name, metric in METRICS.items()}
        )
    if zero_policy == "zero":
        table = table.fillna(0.0)
    return table.assign(box_area=area / image_size**2, cam_mass=mass / image_size**2)


def positive_part(maps: Tensor) -> Tensor:
    """Each map with its negatives cut to 0 and divided by its maximum (Nam & Lee, section 2: "normalised in 0 ~ 1").

    Not min-max: what has no relevance stays at 0. A map without a positive value becomes zeros.

    Parameters
    ----------
    maps : float (..., H, W), signed

    Returns
    -------
    float (..., H, W) in [0, 1], same dtype.

    Raises
    ------
    ValueError
        A NaN or infinity (names the map).
    """
    finite = torch.isfinite(maps).flatten(-2).all(dim=-1)
    if not finite.all():
        raise ValueError(f"map {torch.nonzero(~finite)[0].tolist()} holds NaN or infinite values")
    maps = maps.clamp(min=0)
    top = maps.amax(dim=(-2, -1), keepdim=True)
    return maps / torch.where(top > 0, top, torch.ones_like(top))


@torch.no_grad()
def threshold_iou(
    maps: Tensor | np.ndarray,
    boxes: Sequence,
    image_size: int,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    rounding: str = "outward",
    inclusive: bool = True,
) -> pd.DataFrame:
    """IoU of each thresholded map with the union of its pair's boxes, of the lesion and of the background (Nam & Lee,
    Table 2).

    With P the pixels that reach the threshold and B those of the boxes: ``iou_lesion = |P and B| / |P or B|``,
    ``iou_background`` the same of the complements of P and B. The paper says "mean IoU" and no more; its numbers fit
    the mean over lesion and background, by which an empty mask already has ``(1 - box area) / 2``.

    Parameters
    ----------
    maps : float (P, S, S) in [0, 1]
        At film size, S = `image_size`; see `positive_part`.
    boxes : sequence of P arrays (K, 4)
        As in `soft_overlap`.
    thresholds : sequence of float
        Compared in the precision of the maps, so that a pixel which holds the threshold reaches it.
    rounding : {'outward', 'trunc'}
        See `pixel_boxes`.
    inclusive : bool
        P is ``map >= T`` (the paper: lower values are cast to zero), or ``map > T``.

    Returns
    -------
    DataFrame
        A row per pair and threshold, pairs in their order: pair, threshold, iou_lesion, iou_background, mean_iou in [0,
        1], empty_mask_iou (`empty_mask_iou`), box_area and mask_area (shares of the film). An IoU is NaN where its
        union is empty, mean_iou where either is.

    Raises
    ------
    ValueError
        Maps of another size or outside [0, 1] (names the pair), NaN in a box, an unknown option.
    """
    maps = torch.as_tensor(maps).detach()
    if maps.ndim != 3 or maps.shape[1:] != (image_size, image_size) or len(maps) != len(boxes):
        need = f"need maps (P, {image_size}, {image_size}), resized to the film, and one list of boxes a map"
        raise ValueError(f"{need}, got {tuple(maps.shape)} and {len(boxes)} lists")
    _check_unit(maps, "see positive_part")
    masks = torch.from_numpy(box_masks(boxes, image_size, rounding=rounding)).to(maps.device)

    marked, both = [], []
    for threshold in torch.tensor(thresholds, dtype=maps.dtype, device=maps.device):
        above = maps >= threshold if inclusive else maps > threshold
        marked.append(above.sum(dim=(1, 2)))
        both.append((above & masks).sum(dim=(1, 2)))
    shape = (len(maps), len(thresholds))
    marked, both = (
        torch.stack(counts, dim=1).double().cpu().numpy() if counts else np.empty(shape) for counts in (marked, both)
    )
    box, film = np.broadcast_to(masks.sum(dim=(1, 2)).double().cpu().numpy()[:, None], shape), image_size**2
    union = box + marked - both
    with np.errstate(invalid="ignore"):
        lesion, background = both / union, (film - union) / (film - both)
    table = pd.DataFrame(
        {
            "pair": np.repeat(np.arange(len(maps)), len(thresholds)),
            "threshold": np.tile(np.asarray(thresholds, float), len(maps)),
            "iou_lesion": lesion.ravel(),
            "iou_background": background.ravel(),
            "mean_iou": ((lesion + background) / 2).ravel(),
        }
    )
    area = box.ravel() / film
    return table.assign(empty_mask_iou=empty_mask_iou(area), box_area=area, mask_area=marked.ravel() / film)


def empty_mask_iou(box_area: ArrayLike) -> np.ndarray:
    """The mean IoU over lesion and background of a map that marks nothing, ``(1 - box_area) / 2``: what a mean IoU has
    to beat.

    `box_area` : share of the film, a number or an array; 0 gives NaN (no lesion to mark).
    """
    return np.where(np.asarray(box_area) > 0, (1 - np.asarray(box_area, dtype=np.float64)) / 2, np.nan)


def pixel_boxes(groups: Sequence, image_size: int, *, rounding: str = "outward") -> tuple[np.ndarray, np.ndarray]:
    """Boxes as whole pixels inside the film.

    Parameters
    ----------
    groups : sequence of P float arrays (K, 4)
        x1, y1, x2, y2 in pixels, x2 and y2 exclusive.
    image_size : int
        Side of the film.
    rounding : {'outward', 'trunc'}
        'outward': floor of x1, y1 and ceil of x2, y2 (every touched pixel, never empty; a millionth of a pixel is taken
        for rounding error of the scaling). 'trunc': all four cut to their integer part.

    Returns
    -------
    boxes : int64 (R, 4)
        Of all groups, clipped to [0, image_size]; boxes without area (x2 <= x1, wholly outside the film) are left out.
    owner : int64 (R,)
        Index of each box's group.
    """
    groups = [np.asarray(boxes, dtype=np.float64) for boxes in groups]
    for index, boxes in enumerate(groups):
        if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
            raise ValueError(f"boxes must be (K, 4): x1, y1, x2, y2; got shape {boxes.shape} at {index}")
    owner = np.repeat(np.arange(len(groups)), [len(boxes) if boxes.size else 0 for boxes in groups])
    boxes = np.concatenate([boxes.reshape(-1, 4) for boxes in groups] + [np.empty((0, 4))])
    bad = np.isnan(boxes).any(axis=1)
    if bad.any():
        raise ValueError(f"a box at {owner[bad][0]} holds NaN: {boxes[bad][0].tolist()}")
    whole = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    boxes = np.clip(boxes, 0, image_size)
    if rounding == "outward":
        low, high = np.floor(boxes[:, :2] + 1e-6), np.ceil(boxes[:, 2:] - 1e-6)
        high = np.where(boxes[:, 2:] > boxes[:, :2], np.minimum(np.maximum(high, low + 1), image_size), low)
        boxes = np.concatenate([low, high], axis=1)
    elif rounding == "trunc":
        boxes = np.trunc(boxes)
    else:
        raise ValueError(f"rounding must be 'outward' or 'trunc', got {rounding!r}")
    whole &= (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes[whole].astype(np.int64), owner[whole]


def box_mask(boxes: ArrayLike, image_size: int, *, rounding: str = "outward") -> np.ndarray:
    """Union of the boxes as a boolean (image_size, image_size) mask."""
    return box_masks([boxes], image_size, rounding=rounding)[0]


def box_masks(groups: Sequence, image_size: int, *, rounding: str = "outward") -> np.ndarray:
    """As `box_mask` for a sequence of P (K, 4) arrays: boolean (P, image_size, image_size)."""
    masks = np.zeros((len(groups), image_size, image_size), dtype=bool)
    for (x1, y1, x2, y2), owner in zip(*pixel_boxes(groups, image_size, rounding=rounding)):
        masks[owner, y1:y2, x1:x2] = True
    return masks


def disjoint_rectangles(boxes: np.ndarray) -> np.ndarray:
    """The union of integer boxes (K, 4) as disjoint rectangles (R, 4): horizontal strips between box edges, merged
    intervals in each."""
    if len(boxes) <= 1:
        return boxes
    edges = np.unique(boxes[:, [1, 3]])
    pieces = []
    for top, bottom in zip(edges[:-1], edges[1:], strict=True):
        across = boxes[(boxes[:, 1] <= top) & (boxes[:, 3] >= bottom)]
        end = -1
        for left, right in sorted(across[:, [0, 2]].tolist()):
            left = max(left, end)
            if right > left:
                pieces.append((left, top, right, bottom))
                end = right
    return np.array(pieces, dtype=np.int64).reshape(-1, 4)


def _check_unit(maps: Tensor, remedy: str) -> None:
    valid = ((maps >= 0) & (maps <= 1)).flatten(1).all(dim=1)
    if not valid.all():
        raise ValueError(f"map {int(torch.nonzero(~valid)[0])} leaves [0, 1] or holds NaN; {remedy}")


def _per_pair(values: np.ndarray, owner: np.ndarray, n_pairs: int) -> np.ndarray:
    return np.bincount(owner, weights=values, minlength=n_pairs).astype(np.float64)


def _cumulative_weights(n: int, size: int) -> np.ndarray:
    """(size + 1, n): row ``i`` is the sum of the interpolation weights of the first ``i`` output pixels on the ``n``
    native cells."""
    centre = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.minimum(np.floor(centre).astype(np.int64), n - 1)
    weights = np.zeros((size, n))
    np.add.at(weights, (np.arange(size), low), 1 - (centre - low))
    np.add.at(weights, (np.arange(size), np.minimum(low + 1, n - 1)), centre - low)
    return np.concatenate([np.zeros((1, n)), np.cumsum(weights, axis=0)])

"""What the importance matrix is good for (Li et al., sec. VI): features that carry a class, confounders, outlier
films."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib.analysis import cam
from lib.analysis.features.importance import carriers, film_distances, overlap, participation, select_features
from lib.analysis.features.survey import film_cams


def importance_curve(importance: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Share of each class's positive importance that its k most important features hold: class, k, share."""
    positive = np.sort(np.maximum(importance, 0), axis=0)[::-1].cumsum(0)
    total = positive[-1:]
    share = np.divide(positive, total, out=np.full(positive.shape, np.nan), where=total > 0)
    n_features, n_classes = share.shape
    k = np.tile(np.arange(1, n_features + 1), n_classes)
    return pd.DataFrame({"class": np.repeat(list(classes), n_features), "k": k, "share": share.T.ravel()})


def carried(importance: np.ndarray, classes: Sequence[str], principal_share: float) -> pd.DataFrame:
    """How many features carry each class, and how far classes share them: class, n_features80, participation, overlap.

    `overlap` : mean Jaccard index of the class's principal features (the top `principal_share`) with those of every
    other class with films.
    """
    masks = select_features(importance, principal_share)
    shared = overlap(masks)
    empty = ~masks.any(0)
    shared[empty] = shared[:, empty] = np.nan  # a class without films is no evidence that classes share nothing
    np.fill_diagonal(shared, np.nan)
    others = np.isfinite(shared).sum(1)
    return pd.DataFrame(
        {
            "class": list(classes),
            "n_features80": carriers(importance).sum(0),
            "participation": participation(importance),
            "overlap": np.divide(np.nansum(shared, 1), others, out=np.full(len(shared), np.nan), where=others > 0),
        }
    )


def responses(
    model: nn.Module,
    batches: Iterable,
    layer: str,
    selected: int,
    mask: np.ndarray,
    *,
    size: int,
    top: int = 6,
    method: str = "grad",
    token_grid: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """What some features respond to: the films on which their weighted maps for a class add most, the most first.

    Parameters
    ----------
    mask : 0/1 (F,)
        The features, such as one suspected confounder.
    size, top : int
        Side of the maps returned, and how many films.

    Returns
    -------
    rows : int (K,)
        Of the films.
    maps : float32 (K, size, size)
        Signed: the features times their weights, summed.
    """
    best: list[tuple[float, int, Tensor]] = []
    only = {"these": {method: torch.as_tensor(mask)}}
    for batch, _, cams in film_cams(
        model, batches, layer, [method], masks=only, classes=[selected], token_grid=token_grid
    ):
        maps = cams[method, "these"].maps[:, 0].cpu()
        best += zip(maps.double().sum((1, 2)).tolist(), np.asarray(batch.rows).tolist(), maps)
        best = [
            (total, row, film.clone()) for total, row, film in sorted(best, key=lambda item: -item[0])[:top]
        ]  # a view would keep its batch
    return np.array([row for _, row, _ in best]), cam.resize(torch.stack([film for *_, film in best]), size).numpy()


def marked_share(response: np.ndarray, marks: np.ndarray, cell: int) -> tuple[float, float]:
    """How much of a positive response lies on marks, and how much of the films they cover: both in [0, 1].

    A map cannot follow a mark more finely than its own cells, so every mark is first widened by one cell on each side.
    A share well above the area says that the features respond to the marks, or to what lies beneath them.

    Parameters
    ----------
    response : float (K, S, S)
        Of `responses`; what is negative does not count. The share is NaN where nothing is positive.
    marks : bool (K, S, S)
    cell : int
        Side of a cell of the unresized map, in pixels.
    """
    widened = np.stack(
        [cv2.dilate(mark.astype(np.uint8), np.ones((2 * cell + 1, 2 * cell + 1), np.uint8)) for mark in marks]
    ).astype(bool)
    positive = np.maximum(np.asarray(response, np.float64), 0)
    total = positive.sum()
    return float(positive[widened].sum() / total) if total > 0 else np.nan, float(widened.mean())


def outliers(
    model: nn.Module,
    batches: Iterable,
    targets: np.ndarray,
    importance: np.ndarray,
    classes: Sequence[str],
    layer: str,
    method: str = "grad",
    *,
    token_grid: Sequence[int] = (),
) -> pd.DataFrame:
    """Films whose features differ from their class's column of the importance matrix, the strangest first: row, class,
    distance, logit.

    `importance` : float (F, C), `Importance.own` of training films. `distance` : see `integrated.film_distances`.
    """
    parts = []
    for batch, output, cams in film_cams(model, batches, layer, [method], token_grid=token_grid):
        rows = np.asarray(batch.rows)
        distance = film_distances(cams[method, "all"].contributions, targets[rows], importance)
        film, label = np.nonzero(np.isfinite(distance))
        parts.append(
            pd.DataFrame(
                {
                    "row": rows[film],
                    "class": [classes[c] for c in label],
                    "distance": distance[film, label],
                    "logit": output.logits.cpu().numpy()[film, label],
                }
            )
        )
    return pd.concat(parts).sort_values("distance", ascending=False, kind="stable", ignore_index=True)

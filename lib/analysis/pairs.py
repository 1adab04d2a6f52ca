"""The unit of every localization: a film and a class, with all boxes of that class on the film (Khakzar et al., Table
1); and which pairs to look at."""

from collections.abc import Sequence

import numpy as np
import pandas as pd


def box_pairs(films: pd.DataFrame, boxes: pd.DataFrame, classes: list[str], *, unit: str = "pair") -> pd.DataFrame:
    """Every (film, class) that has boxes, the unit of Khakzar et al., Table 1.

    Parameters
    ----------
    films : DataFrame
        image, patient; the index is the film's row in the store. Films that are not in it are left out.
    boxes : DataFrame
        image, class, x1, y1, x2, y2 in pixels of the films that the model sees.
    classes : list of str
        Outputs of the model. Boxes of other classes are left out.
    unit : {'pair', 'box'}
        'box': a row for each box alone, numbered from 0 within its film and class in a column `box`.

    Returns
    -------
    DataFrame
        One row a pair, by film row and class: row, image, patient, class, output (index into `classes`), n_boxes, boxes
        (array (K, 4)).
    """
    if unit not in ("pair", "box"):
        raise ValueError(f"unit must be 'pair' or 'box', got {unit!r}")
    kept = boxes[boxes["image"].isin(films["image"]) & boxes["class"].isin(classes)]
    number = kept.groupby(["image", "class"]).cumcount() if unit == "box" else np.zeros(len(kept), np.int64)
    parts = kept.assign(box=number).groupby(["image", "class", "box"], sort=False)
    corners = [(*key, part[["x1", "y1", "x2", "y2"]].to_numpy(float)) for key, part in parts]
    frame = pd.DataFrame(corners, columns=["image", "class", "box", "boxes"])
    frame = frame.assign(output=frame["class"].map(classes.index), n_boxes=frame["boxes"].map(len))
    frame = frame.merge(films[["image", "patient"]].assign(row=films.index), on="image")
    frame = frame[["row", "image", "patient", "class", "output", "box", "n_boxes", "boxes"]]
    frame = frame.sort_values(["row", "output", "box"], ignore_index=True)
    return frame if unit == "box" else frame.drop(columns="box")


def with_other_boxes(pairs: pd.DataFrame) -> pd.DataFrame:
    """`pairs` with a column `other`: the boxes of another film of the same class, of another patient where the class
    allows it.

    A map that goes by anatomy alone fits them as well as its own. Each class is turned by as many places as its busiest
    patient has films (a patient's films lie together), so every set of boxes is used once. A class of one patient keeps
    its own, and so shows no difference.
    """
    other = pairs["boxes"].copy()
    for index in pairs.groupby("class").groups.values():
        patients = pairs.loc[index, "patient"]
        order = index[np.argsort(patients.to_numpy(), kind="stable")]
        other[order] = pairs["boxes"][np.roll(order, -patients.value_counts().max())].to_numpy()
    return pairs.assign(other=other)


def typical_pairs(table: pd.DataFrame, score: str, quantiles: Sequence[float] | None = None) -> pd.DataFrame:
    """Pairs to look at, chosen by rank and not by their looks: the most typical of each class, or a spread of all.

    Parameters
    ----------
    table : DataFrame
        image, class and the column `score`, which is first averaged over whatever else tells rows apart: runs, seeds,
        methods, thresholds. Pairs without a score are left out.
    score : str
        Such as 'iobb'.
    quantiles : sequence of float in [0, 1], optional
        The pairs at these quantiles of the score over all classes, in this order; by default the pair of each class
        that lies nearest the median of its class.

    Returns
    -------
    DataFrame
        image, class, `score`; by class where there are no `quantiles`. A tie goes to the image that is first by name,
        or among quantiles to the one that is first in the table.
    """
    mean = table.groupby(["image", "class"], as_index=False, sort=False)[score].mean().dropna(ignore_index=True)
    if quantiles is not None:
        rank = mean[score].rank(method="first", pct=True)
        return mean.loc[[(rank - q).abs().idxmin() for q in quantiles]].reset_index(drop=True)
    distance = (mean[score] - mean.groupby("class")[score].transform("median")).abs()
    nearest = mean.assign(distance=distance).sort_values(["class", "distance", "image"]).drop_duplicates("class")
    return nearest.drop(columns="distance").reset_index(drop=True)

"""The unit of every localization: a film and a class, with all boxes of that class on the film (Khakzar et al., Table
1)."""

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
    rows = dict(zip(films["image"], films.index, strict=True))
    patients = dict(zip(films["image"], films["patient"], strict=True))
    kept = boxes[boxes["image"].isin(rows) & boxes["class"].isin(classes)]
    number = kept.groupby(["image", "class"]).cumcount() if unit == "box" else np.zeros(len(kept), np.int64)
    pairs = [
        (
            rows[image],
            image,
            patients[image],
            name,
            classes.index(name),
            box,
            len(part),
            part[["x1", "y1", "x2", "y2"]].to_numpy(float),
        )
        for (image, name, box), part in kept.assign(box=number).groupby(["image", "class", "box"], sort=False)
    ]
    frame = pd.DataFrame(pairs, columns=["row", "image", "patient", "class", "output", "box", "n_boxes", "boxes"])
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
        for here, there in zip(order, np.roll(order, -patients.value_counts().max())):
            other.at[here] = pairs["boxes"].at[there]
    return pairs.assign(other=other)

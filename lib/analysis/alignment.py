"""Do class activation maps lie on the boxes? Soft overlap of each pair, and the maps to look at, from a stream of
outputs."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from lib.analysis import cam
from lib.analysis.inference import LensError, Output, is_pooled, layer_maps
from lib.analysis.localization import METRICS, soft_overlap
from lib.analysis.place import by_chance, iou_columns, place_scores, tuned_iou
from lib.analysis.statistics import mean_interval, paired_difference


class Score(NamedTuple):
    """What is compared with chance and with another film's boxes: how it is printed, and the column that holds what a
    map laid anywhere, or one of independent values, would have."""

    label: str
    chance: str


def scores() -> dict[str, Score]:
    """The scores of `align` by the name of their column: those of `localization.METRICS` that have a chance, in both
    readings of the map, and those of `place` that need no threshold."""
    rectified = {name: Score(metric.label, metric.chance) for name, metric in METRICS.items() if metric.chance}
    areas = {"cam_mass": "cam_mass_minmax"}
    signed = {
        f"{name}_minmax": Score(f"{score.label}, min-max", areas.get(score.chance, score.chance))
        for name, score in rectified.items()
    }
    return rectified | signed | {"hit": Score("Hit rate", "hit_chance"), "auprc": Score("Pixel AUPRC", "auprc_chance")}


def align(
    outputs: Iterable[Output],
    pairs: pd.DataFrame,
    head: nn.Linear,
    *,
    layer: str,
    image_size: int,
    method: str = "cam",
    rounding: str = "outward",
    restrict: str | None = None,
    shift: ArrayLike | None = None,
) -> pd.DataFrame:
    """How the class activation map of each pair lies on its boxes: the map of the class that the box names, whatever
    was predicted.

    Three readings. Rectified (the paper's): negatives to 0, then scaled to [0, 1], so that the prior in the map decides
    how much of it is left, and a map that is negative everywhere is empty. Min-max: the signed map scaled from its
    least to its largest value. And scores of the place that neither a constant nor a scale can move, see `place`.

    Parameters
    ----------
    outputs : iterable of Output
        With the maps of `layer`, the one that the head pools.
    pairs : DataFrame
        Of `box_pairs`, or of `with_other_boxes`.
    head : nn.Linear
        The model's, behind the average pooling.
    layer, method, rounding
        See `cam.pair_maps` and `localization.pixel_boxes`.
    image_size : int
        Side of the films in pixels, the frame of the boxes.
    restrict : {'predicted'}, optional
        Only the pairs that the model predicts, logit above 0; the others have no row.
    shift : (M,) floats, optional
        A constant for each class, added to its maps and logits, see `trunk_head.prior_shift`.

    Returns
    -------
    DataFrame
        image, patient, class, (box,) n_boxes, box_area, cam_mass, a column for each of `localization.METRICS`, logit;
        empty (1.0 where nothing is left of the rectified map), cam_mass_minmax, iobb_minmax, ior_minmax, hit, auprc,
        iou_tuned, hit_chance and auprc_chance (`place`). A row per pair, in the order of the outputs. With other boxes
        also <score>_other of each of `scores`. Last, what they depend on: layer, method, rounding.

    Raises
    ------
    ValueError
        No pairs, or a layer that is not the one the head pools.
    """
    if not len(pairs):
        raise LensError(
            "no annotated film: the release has no boxes of these classes on the chosen films (see "
            "BBox_List_2017.csv and `annotated`)"
        )
    if restrict not in (None, "predicted"):
        raise ValueError(f"restrict must be 'predicted' or None, got {restrict!r}")
    by_row, parts = dict(list(pairs.groupby("row"))), []
    added = torch.zeros(head.out_features, dtype=torch.float64) if shift is None else torch.as_tensor(np.asarray(shift))
    given = ["image", "patient", "class", *(["box"] if "box" in pairs else []), "n_boxes"]
    against = list(scores()) if "other" in pairs else []
    for output in outputs:
        found = [
            (position, by_row[row]) for position, row in enumerate(np.asarray(output.rows).tolist()) if row in by_row
        ]
        if not found:
            continue
        chosen = pd.concat([part for _, part in found], ignore_index=True)
        position = torch.tensor([position for position, part in found for _ in range(len(part))])
        classes = torch.tensor(chosen["output"].to_numpy())
        if restrict == "predicted":
            kept = (output.logits.cpu()[position, classes] + added[classes] > 0).numpy()
            chosen, position, classes = chosen[kept].reset_index(drop=True), position[kept], classes[kept]
        raw = cam.pair_maps(pooled_maps(output, layer, head), head.weight, position, classes, method)
        if shift is not None:
            raw = raw + added[classes, None, None].to(raw)
        sides = {"": list(chosen["boxes"])} | ({"_other": list(chosen["other"])} if against else {})
        logits = (output.logits.cpu()[position, classes].double() + added[classes]).float().numpy()
        found = [overlaps(raw, boxes, image_size, rounding).add_suffix(side) for side, boxes in sides.items()]
        found.append(by_chance(raw.shape[1:], sides[""], image_size, rounding=rounding))
        parts.append(pd.concat([chosen[given], *found], axis=1).assign(logit=logits))
    columns = [*given, "box_area", "cam_mass", *METRICS, "logit", "empty", "cam_mass_minmax"]
    columns += [name for name in scores() if name not in METRICS]
    columns += ["iou_tuned", "hit_chance", "auprc_chance", *(f"{name}_other" for name in against)]
    if not parts:
        return pd.DataFrame(columns=columns).assign(layer=layer, method=method, rounding=rounding)
    table = pd.concat(parts, ignore_index=True)
    table["iou_tuned"] = tuned_iou(table[iou_columns()], table["patient"])
    return table[columns].assign(layer=layer, method=method, rounding=rounding)


def overlaps(raw: Tensor, boxes: Sequence, image_size: int, rounding: str = "outward") -> pd.DataFrame:
    """Every score of signed maps at native size, a row a map, in all three readings: the columns of `soft_overlap` for
    the rectified map, those of the min-max map with the suffix _minmax, `place.place_scores`, and empty."""
    rectified, signed = (cam.normalise(raw, rectify).cpu() for rectify in (True, False))
    tables = [
        soft_overlap(rectified, boxes, image_size, rounding=rounding),
        soft_overlap(signed, boxes, image_size, rounding=rounding).add_suffix("_minmax"),
        place_scores(raw, boxes, image_size, rounding=rounding),
    ]
    return pd.concat(tables, axis=1).assign(empty=(rectified.flatten(1) == 0).all(1).double().numpy())


def summary(alignment: pd.DataFrame, n_replicates: int) -> pd.DataFrame:
    """What a run's maps reach over all pairs, and what the same maps reach elsewhere.

    Parameters
    ----------
    alignment : DataFrame
        Of `align`, of pairs `with_other_boxes`.
    n_replicates : int
        Of the bootstrap over patients, see `statistics.mean_interval`.

    Returns
    -------
    DataFrame
        A row for each of `scores`, by its id: metric (as it is printed), point, low, high, n, n_skipped
        (the mean with its interval); anywhere, what maps get that know nothing of the place, the mean of
        `Score.chance`; other_film, what the same map gets on the boxes of another film of the class; gain_point,
        gain_low, gain_high, the paired difference to that.
    """
    rows, patients = [], alignment["patient"]
    for name, score in scores().items():
        own, other = alignment[name], alignment[f"{name}_other"]
        mean = mean_interval(own, patients, n_replicates)._asdict()
        gain = paired_difference(own, other, patients, n_replicates)._asdict()
        rows.append(
            {"metric": score.label}
            | {key: mean[key] for key in ("point", "low", "high", "n", "n_skipped")}
            | {"anywhere": alignment[score.chance].mean(), "other_film": other.mean()}
            | {f"gain_{key}": gain[key] for key in ("point", "low", "high")}
        )
    return pd.DataFrame(rows, index=list(scores()))


def pooled_maps(output: Output, layer: str, head: nn.Linear) -> torch.Tensor:
    """The maps of `layer` in `output`, after the check that the `head` pools them."""
    maps = layer_maps(output, layer)
    if maps.shape[1] != head.in_features:
        raise LensError(
            f"layer {layer} has {maps.shape[1]} channels and the head {head.in_features}: CAM reads the layer that "
            "the head pools"
        )
    if not is_pooled(output, layer, head):
        raise LensError(f"layer {layer} is not the one that the head pools: its maps do not give the logits")
    return maps


def pair_cams(
    outputs: Iterable[Output], pairs: pd.DataFrame, head: nn.Linear, *, layer: str, size: int, method: str = "cam"
) -> tuple[np.ndarray, np.ndarray]:
    """Class activation maps to look at: those of `pairs`, in [0, 1], resized to the film, with the predicted
    probabilities.

    Parameters
    ----------
    outputs, head, layer, method
        As in `align`.
    pairs : DataFrame
        With columns row and output.
    size : int
        Side of the maps that are returned.

    Returns
    -------
    maps : ndarray, float32 (P, size, size)
    probabilities : ndarray, float64 (P,)
    """
    maps, probabilities = np.zeros((len(pairs), size, size), np.float32), np.full(len(pairs), np.nan)
    for output in outputs:
        place = {row: position for position, row in enumerate(np.asarray(output.rows).tolist())}
        here = [p for p, row in enumerate(pairs["row"]) if row in place]
        if here:
            position = torch.tensor([place[row] for row in pairs["row"].iloc[here]])
            classes = torch.tensor(pairs["output"].to_numpy()[here])
            raw = cam.pair_maps(pooled_maps(output, layer, head), head.weight, position, classes, method)
            maps[here] = cam.film_maps(raw, size).cpu().numpy()
            probabilities[here] = torch.sigmoid(output.logits.cpu().double()[position, classes]).numpy()
    return maps, probabilities

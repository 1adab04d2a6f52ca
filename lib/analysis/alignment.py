"""Do class activation maps lie on the boxes? Soft overlap of each pair, and the maps to look at, from a stream of
outputs."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.analysis import cam
from lib.analysis.inference import LensError, Output, is_pooled, layer_maps
from lib.analysis.localization import METRICS, soft_overlap
from lib.analysis.statistics import mean_interval, paired_difference


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
) -> pd.DataFrame:
    """Soft IoBB and IoR of the class activation map of each pair: the map of the class that the box names, whatever was
    predicted.

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

    Returns
    -------
    DataFrame
        image, patient, class, (box,) n_boxes, box_area, cam_mass, a column for each of `localization.METRICS`, logit; a
        row per pair, in the order of the outputs. With other boxes also <metric>_other, of the metrics that have a
        chance. Last, what they depend on: layer, method, rounding.

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
    given = ["image", "patient", "class", *(["box"] if "box" in pairs else []), "n_boxes"]
    against = compared() if "other" in pairs else []
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
            kept = (output.logits.cpu()[position, classes] > 0).numpy()
            chosen, position, classes = chosen[kept].reset_index(drop=True), position[kept], classes[kept]
        raw = cam.pair_maps(pooled_maps(output, layer, head), head.weight, position, classes, method)
        maps = cam.normalise(raw).cpu()
        overlap = soft_overlap(maps, list(chosen["boxes"]), image_size, rounding=rounding)
        overlap["logit"] = output.logits.cpu()[position, classes].numpy()
        if against:
            other = soft_overlap(maps, list(chosen["other"]), image_size, rounding=rounding)
            overlap = overlap.join(other[against].add_suffix("_other"))
        parts.append(pd.concat([chosen[given], overlap], axis=1))
    columns = [*given, "box_area", "cam_mass", *METRICS, "logit", *(f"{metric}_other" for metric in against)]
    table = pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
    return table.assign(layer=layer, method=method, rounding=rounding)


def compared() -> list[str]:
    """The metrics of `localization.METRICS` that have a chance to be compared with."""
    return [name for name, metric in METRICS.items() if metric.chance]


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
        A row for each metric that has a chance, by its id: metric (as it is printed), point, low, high, n, n_skipped
        (the mean with its interval); anywhere, what the same map would get if it were laid anywhere; other_film, what
        it gets on the boxes of another film of the class; gain_point, gain_low, gain_high, the paired difference to
        that.
    """
    rows, patients = [], alignment["patient"]
    for name in compared():
        own, other = alignment[name], alignment[f"{name}_other"]
        mean = mean_interval(own, patients, n_replicates)._asdict()
        gain = paired_difference(own, other, patients, n_replicates)._asdict()
        rows.append(
            {"metric": METRICS[name].label}
            | {key: mean[key] for key in ("point", "low", "high", "n", "n_skipped")}
            | {"anywhere": alignment[METRICS[name].chance].mean(), "other_film": other.mean()}
            | {f"gain_{key}": gain[key] for key in ("point", "low", "high")}
        )
    return pd.DataFrame(rows, index=compared())


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

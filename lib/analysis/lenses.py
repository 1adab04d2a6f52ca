"""The lenses over a stream of outputs: alignment of class activation maps with boxes, and concepts of feature maps.

Each takes the iterator of `inference.stream`; with several layers asked of it, one forward pass serves them all.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.analysis import cam
from lib.analysis.dissection import StreamingQuantile, Thresholds, batch_thresholds, concept_totals, count_concepts
from lib.analysis.inference import Output, is_pooled
from lib.analysis.localization import soft_overlap


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
        One row a pair, by film row and class: row, image, patient, class, output (index into `classes`), n_boxes, boxes (array (K, 4)).
    """
    if unit not in ("pair", "box"):
        raise ValueError(f"unit must be 'pair' or 'box', got {unit!r}")
    rows = dict(zip(films["image"], films.index, strict=True))
    patients = dict(zip(films["image"], films["patient"], strict=True))
    kept = boxes[boxes["image"].isin(rows) & boxes["class"].isin(classes)]
    number = kept.groupby(["image", "class"]).cumcount() if unit == "box" else np.zeros(len(kept), np.int64)
    pairs = [(rows[image], image, patients[image], name, classes.index(name), box, len(part), part[["x1", "y1", "x2", "y2"]].to_numpy(float))
             for (image, name, box), part in kept.assign(box=number).groupby(["image", "class", "box"], sort=False)]
    frame = pd.DataFrame(pairs, columns=["row", "image", "patient", "class", "output", "box", "n_boxes", "boxes"])
    frame = frame.sort_values(["row", "output", "box"], ignore_index=True)
    return frame if unit == "box" else frame.drop(columns="box")


def with_other_boxes(pairs: pd.DataFrame) -> pd.DataFrame:
    """`pairs` with a column `other`: the boxes of another film of the same class, of another patient where the class allows it.

    A map that goes by anatomy alone fits them as well as its own. Each class is turned by as many places as its busiest patient has films
    (a patient's films lie together), so every set of boxes is used once. A class of one patient keeps its own, and so shows no difference.
    """
    other = pairs["boxes"].copy()
    for index in pairs.groupby("class").groups.values():
        patients = pairs.loc[index, "patient"]
        order = index[np.argsort(patients.to_numpy(), kind="stable")]
        for here, there in zip(order, np.roll(order, -patients.value_counts().max())):
            other.at[here] = pairs["boxes"].at[there]
    return pairs.assign(other=other)


def align(outputs: Iterable[Output], pairs: pd.DataFrame, head: nn.Linear, *, layer: str, image_size: int, method: str = "cam",
          rounding: str = "outward", restrict: str | None = None) -> pd.DataFrame:
    """Soft IoBB and IoR of the class activation map of each pair: the map of the class that the box names, whatever was predicted.

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
        image, patient, class, (box,) n_boxes, box_area, cam_mass, iobb, ior, iou, logit; a row per pair, in the order of the outputs. With other
        boxes also iobb_other and ior_other. Last, what they depend on: layer, method, rounding.

    Raises
    ------
    ValueError
        No pairs, or a layer that is not the one the head pools.
    """
    if not len(pairs):
        raise ValueError("no annotated film: the release has no boxes of these classes on the chosen films (see BBox_List_2017.csv and `annotated`)")
    if restrict not in (None, "predicted"):
        raise ValueError(f"restrict must be 'predicted' or None, got {restrict!r}")
    by_row, parts = dict(list(pairs.groupby("row"))), []
    columns = ["image", "patient", "class", *(["box"] if "box" in pairs else []), "n_boxes"]
    for output in outputs:
        found = [(position, by_row[row]) for position, row in enumerate(np.asarray(output.rows).tolist()) if row in by_row]
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
        if "other" in chosen:
            other = soft_overlap(maps, list(chosen["other"]), image_size, rounding=rounding)
            overlap["iobb_other"], overlap["ior_other"] = other["iobb"], other["ior"]
        parts.append(pd.concat([chosen[columns], overlap], axis=1))
    columns += ["box_area", "cam_mass", "iobb", "ior", "iou", "logit"]
    columns += ["iobb_other", "ior_other"] if "other" in pairs else []
    table = pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
    return table.assign(layer=layer, method=method, rounding=rounding)


def _maps(output, layer):
    if layer not in output.maps:
        raise ValueError(f"the outputs hold no maps of {layer!r}; there are {', '.join(output.maps) or 'none'}: ask `stream` for this layer")
    return output.maps[layer]


def pooled_maps(output: Output, layer: str, head: nn.Linear) -> torch.Tensor:
    """The maps of `layer` in `output`, after the check that the `head` pools them."""
    maps = _maps(output, layer)
    if maps.shape[1] != head.in_features:
        raise ValueError(f"layer {layer} has {maps.shape[1]} channels and the head {head.in_features}: CAM reads the layer that the head pools")
    if not is_pooled(output, layer, head):
        raise ValueError(f"layer {layer} is not the one that the head pools: its maps do not give the logits")
    return maps


def pair_cams(outputs: Iterable[Output], pairs: pd.DataFrame, head: nn.Linear, *, layer: str, size: int, method: str = "cam"):
    """Class activation maps to look at: those of `pairs`, in [0, 1], resized to the film, with the predicted probabilities.

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
            maps[here] = cam.resize(cam.normalise(raw), size).clamp(0, 1).cpu().numpy()
            probabilities[here] = torch.sigmoid(output.logits.cpu().double()[position, classes]).numpy()
    return maps, probabilities


@dataclass(frozen=True)
class Dissection:
    """`rows` (N,) of the films, `counts` int32 (N, F): components of film n in channel c that touch a box; `thresholds` of the channels."""

    rows: np.ndarray
    counts: np.ndarray
    thresholds: Thresholds


def dissect(outputs: Iterable[Output], boxes: Mapping[int, np.ndarray], *, layer: str, q: float, image_size: int, resolution: str = "image",
            connectivity: int = 8, rounding: str = "outward", reading: str = "paper") -> Dissection:
    """Concepts of every channel on the annotated films (Khakzar et al., sections 3.2 and 4), from one pass over the outputs.

    The thresholds need all films before the first component can be counted. So the maps wait in an unnamed scratch file, which goes
    with the process, and are read back a few films at a time: memory holds one batch, and the largest q of the values.

    Parameters
    ----------
    outputs : iterable of Output
        Of the annotated films only, with float32 maps of `layer`. Films without an entry in `boxes` are passed over.
    boxes : mapping of film row to array (K, 4)
        Boxes of every class in pixels of the films that the model sees.
    layer : str
    q : float
        P(A >= tau) = q over all annotated films, per channel.
    image_size, resolution, connectivity, rounding
        See `dissection.count_concepts`.
    reading : {'paper', 'imba'}
        'imba' counts as the authors' code does, for parity: thresholds of each batch's upsampled maps, masks cut by the boxes before their
        contours, holes among them, are counted, dead channels included. The result then depends on the batch size.

    Raises
    ------
    ValueError
        No annotated film, or maps that are not finite.
    OSError
        No space for the scratch file.
    """
    if not boxes:
        raise ValueError("no annotated film: the release has no boxes on the chosen films (see BBox_List_2017.csv and `annotated`)")
    if reading not in ("paper", "imba"):
        raise ValueError(f"reading is {reading!r}: 'paper' or 'imba'")
    imba = reading == "imba"
    enlarge_to = image_size if imba else None
    quantile, rows, counts = StreamingQuantile(q, len(boxes), layer, enlarge_to), [], []

    def count(maps, films, limits):
        return count_concepts(maps, limits.tau, [boxes[row] for row in films], image_size, resolution=resolution, connectivity=connectivity,
                              clip=imba, counting="contours" if imba else "components", rounding=rounding, usable=None if imba else limits.usable)

    with tempfile.TemporaryFile() as scratch:
        shape = None
        for output in outputs:
            kept = [position for position, row in enumerate(np.asarray(output.rows).tolist()) if row in boxes]
            if not kept:
                continue
            maps = _maps(output, layer)[kept].float().cpu().contiguous()
            shape = maps.shape[1:]
            quantile.update(maps)
            films = np.asarray(output.rows)[kept].tolist()
            rows += films
            if imba:
                counts.append(count(maps, films, batch_thresholds(maps, q, layer, enlarge_to)))
            else:
                maps.numpy().tofile(scratch)
        thresholds = quantile.result()
        scratch.seek(0)
        size, few = int(np.prod(shape)), 16
        for start in range(0, 0 if imba else len(rows), few):
            films = rows[start:start + few]
            maps = torch.from_numpy(np.fromfile(scratch, np.float32, len(films) * size).reshape(len(films), *shape))
            counts.append(count(maps, films, thresholds))
    return Dissection(np.array(rows), np.concatenate(counts), thresholds)


def concept_records(dissection: Dissection, films: pd.DataFrame, pairs: pd.DataFrame | None = None) -> pd.DataFrame:
    """image, patient, disjoint, unique: a row per annotated film, or with `pairs` (of `box_pairs`) one per pair, its class too."""
    chosen = films.loc[dissection.rows, ["image", "patient"]].reset_index(drop=True)
    records = pd.concat([chosen, concept_totals(dissection.counts)], axis=1)
    return records if pairs is None else records.merge(pairs[["image", "class"]], on="image")

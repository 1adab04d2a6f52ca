"""CAM, LRP and RAP against boxes (Nam & Lee): IoU by threshold, scores of the place that no constant and no scale can
move, and whether the films were seen in training.

All take the batches of films and a frame of pairs, film and class, such as `pairs.box_pairs` makes, and hold the maps
of one batch at a time. Means with intervals are over patients, with the same draws for every method. A map that
`heatmaps` refuses, because it is not stable, has no value anywhere: NaN, and it is counted.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib.analysis import cam
from lib.analysis.alignment import pooled_maps
from lib.analysis.inference import stream
from lib.analysis.localization import THRESHOLDS, positive_part, threshold_iou
from lib.analysis.place import by_chance, iou_columns, place_scores, tuned_iou
from lib.analysis.relevance.heatmaps import conservation, heatmaps
from lib.analysis.statistics import mean_intervals

METHODS = ("cam", "lrp", "rap")
READINGS = ("mean_iou", "iou_lesion")
# What a table says of a map itself, and so not of one that was refused.
_OF_MAPS = "iou_lesion iou_background mean_iou mask_area share enrichment empty hit auprc hit_other auprc_other".split()
_OF_MAPS += iou_columns()
CHANCE = ("hit_chance", "auprc_chance")


class Attributed(NamedTuple):
    """What `attribute` finds: two tables of the same maps."""

    iou: pd.DataFrame
    place: pd.DataFrame


def conservation_summary(
    model: nn.Module, batch, pairs: pd.DataFrame, *, methods: Sequence[str] = ("lrp", "rap"), **rules: str
) -> pd.DataFrame:
    """Is relevance lost on the way? How much of the relevance of its output every layer hands on, from the logit on.

    Parameters
    ----------
    model, pairs, **rules
        As in `attribute`; a film is explained for its first pair.
    batch
        With fields `rows` (B,) and `images` (B, Cin, S, S), on the model's device: films of `pairs`.

    Returns
    -------
    DataFrame
        By method: layers (their number), lowest, highest (relevance of the inputs / of the output over all films and
        layers; what LRP drops, where a neuron has no positive contribution to share it by, is lost).
    """
    _require_pairs(pairs)
    outputs = pairs.drop_duplicates("row").set_index("row")["output"].loc[np.asarray(batch.rows)]
    classes = torch.tensor(outputs.to_numpy())
    weighed = {method: conservation(model, batch.images, classes, method, **rules) for method in methods}
    layers = pd.concat(weighed, names=["method"]).groupby("method")
    return layers.agg(layers=("layer", "nunique"), lowest=("ratio", "min"), highest=("ratio", "max"))


def attribute(
    model: nn.Module,
    batches: Iterable,
    pairs: pd.DataFrame,
    *,
    layer: str,
    image_size: int,
    methods: Sequence[str] = METHODS,
    thresholds: Sequence[float] = THRESHOLDS,
    cam_method: str = "cam",
    rounding: str = "outward",
    inclusive: bool = True,
    init: str = "one",
    **rules: str,
) -> Attributed:
    """How each pair's maps lie on its boxes: IoU by method and threshold (Nam & Lee, Table 2), and the place of the
    evidence (`analysis.place`).

    The class is that of the box, whatever is predicted. For IoU, LRP and RAP are the relevance of the film's pixels,
    negatives cut to 0, divided by the maximum; CAM has its negatives cut to 0, is resized to the film, then divided by
    the maximum. The place is read from the signed maps, CAM's at its own size.

    Parameters
    ----------
    model : nn.Module
        Gives logits (B, M). For CAM its `head` is linear and pools `layer`.
    batches : iterable
        With fields `rows` (B,) and `images` (B, Cin, S, S), on the model's device, S = `image_size`.
    pairs : DataFrame
        row, image, patient, class, output, boxes, and optionally box: of `pairs.box_pairs`; optionally other, of
        `pairs.with_other_boxes`. Films that the batches do not bring have no row.
    layer : str
        Module whose maps CAM reads.
    methods : sequence of {'cam', 'lrp', 'rap'}
    thresholds, rounding, inclusive
        See `localization.threshold_iou`.
    cam_method : str
        See `cam.pair_maps`.
    init : {'one', 'logit'}
        Relevance of the class at the output, see `heatmaps.heatmaps`. A negative logit would leave no positive
        relevance.
    **rules
        Further options of `heatmaps.heatmaps`, such as `batchnorm` and `negative`.

    Returns
    -------
    iou : DataFrame
        A row per pair, method and threshold, in the order of `pairs`: image, patient, class, (box,) method, threshold,
        iou_lesion, iou_background, mean_iou, empty_mask_iou, box_area, mask_area, logit, stable (False: the map was
        refused; its IoUs and mask_area are NaN); last, what they depend on: layer, cam_method, rounding, init.
    place : DataFrame
        A row per pair and method: the same keys, box_area, empty (1.0 where nothing of the map is above 0), hit, auprc
        and iou_tuned of `analysis.place` (its threshold is tuned by method, over these pairs), hit_chance and
        auprc_chance (of maps of CAM's grid that know nothing, see `place.by_chance`; of relevance, of independent
        pixels: box_area), with other boxes hit_other and auprc_other, logit, stable; last the same.

    Raises
    ------
    ValueError
        No pairs, an unknown method, or CAM of a model without a pooled linear head.
    """
    others = ["hit_other", "auprc_other"] if "other" in pairs else []

    def measure(chosen):
        boxes, options = list(chosen["boxes"]), {"rounding": rounding}

        def tables(maps):
            films = positive_part(cam.resize(maps.clamp(min=0), image_size))  # relevance has the film's size already
            ious = threshold_iou(films, boxes, image_size, thresholds, inclusive=inclusive, **options)
            scores = place_scores(maps, boxes, image_size, **options)
            scores["empty"] = (maps <= 0).flatten(1).all(1).double().cpu().numpy()
            coarse = maps.shape[1] < image_size
            area = ious.groupby("pair")[["box_area", "box_area"]].first().to_numpy()
            scores[list(CHANCE)] = by_chance(maps.shape[1:], boxes, image_size, **options) if coarse else area
            if others:
                scores[others] = place_scores(maps, list(chosen["other"]), image_size, **options)[["hit", "auprc"]]
            return ious.join(scores, on="pair")

        return tables

    keys = ["image", "patient", *_pair_keys(pairs)[1:], "method"]
    values = "threshold iou_lesion iou_background mean_iou empty_mask_iou box_area mask_area logit stable".split()
    scores = ["box_area", "empty", "hit", "auprc", "iou_tuned", *CHANCE, *others, "logit", "stable"]
    of_cam, relevance = {"layer": layer, "cam_method": cam_method}, {"init": init, **rules}
    options = {"image_size": image_size, "rectify": False, **of_cam, **relevance}
    streamed = streamed_maps(model, batches, pairs, methods, **options)
    columns = [*keys, *values, "empty", "hit", "auprc", *CHANCE, *others, *iou_columns()]
    table = measured(streamed, measure, pairs[keys[:-1]], columns)
    place = table[table["threshold"] == thresholds[0]].reset_index(drop=True)
    place["iou_tuned"] = np.nan
    for rows in place.groupby("method").groups.values():
        place.loc[rows, "iou_tuned"] = tuned_iou(place.loc[rows, iou_columns()], place.loc[rows, "patient"])
    depend = {**of_cam, "rounding": rounding, **relevance}
    return Attributed(table[[*keys, *values]].assign(**depend), place[[*keys, *scores]].assign(**depend))


def pair_heatmaps(
    model: nn.Module,
    batches: Iterable,
    pairs: pd.DataFrame,
    *,
    image_size: int,
    methods: Sequence[str] = METHODS,
    **options: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The maps to look at, signed and at film size, with the predicted probabilities.

    Parameters
    ----------
    model, batches, pairs, image_size, methods, **options
        As in `attribute`: layer, cam_method, init and the rules; rectify, see `streamed_maps`.

    Returns
    -------
    maps : ndarray, float32 (P, K, S, S)
        Of the P pairs by the K methods, not scaled; NaN for a map that was refused. CAM: see `rectify`.
    probabilities : ndarray, float64 (P,)
        Sigmoid of the logits; NaN, and maps of zeros, for films that the batches do not bring.
    """
    found = np.zeros((len(pairs), len(methods), image_size, image_size), np.float32)
    probabilities = np.full(len(pairs), np.nan)
    for chosen, logits, maps in streamed_maps(model, batches, pairs, methods, image_size=image_size, **options):
        for order, (_, signed) in enumerate(maps):
            found[chosen.index, order] = cam.resize(signed, image_size).cpu().numpy()
        probabilities[chosen.index] = torch.sigmoid(torch.from_numpy(logits).double()).numpy()
    return found, probabilities


def iou_means(table: pd.DataFrame, *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Mean IoU of every class, method and threshold, with its 95 % interval over patients, under both readings of
    "IoU".

    Parameters
    ----------
    table : DataFrame
        Of `attribute`, its `iou`: one run's.
    n_replicates, seed : int
        Of the bootstrap over patients.

    Returns
    -------
    DataFrame
        reading ('mean_iou': over lesion and background, 'iou_lesion'), class, method, threshold, value, ci_low,
        ci_high, n (pairs), n_skipped (undefined), n_unstable (of these, maps that were refused), floor (the same mean
        for masks that are empty: 0 for the lesion alone), gain, gain_low, gain_high (value minus floor, pair by pair).

    Raises
    ------
    ValueError
        A pair twice in the table.
    """
    _require_once(table)
    keys, parts = ["class", "method", "threshold"], []
    for reading in READINGS:
        empty = table["empty_mask_iou"] if reading == "mean_iou" else 0 * table["empty_mask_iou"]
        means = means_by(table, keys, table[reading], "value ci_low ci_high", n_replicates, seed)
        gains = means_by(table, keys, table[reading] - empty, "gain gain_low gain_high", n_replicates, seed)
        means = means.assign(reading=reading, floor=means["value"] - gains["gain"])
        parts.append(means.join(gains[["gain", "gain_low", "gain_high"]]))
    columns = "value ci_low ci_high n n_skipped n_unstable floor gain gain_low gain_high".split()
    return pd.concat(parts, ignore_index=True)[["reading", *keys, *columns]]


def iou_differences(table: pd.DataFrame, *, baseline: str = "cam", n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Paired difference of every method to `baseline`, by class and threshold; arguments and errors as in `iou_means`.

    Returns
    -------
    DataFrame
        reading, class, method, threshold, difference (method minus baseline), ci_low, ci_high, n.
    """
    _require_once(table)
    methods = list(table["method"].unique())
    if baseline not in methods:
        raise ValueError(f"the table has no method {baseline!r}; it has {', '.join(map(str, methods))}")
    columns = "reading class method threshold difference ci_low ci_high n".split()
    keys, parts = ["patient", *_pair_keys(table), "threshold"], [pd.DataFrame(columns=columns)]
    for reading in READINGS:
        wide = table.pivot(index=keys, columns="method", values=reading).reset_index()
        for method in (name for name in methods if name != baseline):
            values, names = wide[method] - wide[baseline], "difference ci_low ci_high"
            found = means_by(wide, ["class", "threshold"], values, names, n_replicates, seed)
            parts.append(found.assign(reading=reading, method=method)[columns])
    return pd.concat(parts[1:] or parts, ignore_index=True)


def training_status(
    images: pd.Series, split: pd.Series, lists: Mapping[str, Collection[str]] | None = None
) -> pd.Series:
    """Whether each film was seen when the model was made: 'trained on', 'chosen on' (the epoch), or 'not seen'.

    Parameters
    ----------
    images : Series of str
        Names of films, such as a column of `attribute`'s table.
    split : Series of str, by name of the film
        'train', 'val' or 'test' in the study, for a model that the study trained.
    lists : mapping, optional
        For a model from elsewhere: the names under 'chexnet_train_list' and 'chexnet_val_list', as far as they are
        known. Without the first, films on neither list are 'unknown'.

    Returns
    -------
    Series of str, in the order of `images`.
    """
    if lists is None:
        lists = {"chexnet_train_list": split.index[split == "train"], "chexnet_val_list": split.index[split == "val"]}
    trained, chosen = (set(lists.get(f"chexnet_{part}_list", ())) for part in ("train", "val"))
    rest = "not seen" if "chexnet_train_list" in lists else "unknown"
    return images.map(
        lambda image: "trained on" if image in trained else "chosen on" if image in chosen else rest
    ).rename("films")


def iou_by_training(table: pd.DataFrame, status: pd.Series, *, n_replicates: int) -> pd.DataFrame:
    """`iou_means` with the films that were trained on, chosen on and not seen apart; the class is then 'trained on,
    Mass', say. `status`: of `training_status`, row by row."""
    return iou_means(table.assign(**{"class": status + ", " + table["class"]}), n_replicates=n_replicates)


def means_by(
    frame: pd.DataFrame, by: Sequence[str], values: pd.Series, names: str, n_replicates: int, seed: int = 0
) -> pd.DataFrame:
    """Means of `values`, row by row those of `frame`, with intervals over its column patient, by group of rows.

    `names` : three names for mean and interval. Returns the columns of `by`, these three, n, n_skipped (NaN), and, if
    the frame has a column stable, n_unstable (False there); groups in the order of their first rows.
    """
    groups = frame.groupby(by, sort=False).ngroup()
    found = mean_intervals(values, groups, frame["patient"], n_replicates, seed).set_index("group")
    means = frame[by].groupby(groups).first()
    means[names.split()] = found[["point", "low", "high"]]
    means[["n", "n_skipped"]] = found[["n", "n_skipped"]]
    return means.assign(n_unstable=(~frame["stable"]).groupby(groups).sum()) if "stable" in frame else means


def streamed_maps(
    model: nn.Module,
    batches: Iterable,
    pairs: pd.DataFrame,
    methods: Sequence[str],
    *,
    layer: str,
    image_size: int,
    cam_method: str = "cam",
    rectify: bool = True,
    **rules: str,
) -> Iterator[tuple[pd.DataFrame, np.ndarray, Iterator[tuple[str, Tensor]]]]:
    """Pairs, at most as many as a batch has films, indexed by their place in `pairs`; their logits; and (method, signed
    maps (P, S, S)) one by one. CAM has its positive part only, or, without `rectify`, is signed and at its own size.
    Arguments and errors as in `attribute`."""
    _require_pairs(pairs)
    if not len(methods) or not set(methods) <= set(METHODS):
        raise ValueError(f"methods are {list(methods)}; choose from {', '.join(METHODS)}")
    head = getattr(model, "head", None)
    if "cam" in methods and not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear layer `head` after average pooling, which CAM needs; choose "
            "methods lrp and rap"
        )

    def maps_of(batch, output, position, classes):
        films = batch.images[position.to(batch.images.device)] if set(methods) - {"cam"} else None
        for method in methods:
            if method == "cam":
                raw = cam.pair_maps(pooled_maps(output, layer, head), head.weight, position, classes, cam_method)
                yield method, cam.resize(raw.clamp(min=0), image_size) if rectify else raw
            else:
                yield method, heatmaps(model, films, classes.to(films.device), method, **rules).detach()

    by_row = dict(list(pairs.reset_index(drop=True).groupby("row")))
    for batch in batches:
        found = [(place, by_row[row]) for place, row in enumerate(np.asarray(batch.rows).tolist()) if row in by_row]
        if not found:
            continue
        [output] = stream(model, [batch], [layer] if "cam" in methods else [])
        here = pd.concat([part for _, part in found])
        positions = torch.tensor([place for place, part in found for _ in range(len(part))])
        for start in range(0, len(here), len(batch.images)):
            few = slice(start, start + len(batch.images))
            chosen, position, classes = here.iloc[few], positions[few], torch.tensor(here["output"].to_numpy()[few])
            logits = output.logits.cpu()[position, classes].numpy()
            yield chosen, logits, maps_of(batch, output, position, classes)


def measured(
    streamed: Iterable,
    measure: Callable[[pd.DataFrame], Callable[[Tensor], pd.DataFrame]],
    named: pd.DataFrame,
    columns: list[str],
) -> pd.DataFrame:
    """A table of all maps, in the order of the pairs, whatever that of the batches.

    Parameters
    ----------
    streamed : of `streamed_maps`.
    measure : callable
        Given some pairs, a function of their maps (P, S, S) to a frame in which `pair`, 0..P-1, says whose row it is.
    named : DataFrame
        What to say of each pair, in front.
    columns : list of str
        Of the table; `method`, `logit` and `stable` are among those to choose from. A map that is NaN all over is not
        stable: what a row says of the map itself is then NaN.
    """
    parts = []
    for chosen, logits, maps in streamed:
        measure_maps = measure(chosen)
        for order, (method, signed) in enumerate(maps):
            refused = signed.isnan().flatten(1).all(1)
            table = measure_maps(signed.masked_fill(refused[:, None, None], 0))
            here, refused = table.pop("pair").to_numpy(), refused.cpu().numpy()
            table.loc[refused[here], table.columns.intersection(_OF_MAPS)] = np.nan
            known = {"method": method, "logit": logits[here], "stable": ~refused[here]}
            parts.append(table.assign(**known, place=chosen.index.to_numpy()[here], order=order))
    if not parts:
        return pd.DataFrame(columns=columns)
    table = pd.concat(parts).sort_values(["place", "order"], kind="stable")
    named = named.reset_index(drop=True).loc[table["place"]]
    return pd.concat([named.reset_index(drop=True), table.reset_index(drop=True)], axis=1)[columns]


def _pair_keys(table: pd.DataFrame) -> list[str]:
    return ["image", "class", *(["box"] if "box" in table else [])]


def _require_pairs(pairs: pd.DataFrame) -> None:
    if not len(pairs):
        raise ValueError(
            "no pair of film and class to attribute: the release has no boxes of these classes on the chosen films "
            "(see BBox_List_2017.csv and `annotated`)"
        )


def _require_once(table: pd.DataFrame) -> None:
    keys = [*_pair_keys(table), "method", "threshold"]
    twice = table[table.duplicated(keys)]
    if len(twice):
        raise ValueError(
            f"{' '.join(map(str, twice[keys].iloc[0]))} is in the table more than once: give one run's at a time"
        )

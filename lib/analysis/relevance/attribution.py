"""CAM, LRP and RAP against boxes and regions (Nam & Lee): IoU by threshold, and where the positive relevance lies.

All take the batches of films and a frame of pairs, film and class, such as `lenses.box_pairs` makes, and hold the maps
of one batch at a time. Means with intervals are over patients, with the same draws for every method.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib.analysis import cam
from lib.analysis.alignment import pooled_maps
from lib.analysis.inference import stream
from lib.analysis.localization import THRESHOLDS, box_masks, positive_part, threshold_iou
from lib.analysis.relevance.heatmaps import heatmaps
from lib.analysis.statistics import mean_intervals

METHODS = ("cam", "lrp", "rap")
READINGS = ("mean_iou", "iou_lesion")
Regions = Mapping[str, np.ndarray]


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
) -> pd.DataFrame:
    """IoU of each pair's maps with its boxes, by method and threshold (Nam & Lee, Table 2).

    The class is that of the box, whatever is predicted. LRP and RAP: the relevance of the film's pixels, negatives cut
    to 0, divided by the maximum. CAM: negatives cut to 0, resized to the film, then divided by the maximum.

    Parameters
    ----------
    model : nn.Module
        Gives logits (B, M). For CAM its `head` is linear and pools `layer`.
    batches : iterable
        With fields `rows` (B,) and `images` (B, Cin, S, S), on the model's device, S = `image_size`.
    pairs : DataFrame
        row, image, patient, class, output, boxes, and optionally box: of `lenses.box_pairs`. Films that the batches do
        not bring have no row.
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
    DataFrame
        A row per pair, method and threshold, in the order of `pairs`: image, patient, class, (box,) method, threshold,
        iou_lesion, iou_background, mean_iou, empty_mask_iou, box_area, mask_area, logit; last, what they depend on:
        layer, cam_method, rounding, init.

    Raises
    ------
    ValueError
        No pairs, an unknown method, or CAM of a model without a pooled linear head.
    """
    parts = []
    for chosen, logits, maps in _streamed(
        model, batches, pairs, methods, layer, image_size, cam_method, {"init": init, **rules}
    ):
        for order, (method, signed) in enumerate(maps):
            table = threshold_iou(
                positive_part(signed),
                list(chosen["boxes"]),
                image_size,
                thresholds,
                rounding=rounding,
                inclusive=inclusive,
            )
            here = table.pop("pair").to_numpy()
            parts.append(
                table.assign(method=method, logit=logits[here], place=chosen.index.to_numpy()[here], order=order)
            )
    keys = ["image", "patient", "class", *(["box"] if "box" in pairs else [])]
    columns = [
        *keys,
        "method",
        "threshold",
        "iou_lesion",
        "iou_background",
        "mean_iou",
        "empty_mask_iou",
        "box_area",
        "mask_area",
        "logit",
    ]
    options = {"layer": layer, "cam_method": cam_method, "rounding": rounding, "init": init, **rules}
    return _in_order(parts, pairs[keys], columns).assign(**options)


def look(
    model: nn.Module,
    batches: Iterable,
    pairs: pd.DataFrame,
    regions_of: Callable[[pd.DataFrame], Regions],
    *,
    layer: str,
    image_size: int,
    methods: Sequence[str] = ("lrp", "rap"),
    cam_method: str = "cam",
    init: str = "one",
    **rules: str,
) -> pd.DataFrame:
    """Where the positive relevance lies: its share in each region of each film, beside the share that area alone would
    give.

    Parameters
    ----------
    model, batches, layer, image_size, methods, cam_method, init, rules
        As in `attribute`.
    pairs : DataFrame
        row, output, and whatever else the result shall carry (image, patient, class, a kind of film); films without
        boxes may be among them.
    regions_of : callable
        Given some rows of `pairs` (P of them), the masks bool (P, S, S) by name; `film_regions` makes them.

    Returns
    -------
    DataFrame
        A row per pair, method and region, in the order of `pairs`: its columns but for `boxes`, then method, logit,
        region, share, area, enrichment (see `relevance_shares`).

    Raises
    ------
    ValueError
        As `attribute`.
    """
    parts = []
    for chosen, logits, maps in _streamed(
        model, batches, pairs, methods, layer, image_size, cam_method, {"init": init, **rules}
    ):
        regions = regions_of(chosen)
        for order, (method, signed) in enumerate(maps):
            table = relevance_shares(signed, regions)
            here = table.pop("pair").to_numpy()
            parts.append(
                table.assign(method=method, logit=logits[here], place=chosen.index.to_numpy()[here], order=order)
            )
    kept = [name for name in pairs if name != "boxes"]
    columns = [*kept, "method", "logit", "region", "share", "area", "enrichment"]
    return _in_order(parts, pairs[kept], columns)


def pair_heatmaps(
    model: nn.Module,
    batches: Iterable,
    pairs: pd.DataFrame,
    *,
    layer: str,
    image_size: int,
    methods: Sequence[str] = METHODS,
    cam_method: str = "cam",
    init: str = "one",
    **rules: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The maps to look at, signed and at film size, with the predicted probabilities; arguments as in `attribute`.

    Returns
    -------
    maps : ndarray, float32 (P, K, S, S)
        Of the P pairs by the K methods, not scaled. CAM has its positive part only.
    probabilities : ndarray, float64 (P,)
        Sigmoid of the logits; NaN, and maps of zeros, for films that the batches do not bring.
    """
    found = np.zeros((len(pairs), len(methods), image_size, image_size), np.float32)
    probabilities = np.full(len(pairs), np.nan)
    for chosen, logits, maps in _streamed(
        model, batches, pairs, methods, layer, image_size, cam_method, {"init": init, **rules}
    ):
        for order, (_, signed) in enumerate(maps):
            found[chosen.index, order] = signed.cpu().numpy()
        probabilities[chosen.index] = torch.sigmoid(torch.from_numpy(logits).double()).numpy()
    return found, probabilities


@torch.no_grad()
def relevance_shares(maps: Tensor | np.ndarray, regions: Regions) -> pd.DataFrame:
    """Share of each map's positive relevance inside each region, ``sum(R+ M) / sum(R+)``; sums in float64.

    Parameters
    ----------
    maps : float (P, H, W), signed
    regions : mapping of name to bool (P, H, W)
        They may overlap, and need not cover the film.

    Returns
    -------
    DataFrame
        A row per map and region, maps in their order: pair, region, share, area (share of the film), enrichment (share
        / area; 1 is what a map without any preference gets). A map without positive relevance, or a region without a
        pixel, has NaN in share and enrichment.

    Raises
    ------
    ValueError
        Maps that are not finite, or a region of another shape.
    """
    maps = torch.as_tensor(maps)
    if maps.ndim != 3:
        raise ValueError(f"need maps (P, H, W), got {tuple(maps.shape)}")
    positive = positive_part(maps).double()
    total, columns = positive.sum(dim=(1, 2)).cpu().numpy(), []
    for name, mask in regions.items():
        mask = torch.as_tensor(mask, dtype=torch.bool, device=maps.device)
        if mask.shape != maps.shape:
            raise ValueError(f"region {name!r} has shape {tuple(mask.shape)}, the maps {tuple(maps.shape)}")
        inside, area = (positive * mask).sum(dim=(1, 2)).cpu().numpy(), mask.double().mean(dim=(1, 2)).cpu().numpy()
        share = np.divide(inside, total, out=np.full(len(maps), np.nan), where=(total > 0) & (area > 0))
        columns.append(pd.DataFrame({"pair": np.arange(len(maps)), "region": name, "share": share, "area": area}))
    table = pd.concat(columns).sort_values("pair", kind="stable", ignore_index=True)
    return table.assign(enrichment=table["share"] / table["area"].where(table["area"] > 0))


def film_regions(
    boxes: Sequence, image_size: int, lungs: np.ndarray | None = None, *, rounding: str = "outward"
) -> dict[str, np.ndarray]:
    """The regions 'boxes', 'lungs' (where masks are given; boxes in them included) and 'outside' (neither), bool (P, S,
    S) each.

    `boxes` : P arrays (K, 4) in pixels of the film, K may be 0.    `lungs` : bool (P, S, S).
    """
    marked = box_masks(boxes, image_size, rounding=rounding)
    if lungs is None:
        return {"boxes": marked, "outside": ~marked}
    lungs = np.asarray(lungs, dtype=bool)
    if lungs.shape != marked.shape:
        raise ValueError(f"lungs have shape {lungs.shape}; they must be {marked.shape}, one mask a film at its size")
    return {"boxes": marked, "lungs": lungs, "outside": ~(marked | lungs)}


def iou_means(table: pd.DataFrame, *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Mean IoU of every class, method and threshold, with its 95 % interval over patients, under both readings of
    "IoU".

    Parameters
    ----------
    table : DataFrame
        Of `attribute`: one run's.
    n_replicates, seed : int
        Of the bootstrap over patients.

    Returns
    -------
    DataFrame
        reading ('mean_iou': over lesion and background, 'iou_lesion'), class, method, threshold, value, ci_low,
        ci_high, n (pairs), n_skipped (undefined), floor (the same mean for masks that are empty: 0 for the lesion
        alone), gain, gain_low, gain_high (value minus floor, pair by pair).

    Raises
    ------
    ValueError
        A pair twice in the table.
    """
    keys = ["class", "method", "threshold"]
    _check_once(table)
    groups = table.groupby(keys, sort=False).ngroup()
    names = table[keys].groupby(groups).first()
    parts = []
    for reading in READINGS:
        empty = table["empty_mask_iou"] if reading == "mean_iou" else 0 * table["empty_mask_iou"]
        means, gains = (
            mean_intervals(values, groups, table["patient"], n_replicates, seed).set_index("group")
            for values in (table[reading], table[reading] - empty)
        )
        parts.append(
            names.assign(
                reading=reading,
                value=means["point"],
                ci_low=means["low"],
                ci_high=means["high"],
                n=means["n"],
                n_skipped=means["n_skipped"],
                floor=means["point"] - gains["point"],
                gain=gains["point"],
                gain_low=gains["low"],
                gain_high=gains["high"],
            )
        )
    columns = [
        "reading",
        *keys,
        "value",
        "ci_low",
        "ci_high",
        "n",
        "n_skipped",
        "floor",
        "gain",
        "gain_low",
        "gain_high",
    ]
    return pd.concat(parts, ignore_index=True)[columns]


def iou_differences(table: pd.DataFrame, *, baseline: str = "cam", n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Paired difference of every method to `baseline`, by class and threshold; arguments and errors as in `iou_means`.

    Returns
    -------
    DataFrame
        reading, class, method, threshold, difference (method minus baseline), ci_low, ci_high, n.
    """
    _check_once(table)
    if baseline not in set(table["method"]):
        raise ValueError(
            f"the table has no method {baseline!r}; it has {', '.join(map(str, table['method'].unique()))}"
        )
    others, parts = [name for name in table["method"].unique() if name != baseline], []
    keys = ["patient", *_pair_keys(table), "threshold"]
    for reading in READINGS:
        wide = table.pivot(index=keys, columns="method", values=reading).reset_index()
        groups = wide.groupby(["class", "threshold"], sort=False).ngroup()
        names = wide[["class", "threshold"]].groupby(groups).first()
        for method in others:
            found = mean_intervals(
                wide[method] - wide[baseline], groups, wide["patient"], n_replicates, seed
            ).set_index("group")
            parts.append(
                names.assign(
                    reading=reading,
                    method=method,
                    difference=found["point"],
                    ci_low=found["low"],
                    ci_high=found["high"],
                    n=found["n"],
                )
            )
    columns = ["reading", "class", "method", "threshold", "difference", "ci_low", "ci_high", "n"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def share_means(shares: pd.DataFrame, by: Sequence[str], *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Mean share of the positive relevance by group (method and region, say), and what it exceeds the share by area by.

    Parameters
    ----------
    shares : DataFrame
        Of `look`, with the columns of `by` and patient.
    by : sequence of str
    n_replicates, seed : int
        Of the bootstrap over patients.

    Returns
    -------
    DataFrame
        The columns of `by`; value, ci_low, ci_high (share); area (mean over the same films), enrichment (value / area);
        gain (share minus area, film by film), gain_low, gain_high; n (films), n_skipped (no positive relevance, or no
        such region).
    """
    by = list(by)
    groups = shares.groupby(by, sort=False).ngroup()
    names = shares[by].groupby(groups).first()
    patients, known = shares["patient"], shares["share"].notna()
    value = mean_intervals(shares["share"], groups, patients, n_replicates, seed).set_index("group")
    gain = mean_intervals(shares["share"] - shares["area"], groups, patients, n_replicates, seed).set_index("group")
    area = shares["area"].where(known).groupby(groups).mean()
    return names.assign(
        value=value["point"],
        ci_low=value["low"],
        ci_high=value["high"],
        area=area,
        enrichment=value["point"] / area,
        gain=gain["point"],
        gain_low=gain["low"],
        gain_high=gain["high"],
        n=value["n"],
        n_skipped=value["n_skipped"],
    ).reset_index(drop=True)


def box_gaps(shares: pd.DataFrame, by: Sequence[str], *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """How much denser the positive relevance is in the boxes than in the lungs, film by film: enrichment of the one
    minus that of the other.

    A map that merely favours lungs is enriched in boxes as well; its gap is not above 0.

    Parameters
    ----------
    shares : DataFrame
        Of `look`, with the columns of `by`, row and patient. Films without boxes, or without lung masks, have no gap.
    by : sequence of str
        Without region.

    Returns
    -------
    DataFrame
        The columns of `by`; gap, gap_low, gap_high, n (films). Empty where no film has both regions.
    """
    by = list(by)
    wide = shares.pivot(index=[*by, "patient", "row"], columns="region", values="enrichment").reset_index()
    columns = [*by, "gap", "gap_low", "gap_high", "n"]
    if not {"boxes", "lungs"} <= set(wide):
        return pd.DataFrame(columns=columns)
    wide = wide.dropna(subset=["boxes", "lungs"])
    if not len(wide):
        return pd.DataFrame(columns=columns)
    groups = wide.groupby(by, sort=False).ngroup()
    found = mean_intervals(wide["boxes"] - wide["lungs"], groups, wide["patient"], n_replicates, seed).set_index(
        "group"
    )
    names = wide[by].groupby(groups).first()
    return names.assign(gap=found["point"], gap_low=found["low"], gap_high=found["high"], n=found["n"]).reset_index(
        drop=True
    )


def _streamed(
    model: nn.Module,
    batches: Iterable,
    pairs: pd.DataFrame,
    methods: Sequence[str],
    layer: str,
    size: int,
    cam_method: str,
    rules: Mapping[str, str],
) -> Iterator[tuple[pd.DataFrame, np.ndarray, Iterator[tuple[str, Tensor]]]]:
    """Pairs, at most as many as a batch has films, indexed by their place in `pairs`; their logits; and (method, maps
    (P, S, S)) one by one."""
    if not len(pairs):
        raise ValueError(
            "no pair of film and class to attribute: the release has no boxes of these classes on the chosen films "
            "(see BBox_List_2017.csv and `annotated`)"
        )
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not len(methods):
        raise ValueError(f"methods are {list(methods)}; choose from {', '.join(METHODS)}")
    head = getattr(model, "head", None)
    if "cam" in methods and not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear layer `head` after average pooling, which CAM needs; choose "
            "methods lrp and rap"
        )
    by_row = dict(list(pairs.reset_index(drop=True).groupby("row")))
    for batch in batches:
        found = [
            (position, by_row[row]) for position, row in enumerate(np.asarray(batch.rows).tolist()) if row in by_row
        ]
        if not found:
            continue
        [output] = stream(model, [batch], [layer] if "cam" in methods else [])
        here = pd.concat([part for _, part in found])
        positions = torch.tensor([position for position, part in found for _ in range(len(part))])
        for start in range(0, len(here), len(batch.images)):
            chosen, position = (
                here.iloc[start : start + len(batch.images)],
                positions[start : start + len(batch.images)],
            )
            classes = torch.tensor(chosen["output"].to_numpy())
            logits = output.logits.cpu()[position, classes].numpy()
            yield (
                chosen,
                logits,
                _each_method(
                    model, batch.images, output, head, position, classes, methods, layer, size, cam_method, rules
                ),
            )


def _each_method(model, images, output, head, position, classes, methods, layer, size, cam_method, rules):
    films = images[position.to(images.device)] if set(methods) - {"cam"} else None
    for method in methods:
        if method == "cam":
            raw = cam.pair_maps(pooled_maps(output, layer, head), head.weight, position, classes, cam_method)
            yield method, cam.resize(raw.clamp(min=0), size)
        else:
            yield method, heatmaps(model, films, classes.to(images.device), method, **rules).detach()


def _in_order(parts: list[pd.DataFrame], named: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The parts in the order of the pairs, whatever that of the batches, with the names of each pair in front."""
    if not parts:
        return pd.DataFrame(columns=columns)
    table = pd.concat(parts).sort_values(["place", "order"], kind="stable")
    named = named.reset_index(drop=True).loc[table["place"]]
    return pd.concat([named.reset_index(drop=True), table.reset_index(drop=True)], axis=1)[columns]


def _pair_keys(table: pd.DataFrame) -> list[str]:
    return ["image", "class", *(["box"] if "box" in table else [])]


def _check_once(table: pd.DataFrame) -> None:
    keys = [*_pair_keys(table), "method", "threshold"]
    twice = table[table.duplicated(keys)]
    if len(twice):
        raise ValueError(
            f"{' '.join(map(str, twice[keys].iloc[0]))} is in the table more than once: give one run's at a time"
        )

"""Where the positive relevance lies (Nam & Lee, section 3): its share in the boxes, in the lungs and elsewhere, against
the share that area alone would give.

Frames and maps as in `attribution`; intervals are over patients, with the same draws for every method and model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib.analysis.localization import box_masks, positive_part
from lib.analysis.metrics import classification_metrics
from lib.analysis.relevance.attribution import means_by, measured, pair_heatmaps, streamed_maps

Models = Mapping[str, tuple[nn.Module, str]]  # by name: a model and the layer that CAM reads


def film_kinds(films: pd.DataFrame) -> pd.Series:
    """Kind of every RSNA film: 'pneumonia', 'normal', or the release's own word for a film that is neither.

    `films` : labels, detail.
    """
    return films["detail"].replace({"Normal": "normal"}).where(films["labels"] != "Pneumonia", "pneumonia")


def intention_pairs(films: pd.DataFrame, boxes: pd.DataFrame) -> pd.DataFrame:
    """The films with pneumonia and the normal ones, each with what its relevance shall explain.

    Parameters
    ----------
    films : DataFrame
        image, patient, kind (`film_kinds`); the index is the film's row in the store.
    boxes : DataFrame
        image, x1, y1, x2, y2 in pixels of the films that the model sees.

    Returns
    -------
    DataFrame
        row, image, patient, kind, output (of a model of both sides, `models.both_sides`: 0, pneumonia; for a normal
        film 1, what speaks against it), boxes (array (K, 4), K may be 0).
    """
    corners = {image: part[["x1", "y1", "x2", "y2"]].to_numpy(float) for image, part in boxes.groupby("image")}
    pairs = films[films["kind"].isin(["pneumonia", "normal"])].reset_index(names="row")
    pairs = pairs[["row", "image", "patient", "kind"]].assign(output=(pairs["kind"] == "normal").astype(int))
    pairs["boxes"] = [corners.get(image, np.empty((0, 4))) for image in pairs["image"]]
    return pairs


def agreed_pairs(
    pairs: pd.DataFrame, rows: Sequence[int], logits: Mapping[str, np.ndarray], targets: np.ndarray, count: int = 2
) -> pd.DataFrame:
    """`count` pairs of each kind that all models get right, or most where there are no such; pneumonia first.

    Parameters
    ----------
    pairs : DataFrame
        Of `intention_pairs`.
    rows : sequence of N int
        Films that the models judged.
    logits : mapping of model to (N, 1)
    targets : (N, 1)
        1: pneumonia.
    """
    right = sum((values[:, 0] > 0) == (targets[:, 0] == 1) for values in (np.asarray(v) for v in logits.values()))
    agree = pairs.assign(agree=pairs["row"].map(dict(zip(rows, right, strict=True))))
    shown = agree.sort_values("agree", ascending=False, kind="stable").groupby("kind", sort=False).head(count)
    return shown.sort_values("kind", ascending=False, ignore_index=True)


def model_auroc(
    logits: Mapping[str, np.ndarray],
    targets: np.ndarray,
    classes: Sequence[str],
    patients: Sequence,
    *,
    n_replicates: int,
    label: str = "Pneumonia",
) -> pd.DataFrame:
    """AUROC of each model for the class `label`, as `tables.nam_lee.table1` takes it; arguments as in
    `metrics.classification_metrics`, logits by model.

    Returns
    -------
    DataFrame
        model, class, value, ci_low, ci_high, n (films).
    """
    scores = [
        classification_metrics(values, targets, classes, patients, n_replicates=n_replicates).assign(model=name)
        for name, values in logits.items()
    ]
    frame = pd.concat(scores, ignore_index=True).query("`class` == @label").assign(n=len(targets))
    names = {"auroc": "value", "auroc_ci_low": "ci_low", "auroc_ci_high": "ci_high"}
    return frame.rename(columns=names)[["model", "class", *names.values(), "n"]].reset_index(drop=True)


def resized_masks(masks: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Masks bool (S, S) at the size of the films that the model sees, bool (P, size, size): pixels of which they cover
    at least half."""
    smaller = [cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA) for mask in masks]
    return np.stack(smaller) >= 0.5


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


@torch.no_grad()
def relevance_shares(maps: Tensor | np.ndarray, regions: Mapping[str, np.ndarray]) -> pd.DataFrame:
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


def relevance_shares_by_region(
    model: nn.Module,
    batches: Iterable,
    pairs: pd.DataFrame,
    lungs: np.ndarray | None = None,
    *,
    image_size: int,
    methods: Sequence[str] = ("lrp", "rap"),
    rounding: str = "outward",
    **options,
) -> pd.DataFrame:
    """Share of the positive relevance in each region of each film, beside the share that area alone would give.

    Parameters
    ----------
    model, batches, image_size, methods, rounding, **options
        As in `attribution.attribute`: layer, cam_method, init and the rules.
    pairs : DataFrame
        row, output, boxes, and whatever else the result shall say (image, patient, class, a kind of film); films
        without boxes may be among them.
    lungs : bool (P, S, S), optional
        Lung masks of the pairs, one each, where they are known.

    Returns
    -------
    DataFrame
        A row per pair, method and region of `film_regions`, in the order of `pairs`: its columns but for `boxes`, then
        method, logit, stable (False: the map was refused, and has no share), region, share, area, enrichment (see
        `relevance_shares`).

    Raises
    ------
    ValueError
        As `attribution.attribute`.
    """

    def measure(chosen):
        known = None if lungs is None else lungs[chosen.index]
        regions = film_regions(list(chosen["boxes"]), image_size, known, rounding=rounding)
        return lambda maps: relevance_shares(maps, regions)

    streamed = streamed_maps(model, batches, pairs, methods, image_size=image_size, **options)
    named = pairs[[name for name in pairs if name != "boxes"]]
    return measured(streamed, measure, named, [*named, *"method logit stable region share area enrichment".split()])


def shares_by_model(
    models: Models, batches: Callable[[], Iterable], pairs: pd.DataFrame, lungs: np.ndarray | None = None, **options
) -> pd.DataFrame:
    """`relevance_shares_by_region` of every model, with a last column model; `batches` makes the films' batches
    anew."""
    parts = [
        relevance_shares_by_region(model, batches(), pairs, lungs, layer=layer, **options).assign(model=name)
        for name, (model, layer) in models.items()
    ]
    return pd.concat(parts, ignore_index=True)


def heatmaps_by_model(
    models: Models, batches: Callable[[], Iterable], pairs: pd.DataFrame, **options
) -> tuple[np.ndarray, np.ndarray]:
    """`attribution.pair_heatmaps` of N models: maps (P, N, K, S, S) and probabilities (P, N); `batches` makes the
    films' batches anew."""
    found = [pair_heatmaps(model, batches(), pairs, layer=layer, **options) for model, layer in models.values()]
    maps, probabilities = (np.stack(part, axis=1) for part in zip(*found, strict=True))
    return maps, probabilities


def share_means(shares: pd.DataFrame, by: Sequence[str], *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Mean share of the positive relevance by group (method and region, say), and what it exceeds the share by area by.

    Parameters
    ----------
    shares : DataFrame
        Of `relevance_shares_by_region`, with the columns of `by` and patient.
    by : sequence of str
    n_replicates, seed : int
        Of the bootstrap over patients.

    Returns
    -------
    DataFrame
        The columns of `by`; value, ci_low, ci_high (share); area (mean over the same films), enrichment (value / area);
        gain (share minus area, film by film), gain_low, gain_high; n (films), n_skipped (no positive relevance, no such
        region, or no stable map), n_unstable (of these, maps that were refused).
    """
    by = list(by)
    means = means_by(shares, by, shares["share"], "value ci_low ci_high", n_replicates, seed)
    gains = means_by(shares, by, shares["share"] - shares["area"], "gain gain_low gain_high", n_replicates, seed)
    known = shares["area"].where(shares["share"].notna())
    area = known.groupby(shares.groupby(by, sort=False).ngroup()).mean()
    means = means.assign(area=area, enrichment=means["value"] / area).join(gains[["gain", "gain_low", "gain_high"]])
    columns = "value ci_low ci_high area enrichment gain gain_low gain_high n n_skipped n_unstable".split()
    return means[[*by, *columns]].reset_index(drop=True)


def box_gaps(shares: pd.DataFrame, by: Sequence[str], *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """How much denser the positive relevance is in the boxes than in the lungs, film by film: enrichment of the one
    minus that of the other.

    A map that merely favours lungs is enriched in boxes as well; its gap is not above 0.

    Parameters
    ----------
    shares : DataFrame
        Of `relevance_shares_by_region`, with the columns of `by`, row and patient. Films without boxes, or without
        lung masks, have no gap.
    by : sequence of str
        Without region.

    Returns
    -------
    DataFrame
        The columns of `by`; gap, gap_low, gap_high, n (films). Empty where no film has both regions.
    """
    by = list(by)
    columns = [*by, "gap", "gap_low", "gap_high", "n"]
    wide = shares.pivot(index=[*by, "patient", "row"], columns="region", values="enrichment").reset_index()
    wide = wide.reindex(columns=[*by, "patient", "boxes", "lungs"]).dropna(subset=["boxes", "lungs"])
    if not len(wide):
        return pd.DataFrame(columns=columns)
    gaps = means_by(wide, by, wide["boxes"] - wide["lungs"], "gap gap_low gap_high", n_replicates, seed)
    return gaps[columns].reset_index(drop=True)

"""Do CAM, LRP and RAP show what was learnt? The bar that Arun et al. (2021) set for films of the chest: localisation by
pixel AUPRC, randomisation (Adebayo et al. 2018), repeatability over seeds, reproducibility over architectures.

Relevance that is handed down by positive contributions alone converges to the same map whatever the upper layers say
(Sixt et al. 2020), so a sharp map on a lesion may be a picture of the film.
"""

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from lib.analysis.controls import OTHER_FILM, cascade, likeness
from lib.analysis.relevance.attribution import CHANCE, METHODS, means_by, pair_heatmaps

SCORES = ("empty", "hit", "auprc", "iou_tuned")
LIKENESS = ("ssim", "rank")
KEYS = ["image", "class"]


def place_means(place: pd.DataFrame, *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Mean of each score by method, with its 95 % interval over patients.

    Parameters
    ----------
    place : DataFrame
        Of `attribution.attribute`: one network's.
    n_replicates, seed : int
        Of the bootstrap over patients.

    Returns
    -------
    DataFrame
        method, score (of `SCORES`), value, ci_low, ci_high, n (pairs), n_skipped (undefined), n_unstable (of these,
        maps that were refused), chance (hit and AUPRC of maps that know nothing, see `attribution.attribute`; NaN of
        the others).
    """
    long, by = place.melt(["patient", "method", "stable"], list(SCORES), "score"), ["method", "score"]
    means = means_by(long, by, long["value"], "value ci_low ci_high", n_replicates, seed)
    chance = place.groupby("method")[list(CHANCE)].mean().set_axis(["hit", "auprc"], axis=1).stack()
    return means.join(chance.rename("chance"), by).reset_index(drop=True)


def map_likeness(
    maps: np.ndarray, others: Mapping[str, Sequence[np.ndarray]], pairs: pd.DataFrame, methods: Sequence[str] = METHODS
) -> pd.DataFrame:
    """How alike the maps of one network are to those of others, see `controls.likeness`.

    Parameters
    ----------
    maps : float (P, K, S, S)
        Signed, of `attribution.pair_heatmaps` without `rectify`.
    others : mapping of a name to such arrays
        Networks of one kind under one name, such as the same run with other seeds.
    pairs : DataFrame
        image, class, patient of the P pairs.
    methods : sequence of str
        The K.

    Returns
    -------
    DataFrame
        A row per other network, method and pair: against (the name), method, image, class, patient, ssim, rank. NaN
        where either map was refused.
    """
    parts = []
    for against, method, k, other in (
        (name, method, k, other)
        for name, several in others.items()
        for other in several
        for k, method in enumerate(methods)
    ):
        both = np.isfinite(maps[:, k]).all((1, 2)) & np.isfinite(other[:, k]).all((1, 2))
        part = pairs[[*KEYS, "patient"]].assign(against=against, method=method, ssim=np.nan, rank=np.nan)
        found = likeness(*(torch.from_numpy(one[both, k]) for one in (maps, other)))
        part.loc[both, list(LIKENESS)] = found.to_numpy()
        parts.append(part)
    columns = ["against", "method", *KEYS, "patient", *LIKENESS]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def randomised(
    model: nn.Module, fresh: nn.Module, batches: Sequence, pairs: pd.DataFrame, **options
) -> tuple[np.ndarray, pd.DataFrame]:
    """Maps of the network while it is made random from the head down, held against its own.

    Nobody has measured from which likeness on a map counts as unchanged. What maps have in common whatever the film,
    the shape of a chest and the size of a cell, is seen in the random network's maps of other films.

    Parameters
    ----------
    model, batches, pairs, **options
        As in `attribution.attribute`: image_size, methods, layer, cam_method, init and the rules. The batches are gone
        through once a stage. Pairs of different films.
    fresh : nn.Module
        The same architecture with weights that are drawn independently of the model's: the very weights that a model
        was trained from scratch from are still in it.

    Returns
    -------
    maps : float32 (P, K, S, S)
        Of the model as it is.
    likeness : DataFrame
        Of `map_likeness`; against is the last stage that was made random, from 'none' on (see `controls.cascade`), and
        at the end 'another film': the map that the wholly random network has of the pair before.
    """
    bar = {"unit": "stage", "delay": 10, "mininterval": 5, "ascii": True, "leave": False}
    stages = {
        stage: [pair_heatmaps(changed, batches, pairs, rectify=False, **options)[0]]
        for stage, changed in tqdm(cascade(model, fresh), "randomised", file=sys.stdout, **bar)
    }
    stages[OTHER_FILM] = [np.roll(maps, 1, axis=0) for maps in list(stages.values())[-1]]
    return stages["none"][0], map_likeness(stages["none"][0], stages, pairs, options.get("methods", METHODS))


def likeness_means(alike: pd.DataFrame, *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Means of `map_likeness` with 95 % intervals over patients: against, method, ssim, ssim_low, ssim_high, the same
    of rank and of abs_rank (its size: maps that are turned over, red for blue, are alike too, and in the mean of the
    signed correlation cancel those that are not), n (comparisons), n_skipped (a map was refused, or is constant)."""
    by, scores = ["against", "method"], {**alike[list(LIKENESS)], "abs_rank": alike["rank"].abs()}
    *parts, last = (
        means_by(alike, by, values, f"{name} {name}_low {name}_high", n_replicates, seed).set_index(by)
        for name, values in scores.items()
    )
    return pd.concat([*(part.drop(columns=["n", "n_skipped"]) for part in parts), last], axis=1).reset_index()

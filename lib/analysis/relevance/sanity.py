"""Do CAM, LRP and RAP show what was learnt? The bar that Arun et al. (2021) set for films of the chest: localisation by
pixel AUPRC, randomisation (Adebayo et al. 2018), repeatability over seeds, reproducibility over architectures.

Relevance that is handed down by positive contributions alone converges to the same map whatever the upper layers say
(Sixt et al. 2020), so a sharp map on a lesion may be a picture of the film.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.analysis.controls import cascade, likeness
from lib.analysis.relevance.attribution import METHODS, means_by, pair_heatmaps

SCORES = ("empty", "hit", "auprc", "iou_tuned")
LIKENESS = ("ssim", "rank")
# Mean rank correlation above which maps are said to have stayed as they were. Nobody has measured a bound: at 0.5 the
# ranks of a random network's map still tell a quarter of the variance of the trained one's.
BOUND = 0.5
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
        maps that were refused), chance (the mean share of the film that the boxes take: hit and AUPRC of a map that
        knows nothing; NaN of the others).
    """
    long = place.melt(["patient", "method", "stable", "box_area"], list(SCORES), "score")
    means = means_by(long, ["method", "score"], long["value"], "value ci_low ci_high", n_replicates, seed)
    chance = np.where(means["score"].isin(["hit", "auprc"]), place["box_area"].mean(), np.nan)
    return means.assign(chance=chance).reset_index(drop=True)


def place_differences(
    place: pd.DataFrame, untrained: pd.DataFrame, *, n_replicates: int, seed: int = 0
) -> pd.DataFrame:
    """Paired differences of each score: to CAM, to the same method on an untrained network, to another film's boxes.

    Parameters
    ----------
    place, untrained : DataFrame
        Of `attribution.attribute`, of the same pairs and methods; `place` with other boxes.

    Returns
    -------
    DataFrame
        against ('cam', 'untrained', 'other_film': hit and AUPRC alone), method, score, difference (method minus that),
        ci_low, ci_high (95 %, over patients), n (pairs that have both).

    Raises
    ------
    ValueError
        Tables of other pairs or methods, or no column hit_other.
    """
    pair = [*KEYS, *(["box"] if "box" in place else [])]
    key, scores = [*pair, "method"], list(SCORES)
    own, bare = place.set_index(key), untrained.set_index(key)
    if set(own.index) != set(bare.index) or "hit_other" not in place:
        raise ValueError(
            "need two tables of the same pairs and methods, the first of pairs with other boxes: see with_other_boxes"
        )
    of_cam = place[place["method"] == "cam"].set_index(pair)[scores].reindex(place.set_index(pair).index)
    apart = {
        "cam": own[scores].sub(of_cam.to_numpy())[(place["method"] != "cam").to_numpy()],
        "untrained": own[scores] - bare[scores].reindex(own.index),
        "other_film": own[["hit", "auprc"]] - own[["hit_other", "auprc_other"]].to_numpy(),
    }
    long = pd.concat({name: frame.join(own["patient"]) for name, frame in apart.items()}, names=["against"])
    long = long.reset_index().melt(["against", "method", "patient"], scores, "score")
    long = long[(long["against"] != "other_film") | long["score"].isin(["hit", "auprc"])].reset_index(drop=True)
    by, names = ["against", "method", "score"], "difference ci_low ci_high"
    return means_by(long, by, long["value"], names, n_replicates, seed).drop(columns="n_skipped").reset_index(drop=True)


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

    Parameters
    ----------
    model, batches, pairs, **options
        As in `attribution.attribute`: image_size, methods, layer, cam_method, init and the rules. The batches are gone
        through once a stage.
    fresh : nn.Module
        The same architecture with weights that are drawn independently of the model's: the very weights that a model
        was trained from scratch from are still in it.

    Returns
    -------
    maps : float32 (P, K, S, S)
        Of the model as it is.
    likeness : DataFrame
        Of `map_likeness`; against is the last stage that was made random, from 'none' on (see `controls.cascade`).
    """
    stages = {
        stage: [pair_heatmaps(changed, batches, pairs, rectify=False, **options)[0]]
        for stage, changed in cascade(model, fresh)
    }
    return stages["none"][0], map_likeness(stages["none"][0], stages, pairs, options.get("methods", METHODS))


def likeness_means(alike: pd.DataFrame, *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Means of `map_likeness` with 95 % intervals over patients: against, method, n (comparisons), ssim, ssim_low,
    ssim_high, rank, rank_low, rank_high, n_skipped (a map was refused, or is constant)."""
    by = ["against", "method"]
    ssim, rank = (
        means_by(alike, by, alike[name], f"{name} {name}_low {name}_high", n_replicates, seed) for name in LIKENESS
    )
    found = ssim.drop(columns=["n", "n_skipped"]).join(rank.drop(columns=by))
    return found.reset_index(drop=True)


def bar(differences: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    """Which methods fail: those that cannot tell a trained network from an untrained one, and those whose maps stay as
    they were when every weight is random.

    Parameters
    ----------
    differences : DataFrame
        Of `place_differences`.
    means : DataFrame
        Of `likeness_means` of `randomised`, in the order of the stages.

    Returns
    -------
    DataFrame
        A row per method: method, gain, gain_low, gain_high (pixel AUPRC minus the untrained network's), n, untrained
        ('fails' where the interval holds 0 or lies below it, 'passes', or 'unknown' without an interval), rank (to the
        maps of the wholly random network), random ('fails' above `BOUND`, 'passes', 'unknown' without a value),
        forgotten (the first stage whose mean rank correlation is at most `BOUND`; '' if none), fails (either).
    """
    gains = differences[(differences["against"] == "untrained") & (differences["score"] == "auprc")].set_index("method")
    rows = []
    for method, stages in means.groupby("method", sort=False):
        gain, rank = gains.loc[method], stages["rank"].iloc[-1]
        below = stages.loc[stages["rank"] <= BOUND, "against"]
        verdicts = _verdict(gain["ci_low"], gain["ci_low"] <= 0), _verdict(rank, rank > BOUND)
        found = (gain["difference"], gain["ci_low"], gain["ci_high"], gain["n"], verdicts[0], rank, verdicts[1])
        rows.append((method, *found, below.iloc[0] if len(below) else "", "fails" in verdicts))
    columns = "method gain gain_low gain_high n untrained rank random forgotten fails".split()
    return pd.DataFrame(rows, columns=columns)


def _verdict(known: float, fails: bool) -> str:
    return "unknown" if np.isnan(known) else "fails" if fails else "passes"

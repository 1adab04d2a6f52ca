"""Effects that the plan's claims about relevance and features are judged by: a run against controls of its own lenses.

The opponents are called as the plan calls them. All but the untrained network are the same networks, looked at in
another way: there differences are taken seed by seed. See `verdicts` for what the standard errors hold.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lib.analysis.comparison import DIFFERENT, EFFECTS, RUN, elsewhere, record_effects
from lib.analysis.features.consistency import replicate_correlations
from lib.analysis.features.survey import View
from lib.analysis.metrics import ranking_metrics
from lib.analysis.place import metric_of
from lib.analysis.relevance.sanity import KEYS, SCORES
from lib.analysis.statistics import patient_replicates
from lib.analysis.verdicts import effect

SUMS, LOGITS = ("individual_scale", "common_scale", "raw_sum"), ("logit", "logit_principal")
# Metric, what it is against, and the columns of `feature_scores` that it is the difference of.
CONTRASTS = (
    ("consistency_gradpp", "individual_scale", "common_scale", "individual_scale"),
    ("consistency_gradpp_raw", "individual_scale", "raw_sum", "individual_scale"),
    ("auroc_principal", "all_features", "logit_principal", "logit"),
)


def relevance_effects(
    place: pd.DataFrame, untrained: pd.DataFrame, *, n_replicates: int, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """Effects of each method's maps against CAM's, an untrained network's, and another film's boxes.

    Parameters
    ----------
    place, untrained : DataFrame
        task, backbone, loss, seed, and the columns of `relevance.attribution.attribute`'s place: of the runs, and of
        their untrained networks. A map that was refused has no score, and its pair no part in the difference.
    n_replicates, seed : int
        Of the bootstrap over patients.

    Returns
    -------
    dict of DataFrame
        'cam', 'untrained' and 'other_film': task, backbone, loss, metric (`metric_of` each of `sanity.SCORES`, of
        those that `place` has for other boxes against 'other_film'), the fields of `verdicts.Effect`, n_seeds,
        n_baseline, n_patients; a row a run, method and metric.

    Raises
    ------
    ValueError
        Seeds of a run, or a run and its untrained network, with records of different pairs.
    """
    pair, found = [*KEYS, *(["box"] if "box" in place else [])], {"cam": [], "untrained": [], "other_film": []}
    for (loss, method), own in place.groupby(["loss", "method"], sort=False):
        of_run = place[place["loss"] == loss]
        drawn = untrained[(untrained["loss"] == loss) & (untrained["method"] == method)]
        others = {"untrained": (drawn, SCORES), "other_film": (elsewhere(own), _elsewhere(place))}
        if method != "cam":
            others["cam"] = of_run[of_run["method"] == "cam"], SCORES
        for against, (other, scores) in others.items():
            beside = pd.concat([own, other.assign(loss=against)], ignore_index=True)
            options = {"baseline": against, "paired": against != "untrained", "n_replicates": n_replicates}
            effects = record_effects(beside, scores, pair, seed=seed, **options)
            found[against].append(effects.assign(metric=[metric_of(score, method) for score in effects["metric"]]))
    return {against: pd.concat(parts, ignore_index=True) for against, parts in found.items() if parts}


def _elsewhere(place):
    return [score for score in SCORES if f"{score}_other" in place]


def feature_scores(
    view: View, films: pd.DataFrame, selected: int, sums: pd.DataFrame, logits: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """What the claims of Li et al. are about, film by film, for one class of one network.

    Parameters
    ----------
    films : DataFrame
        image, patient, by row: the N films that were looked at.
    selected : int
        The class, among those of `view`.
    sums : DataFrame
        Of `features.consistency.activation_sums`, with Grad++.
    logits : mapping of float (N, M)
        Of `features.masking.logits_with`: 'all', and 'principal' for the principal features alone.

    Returns
    -------
    DataFrame
        image, patient, class, target, logit, logit_principal, and sums of the film's Grad++ map of all features:
        individual_scale, on a scale of its own; common_scale, on the one that is common to all films; raw_sum, on none.
    """
    of_map = sums[(sums["method"] == "gradpp") & (sums["features"] == "all")]
    wide = of_map.pivot(index="row", columns="scale", values="activation").loc[films.index]
    return films[["image", "patient"]].assign(
        **{"class": view.classes[selected], "target": view.targets[films.index, selected]},
        logit=logits["all"][:, selected],
        logit_principal=logits["principal"][:, selected],
        individual_scale=wide["individual"],
        common_scale=wide["common_tanh"],
        raw_sum=wide["common_raw"],
    )


def feature_effects(scores: pd.DataFrame, *, n_replicates: int, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Effects of the common scale against individual ones, and of the principal features against all.

    Parameters
    ----------
    scores : DataFrame
        task, backbone, loss, seed, and the columns of `feature_scores`; one class a run.
    n_replicates, seed : int
        Of the bootstrap over patients.

    Returns
    -------
    dict of DataFrame
        'individual_scale' and 'all_features', columns as of `relevance_effects`. consistency_gradpp: Pearson's
        correlation of the sums with the logits, on the common scale minus on individual ones; consistency_gradpp_raw:
        of the raw sums, which are what the authors' code takes for the common scale (A43), minus the same.
        auroc_principal: AUROC by the principal features minus by all. NaN where one is not defined: no common scale, or
        films of one label.

    Raises
    ------
    ValueError
        Seeds of a run with different films or classes.
    """
    found = {against: [] for _, against, *_ in CONTRASTS}
    for run, frame in scores.groupby(RUN, sort=False):
        seeds = [part.set_index(["patient", "image"]).sort_index() for _, part in frame.groupby("seed")]
        if not all(part[["class", "target"]].equals(seeds[0][["class", "target"]]) for part in seeds):
            raise ValueError(f"the seeds of {'-'.join(run)} {DIFFERENT}")
        draws = patient_replicates(seeds[0].index.get_level_values("patient"), n_replicates, seed)
        n_patients, counts = draws.counts.shape[1], (len(seeds), len(seeds))
        # The films themselves, then the replicates.
        weights = np.vstack([np.ones((1, n_patients), draws.counts.dtype), draws.counts]), draws.patient
        values = [
            {name: replicate_correlations(part[name], part["logit"], *weights) for name in SUMS}
            | {name: ranking_metrics(part[name], part["target"], *weights)[0] for name in LOGITS}
            for part in seeds
        ]
        for metric, against, one, other in CONTRASTS:
            apart = np.stack([of_seed[one] - of_seed[other] for of_seed in values])
            point, *drawn = apart.mean(axis=0)
            found[against].append((*run, metric, *effect(point, drawn, n_patients, [apart[:, 0]]), *counts, n_patients))
    return {against: pd.DataFrame(rows, columns=EFFECTS) for against, rows in found.items()}

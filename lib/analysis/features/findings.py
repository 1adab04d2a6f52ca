"""What the importance matrix is good for (Li et al., sec. VI): features that carry a class, confounders, outlier films,
features that can go."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from lib.analysis.cam import resize
from lib.analysis.features.consistency import activation_sums, consistency_table
from lib.analysis.features.importance import (
    ImportanceMatrix,
    carriers,
    chance_overlap,
    film_distances,
    overlap,
    participation,
    redundancy,
    select_features,
)
from lib.analysis.features.masking import logits_with, masked_performance, principal_and_others
from lib.analysis.features.survey import View, evenly, film_cams, survey
from lib.analysis.metrics import classification_metrics
from lib.analysis.statistics import patient_replicates, percentile_interval, weighted_sums


def importance_curve(importance: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Share of each class's positive importance that its k most important features hold: class, k, share."""
    positive = np.sort(np.maximum(importance, 0), axis=0)[::-1].cumsum(0)
    total = positive[-1:]
    share = np.divide(positive, total, out=np.full(positive.shape, np.nan), where=total > 0)
    n_features, n_classes = share.shape
    k = np.tile(np.arange(1, n_features + 1), n_classes)
    return pd.DataFrame({"class": np.repeat(list(classes), n_features), "k": k, "share": share.T.ravel()})


def features_per_class(importance: np.ndarray, classes: Sequence[str], principal_share: float) -> pd.DataFrame:
    """How many features carry each class, and how far classes share them: class, n_features80, participation, overlap.

    `overlap` : mean Jaccard index of the class's principal features (the top `principal_share`) with those of every
    other class with films.
    """
    masks = select_features(importance, principal_share)
    shared = overlap(masks)
    empty = ~masks.any(0)
    shared[empty] = shared[:, empty] = np.nan  # a class without films is no evidence that classes share nothing
    np.fill_diagonal(shared, np.nan)
    others = np.isfinite(shared).sum(1)
    shared = np.divide(np.nansum(shared, 1), others, out=np.full(len(shared), np.nan), where=others > 0)
    counts = {"n_features80": carriers(importance).sum(0), "participation": participation(importance)}
    return pd.DataFrame({"class": list(classes), **counts, "overlap": shared})


def features_of_losses(
    view: View,
    rows: np.ndarray,
    models: Mapping[str, nn.Module],
    principal_share: float,
    patients: ArrayLike,
    n_replicates: int,
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """What the losses change in the importance matrix: that of each loss's model in the place of the view's own.

    Parameters
    ----------
    models : mapping of loss to nn.Module
    principal_share : float
        As in `features_per_class`.
    patients : (N,)
        Of each film; every interval is a bootstrap over them, all losses from the same draws.
    n_replicates : int
        0: no intervals, NaN.

    Returns
    -------
    matrices : dict of loss to float64 (F, C)
        Eq. 3, by Grad.
    table : DataFrame
        `features_per_class` of each, one below the other, with loss, <column>_ci_low and <column>_ci_high of its three
        numbers, and overlap_by_chance.
    """
    draws = patient_replicates(patients, n_replicates, 0)
    n_films = draws.counts @ np.bincount(draws.patient)
    matrices, tables = {}, []
    for loss, model in models.items():
        matrix, sums, seen = ImportanceMatrix(view.classes), None, 0
        for batch, _, cams in film_cams(replace(view, model=model), rows, ["grad"]):
            terms = cams["grad", "all"].contributions
            matrix.update(terms, view.targets[np.asarray(batch.rows)])
            sums = np.zeros((draws.counts.shape[1], *terms.shape[1:])) if sums is None else sums
            np.add.at(sums, draws.patient[seen : seen + len(terms)], terms.detach().cpu().double().numpy())
            seen += len(terms)
        matrices[loss] = matrix.result().all
        table = features_per_class(matrices[loss], view.classes, principal_share)
        means = weighted_sums(draws.counts, sums.reshape(len(sums), -1)) / n_films[:, None]
        drawn = [features_per_class(one.reshape(sums.shape[1:]).T, view.classes, principal_share) for one in means]
        for column in table.columns[1:]:
            replicates = np.array([one[column] for one in drawn]).reshape(len(drawn), len(table))
            ends = [percentile_interval(values, len(sums))[:2] for values in replicates.T]
            table[[f"{column}_ci_low", f"{column}_ci_high"]] = ends
        chance = chance_overlap(select_features(matrices[loss], principal_share))
        tables.append(table.assign(loss=loss, overlap_by_chance=chance))
    return matrices, pd.concat(tables, ignore_index=True)


# ---- confounders


def responses(
    view: View, rows: np.ndarray, selected: int, mask: np.ndarray, size: int, top: int = 6, method: str = "grad"
) -> tuple[np.ndarray, np.ndarray]:
    """What some features respond to: the films on which their weighted maps for a class add most, the most first.

    Parameters
    ----------
    mask : 0/1 (F,)
        The features, such as one suspected confounder.
    size, top : int
        Side of the maps returned, and how many films.

    Returns
    -------
    rows : int (K,)
        Of the films.
    maps : float32 (K, size, size)
        Signed: the features times their weights, summed.
    """
    best: list[tuple[float, int, Tensor]] = []
    only = {"these": {method: torch.as_tensor(mask)}}
    for batch, _, cams in film_cams(view, rows, [method], masks=only, classes=[selected]):
        maps = cams[method, "these"].maps[:, 0].cpu()
        best += zip(maps.double().sum((1, 2)).tolist(), np.asarray(batch.rows).tolist(), maps)
        best = sorted(best, key=lambda item: -item[0])[:top]
        best = [(total, row, film.clone()) for total, row, film in best]  # a view would keep its batch
    return np.array([row for _, row, _ in best]), resize(torch.stack([film for *_, film in best]), size).numpy()


def marked_place(marks: ArrayLike, size: int) -> np.ndarray:
    """The rectangle in which all marks lie, on films of another size, bool (size, size); pixels that it cuts count.

    Parameters
    ----------
    marks : bool (N, S, S)
        Of each film; none of them need have one, and the rectangle is then empty.
    """
    marks = np.asarray(marks)
    place, side = np.zeros((size, size), bool), marks.shape[1]
    spans = [np.flatnonzero(marks.any(axis=axes)) for axes in ((0, 2), (0, 1))]
    if marks.any():
        place[tuple(slice(span[0] * size // side, -(-(span[-1] + 1) * size // side)) for span in spans)] = True
    return place


def contributions_with_and_without(
    view: View, rows: np.ndarray, masks: np.ndarray, place: np.ndarray, method: str = "grad"
) -> np.ndarray:
    """What some features add to each class on every film, as it is and with one place covered.

    Parameters
    ----------
    masks : 0/1 (F, C)
        The features of each class.
    place : bool (S, S)
        Of the films that the model sees; it is painted over with the mean of each film and channel.

    Returns
    -------
    float64 (2, N, C)
    """
    cover, only = torch.as_tensor(place), {"these": {method: torch.as_tensor(masks.T)}}

    def twice(films: np.ndarray) -> Iterator[SimpleNamespace]:
        for batch in view.batches(films):
            covered = torch.where(cover.to(batch.images.device), batch.images.mean((2, 3), True), batch.images)
            for images in (batch.images, covered):
                yield SimpleNamespace(rows=batch.rows, images=images)

    found = [
        cams[method, "these"].contributions.double().sum(2).cpu().numpy()
        for *_, cams in film_cams(replace(view, batches=twice), rows, [method], masks=only)
    ]
    return np.stack([np.concatenate(found[0::2]), np.concatenate(found[1::2])])


class Confounder(NamedTuple):
    """Whether a place of the films makes a class, and no other class.

    Attributes
    ----------
    share : float
        Of what the class's features add on its films and not on others: how much is lost when the place is covered.
    low, high : float
        Its 95 % interval over patients; NaN for fewer than two.
    control, control_class : float, str
        The same of the other class that loses most.
    excess, excess_low : float
        `share` minus `control`, and the lower end of its 95 % interval; in every replicate the control is the class
        that loses most there.
    found : bool
        Whether that end is above 0: the class depends on the place beyond chance, and more than any other.
    """

    share: float
    low: float
    high: float
    control: float
    control_class: str
    excess: float
    excess_low: float
    found: bool


def confounder_test(
    contributions: np.ndarray,
    targets: np.ndarray,
    classes: Sequence[str],
    selected: int,
    patients: ArrayLike,
    n_replicates: int = 2000,
    seed: int = 0,
) -> Confounder:
    """Does a class hang on one place of its films? The contrast of its features, mean over the films of the class minus
    mean over the others, before and after the place is covered on all films.

    The same of every other class is the control: their films lose as many pixels. Films of the selected class take no
    part in the controls, because they may carry what is suspected.

    Parameters
    ----------
    contributions : float (2, N, C)
        Of `contributions_with_and_without`.
    targets : 0/1 (N, C)
    selected : int
        The class under suspicion.
    patients : (N,)
        Of each film; the intervals are a bootstrap over patients, all classes from the same draws.
    n_replicates : int
        At least 1.

    Returns
    -------
    Confounder
        NaN, and not found, where the features of the class add nothing that could be lost, or those of no other class.

    Raises
    ------
    ValueError
        A single class: there is nothing to compare it with.
    """
    if len(classes) < 2:
        raise ValueError(f"{classes[0]} is the only class: a confounder is told by comparison with others")
    member, patients = np.asarray(targets, bool), np.asarray(patients)
    allowed = ~member[:, [selected]] | (np.arange(member.shape[1]) == selected)
    draws = patient_replicates(patients, n_replicates, seed)
    weights = np.vstack([np.ones(len(member)), draws.counts[:, draws.patient]])  # first the films themselves
    with np.errstate(invalid="ignore", divide="ignore"):
        inside, outside = (
            [(weights @ (values * films)) / (weights @ films.astype(float)) for values in contributions]
            for films in (member & allowed, ~member & allowed)
        )
        whole, covered = np.subtract(inside, outside)
        lost = np.where(whole > 0, 1 - covered / whole, np.nan)  # (1 + R, C)
    share, others = lost[:, selected], np.delete(lost, selected, axis=1)
    excess = share - np.fmax.reduce(others, axis=1, initial=np.nan)
    n_patients = len(set(patients[member[:, selected]]))
    low, high, _ = percentile_interval(share[1:], n_patients)
    bound, *_ = percentile_interval(excess[1:], n_patients)
    most = int(np.argmax(np.nan_to_num(others[0], nan=-np.inf)))
    control = np.delete(classes, selected)[most]
    return Confounder(share[0], low, high, others[0, most], control, excess[0], bound, bound > 0)


# ---- films and features


def outliers(view: View, rows: np.ndarray, importance: np.ndarray, method: str = "grad") -> pd.DataFrame:
    """Films whose features differ from their class's column of the importance matrix, the strangest first: row, class,
    distance, logit.

    `importance` : float (F, C), `Importance.own` of training films. `distance` : see `importance.film_distances`.
    """
    parts = []
    for batch, output, cams in film_cams(view, rows, [method]):
        films, logits = np.asarray(batch.rows), output.logits.cpu().numpy()
        distance = film_distances(cams[method, "all"].contributions, view.targets[films], importance)
        film, label = np.nonzero(np.isfinite(distance))
        names = {"row": films[film], "class": [view.classes[c] for c in label]}
        parts.append(pd.DataFrame({**names, "distance": distance[film, label], "logit": logits[film, label]}))
    return pd.concat(parts).sort_values("distance", ascending=False, kind="stable", ignore_index=True)


def pruning(view: View, rows: np.ndarray, importance: np.ndarray, steps: int = 12) -> pd.DataFrame:
    """What is left of the macro AUROC when features are removed in the order of what they matter least to any class:
    n_removed (from none to all but one, in `steps` steps), auroc.

    `importance` : float (F, C).
    """
    order = np.argsort(redundancy(importance), kind="stable")
    removed = np.linspace(0, len(order) - 1, steps).round().astype(int)
    kept = {n: ~np.isin(np.arange(len(order)), order[:n]) for n in removed}
    macro = []
    for logits in logits_with(view, rows, kept).values():  # without intervals it does not matter whose films these are
        found = classification_metrics(logits, view.targets[rows], view.classes, rows, n_replicates=0)
        macro.append(found["auroc"].iloc[-1])
    return pd.DataFrame({"n_removed": removed, "auroc": macro})


# ---- a control


def control(
    view: View,
    model: nn.Module,
    train_rows: np.ndarray,
    test_rows: np.ndarray,
    selected: int,
    patients: pd.Series,
    n_replicates: int,
    *,
    share: float,
    size: int,
    kind: str,
    bounds: str,
    exclusive: bool,
    n_films: int = 400,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables I and II of another network, such as an untrained one, in the place of the view's own.

    Parameters
    ----------
    view, selected, exclusive
        As in `masking.masked_performance`.
    model : nn.Module
        The network; scale and principal features are its own, from `n_films` training films spread evenly.
    train_rows, test_rows : int (N,)
        Of the films.
    patients : Series
        Of each film, by row.
    share : float
        Of the features that are principal.
    size, kind, bounds
        As in `survey.survey` and `Survey.scales`.

    Returns
    -------
    consistency : DataFrame
        Of `consistency.consistency_table`, of Grad and Grad++ by all features.
    performance : DataFrame
        Of `masking.masked_performance`: all, principal and the other features, by Grad.
    """
    view, methods = replace(view, model=model), ["grad", "gradpp"]
    train = survey(view, evenly(train_rows, n_films), methods, size=size)
    sums = activation_sums(view, test_rows, selected, train.scales(kind, bounds), size, kind=kind)
    choices = principal_and_others(select_features(train.importance["grad"].all, share), exclusive)
    logits = logits_with(view, test_rows, choices)
    return (
        consistency_table(sums, patients, n_replicates),
        masked_performance(view, test_rows, logits, choices, selected, patients[test_rows], exclusive, n_replicates),
    )


def confounder_in_place(
    view: View, rows: np.ndarray, marks: ArrayLike, masks: np.ndarray, selected: int, patients: pd.Series, size: int
) -> tuple[Confounder, float]:
    """`confounder_test` of the place in which all marks lie, and the share of the film that it takes.

    Parameters
    ----------
    marks, size
        Of `marked_place`.
    masks : 0/1 (F, C)
        The features of each class.
    patients : Series
        Of each film, by row.
    """
    place = marked_place(marks, size)
    sums = contributions_with_and_without(view, rows, masks, place)
    found = confounder_test(sums, view.targets[rows], view.classes, selected, patients[rows])
    return found, float(place.mean())

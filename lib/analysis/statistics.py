"""Bootstrap intervals over patients: films of one patient are not independent, so patients are what is drawn.

Every function draws with the same rule (`patient_replicates`): the same seed and the same set of patients give the same
draws, whatever the order of the films. Two runs evaluated on the same films are therefore paired, and their differences
(`paired_difference`, `metric_differences`) carry the interval of the difference, not of two independent means.

A replicate never copies films: a film drawn twice has weight 2. Weighted sums over films become products of the counts per
patient with sums per patient, which is exact and keeps memory far below (replicates x films).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.sparse import csr_array
from scipy.special import expit

CONFIDENCE = 0.95
METRICS = ("auroc", "ap", "mean_probability")
NO_FINDING = "No Finding"
_BLOCK = 2**23  # float64 values of one intermediate array (64 MiB)


class Interval(NamedTuple):
    """A mean (or a difference of means) with its percentile interval and what it rests on.

    Attributes
    ----------
    point : float
        The estimate on the films themselves, NaN when no value is left.
    low, high : float
        95 % percentile interval over the replicates; NaN without replicates or with fewer than two patients.
    n, n_patients : int
        Values used, and the patients they come from.
    n_skipped : int
        Values left out because they were NaN (undefined).
    n_undefined : int
        Replicates left out because they drew no value at all.
    """

    point: float
    low: float
    high: float
    n: int
    n_patients: int
    n_skipped: int
    n_undefined: int


@dataclass(frozen=True)
class Replicates:
    """Draws of patients with replacement.

    Attributes
    ----------
    counts : ndarray of uint16, (R, P)
        How often replicate r drew patient p (patients sorted); each row sums to P.
    patient : ndarray of int64, (N,)
        The patient of each film or record. The weight of film i in replicate r is ``counts[r, patient[i]]``.
    """

    counts: np.ndarray
    patient: np.ndarray


def patient_replicates(patients: ArrayLike, n_replicates: int, seed: int) -> Replicates:
    """Draw as many patients as there are, with replacement, `n_replicates` times.

    Parameters
    ----------
    patients : array_like, (N,)
        Patient of each film or record; any sortable ids, one type.
    n_replicates : int
        R >= 0.
    seed : int
        Replicate r depends on the seed, on r and on the number of patients only: neither on R nor on the films' order.

    Returns
    -------
    Replicates

    Raises
    ------
    ValueError
        No patients, a missing patient id, or a number of replicates that is not an integer >= 0.
    """
    if isinstance(n_replicates, bool) or not isinstance(n_replicates, (int, np.integer)) or n_replicates < 0:
        raise ValueError(f"n_replicates must be an integer >= 0, got {n_replicates!r}")
    patient, n_patients = _codes(patients, "patients")
    counts = np.empty((n_replicates, n_patients), dtype=np.uint16)
    generator = np.random.default_rng(seed)
    for row in counts:
        row[:] = np.bincount(generator.integers(n_patients, size=n_patients), minlength=n_patients)
    return Replicates(counts, patient)


def mean_interval(values: ArrayLike, patients: ArrayLike, n_replicates: int = 1000, seed: int = 0) -> Interval:
    """Mean over records with its 95 % interval over patients.

    Parameters
    ----------
    values : array_like of float, (N,)
        One value a record; NaN means undefined: skipped, and counted in `n_skipped`.
    patients : array_like, (N,)
        Patient of each record. All of them are drawn from, also those whose values are all NaN, so that runs with
        different undefined records stay paired.
    n_replicates, seed : int
        As in `patient_replicates`; 0 replicates give a NaN interval.

    Returns
    -------
    Interval

    Raises
    ------
    ValueError
        No records, lengths that differ, or an infinite value.
    """
    values = np.asarray(values, dtype=np.float64)
    return _mean_intervals(values, np.zeros(values.shape, dtype=np.int64), 1, patients, n_replicates, seed)[0]


def mean_intervals(values: ArrayLike, groups: ArrayLike, patients: ArrayLike, n_replicates: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean and interval of each group of records (a class, say), all groups from the same draws.

    Parameters
    ----------
    values, patients, n_replicates, seed
        As in `mean_interval`.
    groups : array_like, (N,)
        Group of each record.

    Returns
    -------
    DataFrame
        One row a group, sorted: group, then the fields of `Interval`.

    Raises
    ------
    ValueError
        As in `mean_interval`, and for a missing group.
    """
    codes, n_groups = _codes(groups, "groups")
    names = pd.Series(np.asarray(groups)).groupby(codes).first()
    rows = _mean_intervals(np.asarray(values, dtype=np.float64), codes, n_groups, patients, n_replicates, seed)
    frame = pd.DataFrame(rows, columns=Interval._fields)
    frame.insert(0, "group", names.to_numpy())
    return frame


def paired_difference(
    values_a: ArrayLike, values_b: ArrayLike, patients: ArrayLike, n_replicates: int = 1000, seed: int = 0
) -> Interval:
    """Mean of a - b over the records where both are defined, with its 95 % interval over patients.

    For differences by group pass the differences themselves to `mean_intervals`.

    Parameters
    ----------
    values_a, values_b : array_like of float, (N,)
        Values of two runs, aligned by record. A NaN in either skips the record.
    patients, n_replicates, seed
        As in `mean_interval`.

    Returns
    -------
    Interval

    Raises
    ------
    ValueError
        As in `mean_interval`, and for values of different lengths.
    """
    a, b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"values_a has shape {a.shape} and values_b {b.shape}: both must hold the same records in the same order")
    if np.isinf(a).any() or np.isinf(b).any():
        raise ValueError("values_a or values_b holds an infinite value; undefined values must be NaN")
    return mean_interval(a - b, patients, n_replicates, seed)


def ranking_metrics(scores: ArrayLike, targets: ArrayLike, weights: ArrayLike, patient: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision of one class under many weightings, ties handled exactly.

    AUROC is the weighted share of (positive, negative) pairs in the right order, a tie counting one half. AP is the sum over
    thresholds of (recall step) x precision, without interpolation. Both are those of scikit-learn with `sample_weight`.

    Parameters
    ----------
    scores : array_like of float, (N,)
        Finite; pass logits: saturated sigmoids tie.
    targets : array_like, (N,)
        0 or 1.
    weights : array_like, (R, P)
        R weightings of P patients, >= 0 (`Replicates.counts`).
    patient : array_like of int, (N,)
        Patient of each film, 0..P-1 (`Replicates.patient`); ``arange(N)`` gives each film a weight of its own.

    Returns
    -------
    auroc, ap : ndarray of float64, (R,)
        NaN where positives or negatives have no weight.
    """
    scores, weights, patient = np.asarray(scores, dtype=np.float64), np.asarray(weights), np.asarray(patient)
    positive = np.asarray(targets) == 1
    n_weightings, n_patients = weights.shape
    auroc, ap = np.full(n_weightings, np.nan), np.full(n_weightings, np.nan)
    if positive.all() or not positive.any():
        return auroc, ap

    # Only thresholds that hold a positive matter. K of them cut the negatives into 2K + 1 runs: run 2k lies strictly between
    # threshold k-1 and k, run 2k+1 ties with threshold k.
    thresholds, threshold = np.unique(scores[positive], return_inverse=True)
    negatives = scores[~positive]
    run = np.searchsorted(thresholds, negatives, "left") + np.searchsorted(thresholds, negatives, "right")
    n_runs = 2 * len(thresholds) + 1
    positives_of = _incidence(threshold, patient[positive], (len(thresholds), n_patients))
    negatives_of = _incidence(run, patient[~positive], (n_runs, n_patients))

    step = int(np.clip(_BLOCK // n_runs, 1, 256))
    for start in range(0, n_weightings, step):
        block = np.ascontiguousarray(weights[start : start + step].T, dtype=np.float64)  # (P, r)
        positives = positives_of @ block  # (K, r)
        runs = np.cumsum(negatives_of @ block, axis=0)
        n_positive, n_negative = positives.sum(axis=0), runs[-1].copy()
        below, not_above = runs[0::2][:-1], runs[1::2]  # negatives < threshold, and <= threshold
        above = np.cumsum(positives[::-1], axis=0)[::-1]  # positives >= threshold
        selected = above + (n_negative - below)
        right_pairs = np.einsum("kr,kr->r", positives, below + not_above) / 2
        # Nothing selected at a threshold: its positives have no weight either, so the term is 0.
        precision = np.divide(above, selected, out=np.zeros_like(above), where=selected > 0)
        steps = np.einsum("kr,kr->r", positives, precision)
        defined = (n_positive > 0) & (n_negative > 0)
        np.divide(right_pairs, n_positive * n_negative, out=auroc[start : start + step], where=defined)
        np.divide(steps, n_positive, out=ap[start : start + step], where=defined)
    return auroc, ap


def metric_intervals(
    logits: ArrayLike, targets: ArrayLike, classes: Sequence[str], patients: ArrayLike, n_replicates: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """AUROC, AP and mean predicted probability of each class and of their averages, with 95 % intervals over patients.

    Parameters
    ----------
    logits : array_like of float, (N, M)
        Before the sigmoid; finite.
    targets : array_like, (N, M)
        0 or 1.
    classes : sequence of str, (M,)
    patients : array_like, (N,)
        Patient of each film.
    n_replicates, seed : int
        As in `patient_replicates`.

    Returns
    -------
    DataFrame
        One row a (class, metric): class, metric, point, low, high, n_undefined. The averages of `average_rows` follow the
        classes. AUROC and AP are NaN for a class with one label only. `n_undefined` counts the replicates in which the metric
        does not exist; they are left out. The interval is NaN without replicates or with a single patient. Averages are over
        the classes with both labels on these films; in a replicate, over those of them that are defined in it.

    Notes
    -----
    AP grows with repeated positives, so its replicates lie above the point for rare classes. The bias hardly matters for one
    class, but in the average, whose interval is narrow, it does not cancel: with 600 films in simulations the percentile
    interval of the average AP held the truth in a third of the cases. So the average AP has the basic interval, which reflects
    the replicates about the point (held the truth in 92 to 99 %). AUROC, and the paired differences of both
    (`metric_differences`), keep about 95 % with percentiles.

    Raises
    ------
    ValueError
        Empty input, shapes that do not agree, targets other than 0 and 1, or non-finite logits.
    """
    logits, targets = checked_predictions(logits, targets, classes, patients)
    replicates = patient_replicates(patients, n_replicates, seed)
    whole = np.ones((1, replicates.counts.shape[1]), dtype=np.uint16)
    point = _metrics(logits, targets, classes, whole, replicates.patient)
    drawn = _metrics(logits, targets, classes, replicates.counts, replicates.patient)
    frame = _metric_frame(point[:, 0], drawn, classes, whole.size)
    biased = (frame["metric"] == "ap") & frame["class"].isin(average_rows(classes)) & (len(classes) > 1)
    low, high = 2 * frame["point"] - frame["high"], 2 * frame["point"] - frame["low"]
    return frame.assign(low=frame["low"].mask(biased, low.clip(0, 1)), high=frame["high"].mask(biased, high.clip(0, 1)))


def metric_differences(
    logits_a: ArrayLike,
    logits_b: ArrayLike,
    targets: ArrayLike,
    classes: Sequence[str],
    patients: ArrayLike,
    n_replicates: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Differences (a - b) of AUROC, AP and mean probability of two runs on the same films, with paired 95 % intervals.

    Parameters
    ----------
    logits_a, logits_b : array_like of float, (N, M)
        Logits of the two runs, rows in the same order.
    targets, classes, patients, n_replicates, seed
        As in `metric_intervals`.

    Returns
    -------
    DataFrame
        As `metric_intervals`; point, low and high are differences.

    Raises
    ------
    ValueError
        As `metric_intervals`.
    """
    logits_a, checked = checked_predictions(logits_a, targets, classes, patients)
    logits_b, _ = checked_predictions(logits_b, targets, classes, patients)
    replicates = patient_replicates(patients, n_replicates, seed)
    whole = np.ones((1, replicates.counts.shape[1]), dtype=np.uint16)
    point, drawn = (
        _metrics(logits_a, checked, classes, counts, replicates.patient) - _metrics(logits_b, checked, classes, counts, replicates.patient)
        for counts in (whole, replicates.counts)
    )
    return _metric_frame(point[:, 0], drawn, classes, whole.size)


def average_rows(classes: Sequence[str]) -> dict[str, list[int]]:
    """Rows that average over classes: name -> columns.

    'Average' takes all classes; when 'No Finding' is one of several, 'Average (14 findings)' takes the others (14 in NIH).
    """
    rows = {"Average": list(range(len(classes)))}
    if NO_FINDING in classes and len(classes) > 1:
        rows[f"Average ({len(classes) - 1} findings)"] = [i for i, name in enumerate(classes) if name != NO_FINDING]
    return rows


def checked_predictions(
    logits: ArrayLike, targets: ArrayLike, classes: Sequence[str], patients: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits as float64 and targets as bool, (N, M) each, or a ValueError that names what is wrong."""
    logits, targets = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(f"logits have shape {logits.shape} and targets {targets.shape}: both must be (films, classes)")
    if logits.size == 0:
        raise ValueError(f"logits are empty, shape {logits.shape}: there is no film or no class to evaluate")
    if len(classes) != logits.shape[1]:
        raise ValueError(f"{len(classes)} classes are named for {logits.shape[1]} outputs")
    if len(set(classes)) != len(classes):
        raise ValueError(f"class names repeat: {list(classes)}")
    if patients is not None and len(patients) != len(logits):
        raise ValueError(f"{len(patients)} patients are given for {len(logits)} films")
    for name, values, good in (
        ("logits that are not finite", logits, np.isfinite(logits)),
        ("targets other than 0 and 1", targets, (targets == 0) | (targets == 1)),
    ):
        if not good.all():
            row, column = np.argwhere(~good)[0]
            raise ValueError(f"{int((~good).sum())} {name}; the first is {values[row, column]} in row {row}, class {classes[column]!r}")
    return logits, targets == 1


def _codes(labels: ArrayLike, name: str) -> tuple[np.ndarray, int]:
    """Labels as 0..n-1 in sorted order, and n."""
    if np.ndim(labels) != 1 or len(labels) == 0:
        raise ValueError(f"{name} must be a non-empty list, got shape {np.shape(labels)}")
    codes, unique = pd.factorize(np.asarray(labels), sort=True)
    if (codes < 0).any():
        raise ValueError(f"{name}: row {int(np.argmax(codes < 0))} is missing")
    return codes.astype(np.int64), len(unique)


def _incidence(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """How many films fall on each (row, patient); repeated entries are summed."""
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def _percentiles(replicates: np.ndarray, n_patients: int) -> tuple[float, float, int]:
    """Percentile interval of (R,) replicates without the NaN ones, and how many those are."""
    defined = replicates[~np.isnan(replicates)]
    n_undefined = len(replicates) - len(defined)
    if len(defined) == 0 or n_patients < 2:  # replicates of one patient all agree: a width of 0 would claim certainty
        return np.nan, np.nan, n_undefined
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high), n_undefined


def _weighted_sums(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """counts (R, P) @ sums (P, K) in float64, without a float64 copy of all counts."""
    result = np.empty((len(counts), sums.shape[1]))
    step = max(1, _BLOCK // counts.shape[1])
    for start in range(0, len(counts), step):
        np.matmul(counts[start : start + step].astype(np.float64), sums, out=result[start : start + step])
    return result


def _mean_intervals(
    values: np.ndarray, groups: np.ndarray, n_groups: int, patients: ArrayLike, n_replicates: int, seed: int
) -> list[Interval]:
    if values.ndim != 1 or len(values) != len(patients) or len(values) != len(groups):
        raise ValueError(
            f"values have shape {values.shape}, with {len(groups)} groups and {len(patients)} patients: one of each a record is needed"
        )
    if np.isinf(values).any():
        raise ValueError(f"values: record {int(np.argmax(np.isinf(values)))} is infinite; undefined values must be NaN")
    replicates = patient_replicates(patients, n_replicates, seed)
    counts, patient = replicates.counts, replicates.patient
    shape = (n_groups, counts.shape[1])
    kept = ~np.isnan(values)
    number = _incidence(groups[kept], patient[kept], shape).toarray().T  # (P, G)
    total = csr_array((values[kept], (groups[kept], patient[kept])), shape=shape).toarray().T
    sums = _weighted_sums(counts, np.hstack([total, number]))
    drawn = np.full((len(counts), n_groups), np.nan)
    np.divide(sums[:, :n_groups], sums[:, n_groups:], out=drawn, where=sums[:, n_groups:] > 0)

    intervals = []
    for group in range(n_groups):
        chosen = kept & (groups == group)
        n, n_patients = int(chosen.sum()), int((number[:, group] > 0).sum())
        low, high, n_undefined = _percentiles(drawn[:, group], n_patients)
        point = float(values[chosen].mean()) if n else np.nan
        intervals.append(Interval(point, low, high, n, n_patients, int((groups == group).sum()) - n, n_undefined))
    return intervals


def _metrics(logits: np.ndarray, targets: np.ndarray, classes: Sequence[str], counts: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """METRICS of classes and averages under each weighting, (3, R, M + averages)."""
    n_patients = counts.shape[1]
    n_classes = logits.shape[1]
    values = np.empty((len(METRICS), len(counts), n_classes))
    for column in range(n_classes):
        values[0, :, column], values[1, :, column] = ranking_metrics(logits[:, column], targets[:, column], counts, patient)
    films = _incidence(patient, np.arange(len(patient)), (n_patients, len(patient)))
    sums = _weighted_sums(counts, np.hstack([films @ expit(logits), films.sum(axis=1)[:, None]]))
    values[2] = sums[:, :-1] / sums[:, -1:]

    both = targets.any(axis=0) & ~targets.all(axis=0)
    averages = []
    for columns in average_rows(classes).values():
        chosen = values[:, :, [column for column in columns if both[column]]]
        defined = ~np.isnan(chosen)
        number = defined.sum(axis=2)
        average = np.full(number.shape, np.nan)
        averages.append(np.divide(np.where(defined, chosen, 0).sum(axis=2), number, out=average, where=number > 0))
    return np.concatenate([values, np.stack(averages, axis=2)], axis=2)


def _metric_frame(point: np.ndarray, drawn: np.ndarray, classes: Sequence[str], n_patients: int) -> pd.DataFrame:
    names = [*classes, *average_rows(classes)]
    rows = [
        (name, metric, float(point[m, column]), *_percentiles(drawn[m, :, column], n_patients))
        for column, name in enumerate(names)
        for m, metric in enumerate(METRICS)
    ]
    return pd.DataFrame(rows, columns=["class", "metric", "point", "low", "high", "n_undefined"])

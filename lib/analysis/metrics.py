"""Classification metrics of a run, and their differences between two: ranking (AUROC, AP), predicted probability and
calibration (Khakzar et al., Fig. 2), with intervals over patients.

All functions start from logits. The ranking uses the logits themselves, because float32 sigmoids saturate and tie; the
probabilities are sigmoids in float64.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit

from lib.analysis.statistics import BLOCK, incidence, patient_replicates, percentile_interval, weighted_sums

METRICS = ("auroc", "ap", "mean_probability")
NO_FINDING = "No Finding"
N_BINS = 15
BOUNDED = [column for metric in METRICS for column in (metric, f"{metric}_ci_low", f"{metric}_ci_high")]
SINGLE = ["mean_probability_positives", "mean_probability_negatives", "brier", "ece"]
COLUMNS = ["class", "n_positive", "n_negative", "prevalence", *BOUNDED, *SINGLE]


def classification_metrics(
    logits: ArrayLike,
    targets: ArrayLike,
    classes: Sequence[str],
    patients: ArrayLike,
    n_replicates: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """All metrics of each class and of the class averages; of several seeds, the mean over seeds of each one's metrics.

    Parameters
    ----------
    logits : array_like of float, (N, M), or (S, N, M) of S seeds
        Before the sigmoid; finite.
    targets : array_like, (N, M)
        0 or 1.
    classes : sequence of str, (M,)
    patients : array_like, (N,)
        Patient of each film: the intervals are a bootstrap over patients.
    n_replicates, seed : int
        Of the bootstrap; 0 replicates give NaN intervals.

    Returns
    -------
    DataFrame
        One row a class, then 'Average' and, with 'No Finding' among the classes, 'Average (14 findings)'. Columns:
        class; n_positive, n_negative, prevalence; auroc, ap and mean_probability (over all films), each with its 95 %
        interval _ci_low and _ci_high; mean_probability_positives and _negatives; brier, the mean squared difference of
        probability and target; ece, the expected calibration error: ``|mean probability - share of positives|``,
        averaged over the films' bins, of which there are N_BINS of equal width (a bin holds its lower edge).
        A class with one label only has NaN AUROC and AP and no part in the averages. In the averages the counts are
        sums and everything else is the mean over classes.

    Raises
    ------
    ValueError
        Empty input, shapes that do not agree, targets other than 0 and 1, or non-finite logits.
    """
    intervals = metric_intervals(logits, targets, classes, patients, n_replicates, seed)
    logits, targets = checked_predictions(logits, targets, classes)
    n_positive = targets.sum(axis=0)
    counts = {"n_positive": n_positive, "n_negative": len(targets) - n_positive}
    frame = pd.DataFrame({"class": list(classes), **counts, "prevalence": n_positive / len(targets)})
    frame[SINGLE] = np.mean([_probability_metrics(expit(one), targets) for one in logits], axis=0)
    both = np.minimum(*counts.values()) > 0
    averages = []
    for name, columns in average_rows(classes).items():
        rows = frame.iloc[[column for column in columns if both[column]]].drop(columns="class")
        averages.append({"class": name, **rows.mean(), **rows[list(counts)].sum()})
    frame = pd.concat([frame, pd.DataFrame(averages)], ignore_index=True).astype(dict.fromkeys(counts, np.int64))
    for metric in METRICS:
        rows = intervals[intervals["metric"] == metric]
        for column, field in ((metric, "point"), (f"{metric}_ci_low", "low"), (f"{metric}_ci_high", "high")):
            frame[column] = rows[field].to_numpy()
    return frame[COLUMNS]


def ranking_metrics(
    scores: ArrayLike, targets: ArrayLike, weights: ArrayLike, patient: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision of one class under many weightings, ties handled exactly.

    AUROC is the weighted share of (positive, negative) pairs in the right order, a tie counting one half. AP is the sum
    over thresholds of (recall step) x precision, without interpolation. Both are those of scikit-learn with
    `sample_weight`.

    Parameters
    ----------
    scores : array_like of float, (N,)
        Finite; pass logits: saturated sigmoids tie.
    targets : array_like, (N,)
        0 or 1.
    weights : array_like, (R, P)
        R weightings of P patients, >= 0 (`statistics.Replicates.counts`).
    patient : array_like of int, (N,)
        Patient of each film, 0..P-1 (`statistics.Replicates.patient`); ``arange(N)`` gives each film a weight of its
        own.

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

    # Only thresholds that hold a positive matter. K of them cut the negatives into 2K + 1 runs: run 2k lies strictly
    # between threshold k-1 and k, run 2k+1 ties with threshold k.
    thresholds, threshold = np.unique(scores[positive], return_inverse=True)
    negatives = scores[~positive]
    run = np.searchsorted(thresholds, negatives, "left") + np.searchsorted(thresholds, negatives, "right")
    n_runs = 2 * len(thresholds) + 1
    positives_of = incidence(threshold, patient[positive], (len(thresholds), n_patients))
    negatives_of = incidence(run, patient[~positive], (n_runs, n_patients))

    step = int(np.clip(BLOCK // n_runs, 1, 256))
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
    logits: ArrayLike,
    targets: ArrayLike,
    classes: Sequence[str],
    patients: ArrayLike,
    n_replicates: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC, AP and mean predicted probability of each class and of their averages, with 95 % intervals over patients.

    Parameters
    ----------
    logits, targets, classes, patients, n_replicates, seed
        As in `classification_metrics`.

    Returns
    -------
    DataFrame
        One row a (class, metric): class, metric, point, low, high, n_undefined. The averages of `average_rows` follow
        the classes. AUROC and AP are NaN for a class with one label only. `n_undefined` counts the replicates in which
        the metric does not exist; they are left out. The interval is NaN without replicates or with a single patient.
        Averages are over the classes with both labels on these films; in a replicate, over those of them that are
        defined in it.

    Notes
    -----
    AP grows with repeated positives, so its replicates lie above the point for rare classes. The bias hardly matters
    for one class, but in the average, whose interval is narrow, it does not cancel: with 600 films in simulations the
    percentile interval of the average AP held the truth in a third of the cases. So the average AP has the basic
    interval, which reflects the replicates about the point (held the truth in 92 to 99 %). AUROC, and the paired
    differences of both (`metric_differences`), keep about 95 % with percentiles.

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
    logits_a, logits_b : array_like of float, (N, M), or (S, N, M) and (T, N, M) of several seeds
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
        _metrics(logits_a, checked, classes, counts, replicates.patient)
        - _metrics(logits_b, checked, classes, counts, replicates.patient)
        for counts in (whole, replicates.counts)
    )
    return _metric_frame(point[:, 0], drawn, classes, whole.size)


def seed_averages(
    logits: ArrayLike, targets: ArrayLike, classes: Sequence[str], patients: ArrayLike, n_replicates: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The averages over classes of every seed, and in replicates over patients; arguments and errors as in
    `metric_intervals`, logits (S, N, M).

    Returns
    -------
    point : ndarray of float64, (3, S)
        `METRICS` by seed: AUROC and AP over the classes with both labels, the mean probability over all classes.
    drawn : ndarray of float64, (3, R, S)
    """
    logits, targets = checked_predictions(logits, targets, classes, patients)
    replicates = patient_replicates(patients, n_replicates, seed)
    whole = np.ones((1, replicates.counts.shape[1]), dtype=np.uint16)
    average = len(classes)  # the first of `average_rows`, behind the classes
    found = []
    for counts in (whole, replicates.counts):
        seeds = [_seed_metrics(one, targets, classes, counts, replicates.patient) for one in logits]
        ranked = [values[:2, :, average] for values in seeds]
        probability = [values[2:, :, :average].mean(axis=2) for values in seeds]
        found.append(np.stack([np.concatenate(both) for both in zip(ranked, probability, strict=True)], axis=-1))
    return found[0][:, 0], found[1]


def average_rows(classes: Sequence[str]) -> dict[str, list[int]]:
    """Rows that average over classes: name -> columns.

    'Average' takes all classes; when 'No Finding' is one of several, 'Average (14 findings)' takes the others (14 in
    NIH).
    """
    rows = {"Average": list(range(len(classes)))}
    if NO_FINDING in classes and len(classes) > 1:
        rows[f"Average ({len(classes) - 1} findings)"] = [i for i, name in enumerate(classes) if name != NO_FINDING]
    return rows


def checked_predictions(
    logits: ArrayLike, targets: ArrayLike, classes: Sequence[str], patients: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits as float64 (S, N, M) and targets as bool (N, M), or a ValueError that names what is wrong."""
    logits, targets = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    if logits.ndim not in (2, 3) or logits.shape[-2:] != targets.shape:
        raise ValueError(f"logits have shape {logits.shape} and targets {targets.shape}: both must be (films, classes)")
    if logits.size == 0:
        raise ValueError(f"logits are empty, shape {logits.shape}: there is no film or no class to evaluate")
    if len(classes) != logits.shape[-1]:
        raise ValueError(f"{len(classes)} classes are named for {logits.shape[-1]} outputs")
    if len(set(classes)) != len(classes):
        raise ValueError(f"class names repeat: {list(classes)}")
    if patients is not None and len(patients) != len(targets):
        raise ValueError(f"{len(patients)} patients are given for {len(targets)} films")
    for name, values, good in (
        ("logits that are not finite", logits, np.isfinite(logits)),
        ("targets other than 0 and 1", targets, (targets == 0) | (targets == 1)),
    ):
        if not good.all():
            first = np.argwhere(~good)[0]
            where = f"{values[tuple(first)]} in row {first[-2]}, class {classes[first[-1]]!r}"
            raise ValueError(f"{int((~good).sum())} {name}; the first is {where}")
    return logits.reshape(-1, *targets.shape), targets == 1


def _metrics(
    logits: np.ndarray, targets: np.ndarray, classes: Sequence[str], counts: np.ndarray, patient: np.ndarray
) -> np.ndarray:
    """METRICS of classes and averages under each weighting, (3, R, M + averages), averaged over the seeds of `logits`;
    where they are defined follows from targets and weights, which the seeds share."""
    return np.mean([_seed_metrics(one, targets, classes, counts, patient) for one in logits], axis=0)


def _seed_metrics(
    logits: np.ndarray, targets: np.ndarray, classes: Sequence[str], counts: np.ndarray, patient: np.ndarray
) -> np.ndarray:
    n_patients, n_classes = counts.shape[1], logits.shape[1]
    values = np.empty((len(METRICS), len(counts), n_classes))
    for column in range(n_classes):
        values[:2, :, column] = ranking_metrics(logits[:, column], targets[:, column], counts, patient)
    films = incidence(patient, np.arange(len(patient)), (n_patients, len(patient)))
    sums = weighted_sums(counts, np.hstack([films @ expit(logits), films.sum(axis=1)[:, None]]))
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
        (name, metric, float(point[m, column]), *percentile_interval(drawn[m, :, column], n_patients))
        for column, name in enumerate(names)
        for m, metric in enumerate(METRICS)
    ]
    return pd.DataFrame(rows, columns=["class", "metric", "point", "low", "high", "n_undefined"])


def _probability_metrics(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The columns SINGLE of each class, (M, 4)."""
    errors = [_calibration_error(*columns) for columns in zip(probabilities.T, targets.T)]
    means = _mean_where(probabilities, targets), _mean_where(probabilities, ~targets)
    return np.stack([*means, ((probabilities - targets) ** 2).mean(axis=0), errors], axis=1)


def _calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    index = np.searchsorted(np.linspace(0, 1, N_BINS + 1)[1:-1], probabilities, side="right")
    n = np.bincount(index, minlength=N_BINS)
    mean, frequency = (
        np.bincount(index, weights=values, minlength=N_BINS) / np.maximum(n, 1) for values in (probabilities, targets)
    )
    return float((abs(mean - frequency) * n).sum() / n.sum())


def _mean_where(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Column means over the chosen entries, NaN where there are none."""
    n = chosen.sum(axis=0)
    return np.divide(np.where(chosen, values, 0).sum(axis=0), n, out=np.full(values.shape[1], np.nan), where=n > 0)

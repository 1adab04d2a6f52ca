"""Classification metrics of one run: ranking (AUROC, AP), predicted probability and calibration (Khakzar et al., Fig. 2).

All functions start from logits. The ranking uses the logits themselves, because float32 sigmoids saturate and tie; the
probabilities are sigmoids in float64.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit

from lib.analysis.statistics import METRICS, average_rows, checked_predictions, metric_intervals

N_BINS = 15
COLUMNS = [
    "class",
    "n_positive",
    "n_negative",
    "prevalence",
    *[column for metric in METRICS for column in (metric, f"{metric}_ci_low", f"{metric}_ci_high")],
    "mean_probability_positives",
    "mean_probability_negatives",
    "brier",
    "ece",
]


def classification_metrics(
    logits: ArrayLike, targets: ArrayLike, classes: Sequence[str], patients: ArrayLike, n_replicates: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """All metrics of each class and of the class averages.

    Parameters
    ----------
    logits : array_like of float, (N, M)
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
        class; n_positive, n_negative, prevalence; auroc, ap and mean_probability (over all films), each with its 95 % interval
        _ci_low and _ci_high; mean_probability_positives and _negatives; brier, the mean squared difference of probability and
        target; ece, as in `calibration_curve`.
        A class with one label only has NaN AUROC and AP and no part in the averages. In the averages the counts are sums and
        everything else is the mean over classes.

    Raises
    ------
    ValueError
        Empty input, shapes that do not agree, targets other than 0 and 1, or non-finite logits.
    """
    intervals = metric_intervals(logits, targets, classes, patients, n_replicates, seed)
    logits, targets = checked_predictions(logits, targets, classes)
    probabilities = expit(logits)
    n_positive = targets.sum(axis=0)
    n_negative = len(targets) - n_positive
    frame = pd.DataFrame(
        {
            "class": list(classes),
            "n_positive": n_positive,
            "n_negative": n_negative,
            "prevalence": n_positive / len(targets),
            "mean_probability_positives": _mean_where(probabilities, targets),
            "mean_probability_negatives": _mean_where(probabilities, ~targets),
            "brier": ((probabilities - targets) ** 2).mean(axis=0),
            "ece": [_calibration_error(probabilities[:, m], targets[:, m]) for m in range(len(classes))],
        }
    )
    both = ((n_positive > 0) & (n_negative > 0)).tolist()
    averages = []
    for name, columns in average_rows(classes).items():
        rows = frame.iloc[[column for column in columns if both[column]]].drop(columns="class")
        averages.append({"class": name, **rows.mean(), "n_positive": rows["n_positive"].sum(), "n_negative": rows["n_negative"].sum()})
    frame = pd.concat([frame, pd.DataFrame(averages)], ignore_index=True).astype({"n_positive": np.int64, "n_negative": np.int64})
    for metric in METRICS:
        rows = intervals[intervals["metric"] == metric]
        for column, field in ((metric, "point"), (f"{metric}_ci_low", "low"), (f"{metric}_ci_high", "high")):
            frame[column] = rows[field].to_numpy()
    return frame[COLUMNS]


def calibration_curve(logits: ArrayLike, targets: ArrayLike, classes: Sequence[str], n_bins: int = N_BINS) -> pd.DataFrame:
    """Points of the reliability diagram of each class.

    The expected calibration error of a class is the mean of ``|mean_probability - frequency|`` over the bins, weighted by n.

    Parameters
    ----------
    logits, targets, classes
        As in `classification_metrics`.
    n_bins : int
        Bins of equal width on [0, 1]; a bin holds its lower edge, the last one also 1.

    Returns
    -------
    DataFrame
        One row a (class, bin), empty bins included: class, bin, bin_low, bin_high, n, mean_probability, frequency (share of
        positives). The last two are NaN in an empty bin.

    Raises
    ------
    ValueError
        As `classification_metrics`, and for fewer than one bin.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    logits, targets = checked_predictions(logits, targets, classes)
    probabilities = expit(logits)
    frames = [_bins(probabilities[:, m], targets[:, m], n_bins).assign(**{"class": name}) for m, name in enumerate(classes)]
    columns = ["class", "bin", "bin_low", "bin_high", "n", "mean_probability", "frequency"]
    return pd.concat(frames, ignore_index=True)[columns]


def _bins(probabilities: np.ndarray, targets: np.ndarray, n_bins: int) -> pd.DataFrame:
    edges = np.linspace(0, 1, n_bins + 1)
    index = np.searchsorted(edges[1:-1], probabilities, side="right")
    n = np.bincount(index, minlength=n_bins)
    sums = [np.bincount(index, weights=values, minlength=n_bins) for values in (probabilities, targets)]
    mean, frequency = (np.divide(total, n, out=np.full(n_bins, np.nan), where=n > 0) for total in sums)
    return pd.DataFrame(
        {"bin": np.arange(n_bins), "bin_low": edges[:-1], "bin_high": edges[1:], "n": n, "mean_probability": mean, "frequency": frequency}
    )


def _calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    bins = _bins(probabilities, targets, N_BINS)
    gap = (bins["mean_probability"] - bins["frequency"]).abs().fillna(0)
    return float((gap * bins["n"]).sum() / bins["n"].sum())


def _mean_where(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Column means over the chosen entries, NaN where there are none."""
    n = chosen.sum(axis=0)
    return np.divide(np.where(chosen, values, 0).sum(axis=0), n, out=np.full(values.shape[1], np.nan), where=n > 0)

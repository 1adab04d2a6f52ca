"""A study's runs side by side: means of each run with intervals, and paired differences to the BCE run of the same task
and backbone.

Records are first averaged over seeds, film by film; the bootstrap then draws patients, the same ones in every run.
"""

import numpy as np
import pandas as pd
from scipy.special import expit

from lib.analysis.metrics import classification_metrics, metric_differences
from lib.analysis.statistics import mean_interval, paired_difference

RUN = ["task", "backbone", "loss"]
BASELINE = "bce"
DIFFERENT = "were evaluated on different films or classes: run both again on the same release"


def record_means(records, metrics, key, *, n_replicates, seed=0):
    """Mean of per-film records for every run.

    Parameters
    ----------
    records : DataFrame
        task, backbone, loss, seed, patient, the columns of `key` and of `metrics`.
    metrics : sequence of str
    key : sequence of str
        What makes a record within a run and seed: ('image', 'class') for alignment, ('image',) for concepts.
    n_replicates, seed : int
        Of the bootstrap over patients.

    Returns
    -------
    DataFrame
        task, backbone, loss, metric, value, ci_low, ci_high, n (records), n_skipped (undefined records), seeds.
    """
    rows = []
    for (run, frame), metric in ((item, metric) for item in records.groupby(RUN, sort=False) for metric in metrics):
        mean = _over_seeds(frame, metric, key)
        interval = mean_interval(mean[metric], mean["patient"], n_replicates, seed)
        rows.append(
            (
                *run,
                metric,
                interval.point,
                interval.low,
                interval.high,
                interval.n,
                interval.n_skipped,
                frame["seed"].nunique(),
            )
        )
    return pd.DataFrame(rows, columns=[*RUN, "metric", "value", "ci_low", "ci_high", "n", "n_skipped", "seeds"])


def record_differences(records, metrics, key, *, n_replicates, seed=0):
    """Paired difference of every run to the BCE run of its task and backbone; arguments as in `record_means`.

    Returns
    -------
    DataFrame
        task, backbone, loss, metric, difference (loss minus BCE), ci_low, ci_high. A run without a BCE run beside it is
        left out.

    Raises
    ------
    ValueError
        A run and its BCE run have records of different films.
    """
    rows = []
    for run, frame, baseline in _beside_baseline(records):
        for metric in metrics:
            mine, bce = _over_seeds(frame, metric, key), _over_seeds(baseline, metric, key)
            pairs = mine.merge(bce, on=["patient", *key], suffixes=("", "_bce"))
            if not len(mine) == len(bce) == len(pairs):
                raise ValueError(f"{'-'.join(run)} and its BCE run {DIFFERENT}")
            interval = paired_difference(pairs[metric], pairs[f"{metric}_bce"], pairs["patient"], n_replicates, seed)
            rows.append((*run, metric, interval.point, interval.low, interval.high))
    return pd.DataFrame(rows, columns=[*RUN, "metric", "difference", "ci_low", "ci_high"])


def prediction_differences(predictions, *, n_replicates, seed=0):
    """Paired differences of macro AUROC, AP and mean probability to the BCE run, from predictions of all runs.

    Seeds are averaged as probabilities, before the metric: the difference is that of the seeds' ensemble. With one seed
    it is the run's.

    Parameters
    ----------
    predictions : DataFrame
        task, backbone, loss, seed, image, patient, class, target, logit.

    Returns
    -------
    DataFrame
        As `record_differences`, of the row 'Average'.

    Raises
    ------
    ValueError
        A run and its BCE run were evaluated on different films or classes.
    """
    rows = []
    for run, frame, baseline in _beside_baseline(predictions):
        logits, targets, classes, patients = prediction_arrays(frame)
        others, other_targets, other_classes, _ = prediction_arrays(baseline)
        if (
            set(frame["image"]) != set(baseline["image"])
            or classes != other_classes
            or not np.array_equal(targets, other_targets)
        ):
            raise ValueError(f"{'-'.join(run)} and its BCE run {DIFFERENT}")
        differences = metric_differences(logits, others, targets, classes, patients, n_replicates, seed)
        average = differences[differences["class"] == "Average"]
        rows += [(*run, row.metric, row.point, row.low, row.high) for row in average.itertuples()]
    return pd.DataFrame(rows, columns=[*RUN, "metric", "difference", "ci_low", "ci_high"])


def prediction_metrics(predictions, *, n_replicates, seed=0):
    """Metrics of every run by class, as `metrics.classification_metrics`, with the run's task, backbone and loss in
    front."""
    parts = []
    for run, frame in predictions.groupby(RUN, sort=False):
        logits, targets, classes, patients = prediction_arrays(frame)
        parts.append(
            classification_metrics(logits, targets, classes, patients, n_replicates, seed).assign(
                **dict(zip(RUN, run, strict=True))
            )
        )
    return pd.concat(parts, ignore_index=True)


def typical_pairs(alignment, *, per_class=1):
    """The most typical pairs of film and class: those whose IoBB, averaged over all runs given, lies nearest the median
    of their class.

    Parameters
    ----------
    alignment : DataFrame
        image, class, iobb of any number of runs of one task.
    per_class : int

    Returns
    -------
    DataFrame
        image, class, iobb; sorted by class.
    """
    mean = alignment.groupby(["image", "class"], as_index=False)["iobb"].mean().dropna()
    distance = (mean["iobb"] - mean.groupby("class")["iobb"].transform("median")).abs()
    nearest = (
        mean.assign(distance=distance).sort_values(["class", "distance", "image"]).groupby("class").head(per_class)
    )
    return nearest.drop(columns="distance").reset_index(drop=True)


def prediction_arrays(predictions):
    """Logits (N, M), targets (N, M), classes and patients (N,) of one run's predictions; several seeds become their
    mean probability's logit."""
    classes = list(dict.fromkeys(predictions["class"]))
    if "seed" in predictions and predictions["seed"].nunique() > 1:
        mean = predictions.assign(p=expit(predictions["logit"].astype(np.float64)))
        mean = mean.groupby(["image", "patient", "class", "target"], sort=False, as_index=False)["p"].mean()
        p = mean["p"].clip(1e-300, 1 - 1e-16)
        predictions = mean.assign(logit=np.log(p) - np.log1p(-p))
    wide = predictions.pivot(index=["image", "patient"], columns="class", values=["logit", "target"])
    return (
        wide["logit"][classes].to_numpy(np.float64),
        wide["target"][classes].to_numpy(np.int64),
        classes,
        wide.index.get_level_values("patient").to_numpy(),
    )


def _over_seeds(frame, metric, key):
    return frame.groupby(["patient", *key], sort=True, as_index=False)[metric].mean()


def _beside_baseline(frame):
    for (task, backbone), runs in frame.groupby(RUN[:2], sort=False):
        baseline = runs[runs["loss"] == BASELINE]
        for loss, rows in runs.groupby("loss", sort=False):
            if loss != BASELINE and len(baseline):
                yield (task, backbone, loss), rows, baseline

"""A study's runs side by side: means of each run with intervals, and paired differences to the BCE run of the same task
and backbone.

Every seed of a run is scored by itself, and what is reported is the mean over seeds (not the score of the seeds'
ensemble, which is another quantity). The bootstrap draws patients, the same ones for every seed and every run.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from lib.analysis.metrics import METRICS, classification_metrics, metric_differences, seed_averages
from lib.analysis.statistics import mean_interval, paired_difference, replicate_means
from lib.analysis.verdicts import Effect, effect

RUN = ["task", "backbone", "loss"]
BASELINE = "bce"
EFFECTS = [*RUN, "metric", *Effect._fields, "n_seeds", "n_baseline", "n_patients"]
DIFFERENT = "were evaluated on different films or classes: run both again on the same release"


def record_means(
    records: pd.DataFrame, metrics: Sequence[str], key: Sequence[str], *, n_replicates: int, seed: int = 0
) -> pd.DataFrame:
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
        task, backbone, loss, metric, value, ci_low, ci_high, n (records), n_skipped (undefined records), seeds. Where
        seeds leave out different records, n and n_skipped are those of the seed that leaves out most.

    Raises
    ------
    ValueError
        The seeds of a run have records of different films.
    """
    rows = []
    for (run, frame), metric in ((item, metric) for item in records.groupby(RUN, sort=False) for metric in metrics):
        values = _by_seed(frame, metric, key, run)
        found = mean_interval(values.to_numpy().T, values.index.get_level_values("patient"), n_replicates, seed)
        rows.append((*run, metric, found.point, found.low, found.high, found.n, found.n_skipped, values.shape[1]))
    return pd.DataFrame(rows, columns=[*RUN, "metric", "value", "ci_low", "ci_high", "n", "n_skipped", "seeds"])


def record_differences(
    records: pd.DataFrame, metrics: Sequence[str], key: Sequence[str], *, n_replicates: int, seed: int = 0
) -> pd.DataFrame:
    """Paired difference of every run to the BCE run of its task and backbone; arguments as in `record_means`.

    Returns
    -------
    DataFrame
        task, backbone, loss, metric, difference (loss minus BCE), ci_low, ci_high. A run without a BCE run beside it is
        left out.

    Raises
    ------
    ValueError
        A run and its BCE run, or the seeds of one, have records of different films.
    """
    rows = []
    for run, frame, baseline in _beside_baseline(records):
        for metric in metrics:
            mine, bce = _by_seed(frame, metric, key, run), _by_seed(baseline, metric, key, run)
            if not mine.index.equals(bce.index):
                raise ValueError(f"{'-'.join(run)} and its BCE run {DIFFERENT}")
            patients = mine.index.get_level_values("patient")
            found = paired_difference(mine.to_numpy().T, bce.to_numpy().T, patients, n_replicates, seed)
            rows.append((*run, metric, found.point, found.low, found.high))
    return pd.DataFrame(rows, columns=[*RUN, "metric", "difference", "ci_low", "ci_high"])


def prediction_differences(predictions: pd.DataFrame, *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Paired differences of macro AUROC, AP and mean probability to the BCE run, from predictions of all runs.

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
        A run and its BCE run, or the seeds of one, were evaluated on different films or classes.
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


def record_effects(
    records: pd.DataFrame,
    metrics: Sequence[str],
    key: Sequence[str],
    *,
    n_replicates: int,
    seed: int = 0,
    baseline: str = BASELINE,
    paired: bool = False,
) -> pd.DataFrame:
    """Effect of every run against the BCE run of its task and backbone, with the chance of training in it.

    Arguments and errors as in `record_differences`; what the standard error holds says `analysis.verdicts`. A
    `baseline` other than BCE is a control that stands in the column `loss`. With `paired` its seeds are those of the
    same networks, looked at in another way, and the difference is taken seed by seed.

    Returns
    -------
    DataFrame
        task, backbone, loss, metric, the fields of `verdicts.Effect`, n_seeds, n_baseline (seeds of both), n_patients.
    """
    rows = []
    for metric in metrics:
        for (task, backbone), runs in records.groupby(RUN[:2], sort=False):
            values = {
                loss: _by_seed(frame, metric, key, (task, backbone, loss))
                for loss, frame in runs.groupby("loss", sort=False)
            }
            if baseline not in values:
                continue
            bce = values[baseline]
            patients = bce.index.get_level_values("patient")
            for loss, mine in values.items():
                if loss == baseline:
                    continue
                if not mine.index.equals(bce.index):
                    raise ValueError(f"{task}-{backbone}-{loss} and its {_run_of(baseline)} {DIFFERENT}")
                # Over the records that both have: every seed of one against every seed of the other, or its own.
                shared = [(k, k) for k in mine] if paired else itertools.product(mine, bce)
                apart = np.stack([(mine[a] - bce[b]).to_numpy() for a, b in shared])
                drawn = replicate_means(apart, patients, n_replicates, seed).mean(axis=1)
                known = ~np.isnan(apart)
                by_pair = [one[there].mean() if there.any() else np.nan for one, there in zip(apart, known)]
                # Of the seeds that share fewest.
                counts, n_patients = (mine.shape[1], bce.shape[1]), min(patients[there].nunique() for there in known)
                arms = [by_pair] if paired else [mine.mean().dropna(), bce.mean().dropna()]
                found = effect(float(np.mean(by_pair)), drawn, n_patients, arms)
                rows.append((task, backbone, loss, metric, *found, *counts, n_patients))
    return pd.DataFrame(rows, columns=EFFECTS)


def prediction_effects(
    predictions: pd.DataFrame, *, n_replicates: int, seed: int = 0, baseline: str = BASELINE
) -> pd.DataFrame:
    """Effects on macro AUROC, macro AP and the mean probability over all classes; as `record_effects`.

    Predictions as in `prediction_differences`. Classes with one label only have no AUROC and no AP, but take part in
    the mean probability.
    """
    rows = []
    for (task, backbone), runs in predictions.groupby(RUN[:2], sort=False):
        arrays = {loss: prediction_arrays(frame) for loss, frame in runs.groupby("loss", sort=False)}
        if baseline not in arrays:
            continue
        _, targets, classes, patients = arrays[baseline]
        points, drawn = {}, {}
        for loss, (logits, other_targets, other_classes, other_patients) in arrays.items():
            same = classes == other_classes and np.array_equal(targets, other_targets)
            if not (same and np.array_equal(patients, other_patients)):
                raise ValueError(f"{task}-{backbone}-{loss} and its {_run_of(baseline)} {DIFFERENT}")
            points[loss], drawn[loss] = seed_averages(logits, targets, classes, patients, n_replicates, seed)
        for column, metric in enumerate(METRICS):
            for loss, one in points.items():
                if loss == baseline:
                    continue
                point = one[column].mean() - points[baseline][column].mean()
                apart = drawn[loss][column].mean(axis=1) - drawn[baseline][column].mean(axis=1)
                counts = len(one[column]), len(points[baseline][column])
                n_patients = len(np.unique(patients))
                found = effect(point, apart, n_patients, [one[column], points[baseline][column]])
                rows.append((task, backbone, loss, metric, *found, *counts, n_patients))
    return pd.DataFrame(rows, columns=EFFECTS)


def with_control(records: pd.DataFrame, control: pd.DataFrame, name: str) -> pd.DataFrame:
    """The records of the BCE runs, and those of their control beside them as a baseline of that name.

    Parameters
    ----------
    records, control : DataFrame
        task, backbone, loss, seed and records of the same films; of `control` only what belongs to BCE runs is taken.
    """
    own, other = (frame[frame["loss"] == BASELINE] for frame in (records, control))
    return pd.concat([own, other.assign(loss=name)], ignore_index=True)


def elsewhere(alignment: pd.DataFrame) -> pd.DataFrame:
    """Alignment records with the scores on another film's boxes, <score>_other, in the place of the scores. iou_tuned,
    whose threshold is chosen on the film's own boxes, has no such score: NaN."""
    scores = [column.removesuffix("_other") for column in alignment if column.endswith("_other")]
    others = {name: alignment[f"{name}_other"] for name in scores}
    return alignment.assign(**{"iou_tuned": np.nan} | others)


def seed_records(predictions: pd.DataFrame) -> pd.DataFrame:
    """The averages over classes of every run and seed, a row each: task, backbone, loss, seed, auroc, ap and
    mean_probability, see `metrics.seed_averages`. Predictions as in `prediction_differences`."""
    parts = []
    for run, frame in predictions.groupby(RUN, sort=False):
        point, _ = seed_averages(*prediction_arrays(frame), n_replicates=0)
        seeds = pd.DataFrame(point.T, columns=list(METRICS)).assign(seed=sorted(frame["seed"].unique()))
        parts.append(seeds.assign(**dict(zip(RUN, run, strict=True))))
    return pd.concat(parts, ignore_index=True)


def seed_differences(records: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """What chance alone changes: differences of BCE's means between every two seeds, of each task and backbone.

    Parameters
    ----------
    records : DataFrame
        task, backbone, loss, seed and the columns of `metrics`; of predictions, one row a seed with its averages.

    Returns
    -------
    DataFrame
        task, backbone, metric, seed, other, difference (the later seed minus the earlier).
    """
    means = records[records["loss"] == BASELINE].groupby([*RUN[:2], "seed"], sort=True)[list(metrics)].mean()
    rows = [
        (task, backbone, metric, seed, other, part.loc[(task, backbone, other), metric] - value)
        for (task, backbone), part in means.groupby(RUN[:2], sort=False)
        for metric in metrics
        for (_, _, seed), value in part[metric].items()
        for other in part.index.get_level_values("seed")
        if seed < other
    ]
    return pd.DataFrame(rows, columns=[*RUN[:2], "metric", "seed", "other", "difference"])


def _run_of(baseline):
    return "BCE run" if baseline == BASELINE else f"control {baseline}"


def prediction_metrics(predictions: pd.DataFrame, *, n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Metrics of every run by class, as `metrics.classification_metrics`, with the run's task, backbone and loss
    behind."""
    parts = []
    for run, frame in predictions.groupby(RUN, sort=False):
        logits, targets, classes, patients = prediction_arrays(frame)
        metrics = classification_metrics(logits, targets, classes, patients, n_replicates, seed)
        parts.append(metrics.assign(**dict(zip(RUN, run, strict=True))))
    return pd.concat(parts, ignore_index=True)


def prediction_arrays(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Logits (S, N, M), targets (N, M), classes and patients (N,) of the predictions of one run's S seeds; ValueError
    where the seeds were evaluated on different films or classes."""
    classes, columns = list(dict.fromkeys(predictions["class"])), ["logit", "target"]
    seeds = [
        part.pivot(index=["image", "patient"], columns="class", values=columns)
        for _, part in predictions.groupby("seed")
    ]
    first = seeds[0]
    if not all(wide["target"].equals(first["target"]) for wide in seeds):
        raise ValueError(f"the seeds of {'-'.join(predictions[RUN].iloc[0])} {DIFFERENT}")
    return (
        np.stack([wide["logit"][classes].to_numpy(np.float64) for wide in seeds]),
        first["target"][classes].to_numpy(np.int64),
        classes,
        first.index.get_level_values("patient").to_numpy(),
    )


def _by_seed(frame: pd.DataFrame, metric: str, key: Sequence[str], run: Sequence[str]) -> pd.DataFrame:
    """One metric of a run's records, a column for each seed; indexed by patient and `key`, sorted."""
    wide = frame.pivot(index=["patient", *key], columns="seed", values=metric)
    if len(frame) != wide.size:  # a record that one seed has and another has not
        raise ValueError(f"the seeds of {'-'.join(run)} {DIFFERENT}")
    return wide.astype(np.float64)


def _beside_baseline(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame, pd.DataFrame]]:
    """(run, its rows, those of the BCE run of its task and backbone), of every other run that has one."""
    for (task, backbone), runs in frame.groupby(RUN[:2], sort=False):
        baseline = runs[runs["loss"] == BASELINE]
        for loss, rows in runs.groupby("loss", sort=False):
            if loss != BASELINE and len(baseline):
                yield (task, backbone, loss), rows, baseline

"""A change between two losses split into the part of the trunk, the part of the head and their interaction.

m(T, H) is a metric with the features of loss T's trunk and the head by loss H's objective on them, see `trunk_head`.
Against b = BCE the change of the refitted run of loss l, m(l, l) - m(b, b), is

    trunk = ([m(l, b) - m(b, b)] + [m(l, l) - m(b, l)]) / 2
    head  = ([m(b, l) - m(b, b)] + [m(l, l) - m(l, b)]) / 2

the mean of both orders in which trunk and head can be exchanged (Shapley's value of two players), and

    interaction = m(l, l) - m(l, b) - m(b, l) + m(b, b)

says how much the order matters. Beside them what the simplest rival reaches: BCE plus one constant a class.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lib.analysis.comparison import BASELINE, DIFFERENT
from lib.analysis.metrics import METRICS, seed_averages
from lib.analysis.statistics import replicate_means
from lib.analysis.trunk_head import TRAINED
from lib.analysis.verdicts import Effect, effect

CHANGES = ["task", "backbone", "loss", "part", "metric", *Effect._fields, "n_seeds", "n_patients"]
PARTS = ["trained", "whole", "trunk", "head", "interaction", "constant", "rest"]


class Parts(NamedTuple):
    """A change against BCE, split: ``trunk + head = whole``."""

    trunk: np.ndarray
    head: np.ndarray
    interaction: np.ndarray
    whole: np.ndarray


def parts(bb: ArrayLike, lb: ArrayLike, bl: ArrayLike, ll: ArrayLike) -> Parts:
    """The parts of a change (see the module), element by element: of records, of means, or of bootstrap replicates.

    Parameters
    ----------
    bb, lb, bl, ll : arrays of one shape
        The metric with BCE's trunk and head, with the loss's trunk and BCE's head, with BCE's trunk and the loss's
        head, with both of the loss.
    """
    bb, lb, bl, ll = (np.asarray(values, dtype=np.float64) for values in (bb, lb, bl, ll))
    return Parts(((lb - bb) + (ll - bl)) / 2, ((bl - bb) + (ll - lb)) / 2, ll - lb - bl + bb, ll - bb)


def pair_means(records: pd.DataFrame, predictions: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """m(T, H): a metric on all films, of every trunk with every head.

    Parameters
    ----------
    records : DataFrame
        trunk, head, image, patient, class and `metrics`, of one seed.
    predictions : DataFrame
        trunk, head, image, patient, class, target, logit.
    metrics : sequence of str
        Of the records; the three of `metrics.METRICS` come first.

    Returns
    -------
    DataFrame
        A row a metric and trunk, a column a head, in the order of the records; NaN where a metric is undefined.
    """
    trunks, heads = (list(dict.fromkeys(records[name])) for name in ("trunk", "head"))
    points, _, _ = _averages(predictions.assign(seed=0), 0, 0)
    means = records.groupby(["trunk", "head"])[list(metrics)].mean().T
    table = pd.concat([points[0], means]).rename_axis("metric").stack("trunk", future_stack=True)
    return table.reindex(pd.MultiIndex.from_product([[*METRICS, *metrics], trunks], names=["metric", "trunk"]))[heads]


def record_changes(
    records: pd.DataFrame, shifted: pd.DataFrame, metrics: Sequence[str], *, n_replicates: int, seed: int = 0
) -> pd.DataFrame:
    """Each loss's change of the mean of per-film records against BCE, and its parts.

    A part is computed record by record and is over the records in which all that it is made of are defined, so the
    parts of the refitted change add up exactly. Of several seeds each one's trunks are set against each other; the
    point is the mean over the loss's seeds, and their variance is that of the parts, see `verdicts`.

    Parameters
    ----------
    records : DataFrame
        task, backbone, seed, trunk, head (an objective, or 'trained'), image, patient, class and `metrics`.
    shifted : DataFrame
        The same of BCE's run plus a constant a class, with `shifted_to`, the loss it imitates, for trunk and head.
    metrics : sequence of str
    n_replicates, seed : int
        Of the bootstrap over patients.

    Returns
    -------
    DataFrame
        task, backbone, loss, part, metric, the fields of `verdicts.Effect` (NaN where fewer than two patients have a
        record in which the part is defined), n_seeds, n_patients (those that have one, in the seed with fewest).
        Parts: 'trained', the change of the trained runs; 'whole', that of the refitted ones, and its 'trunk', 'head'
        and 'interaction'; 'constant', what the constants alone change, and 'rest', the trained run minus what they make
        of BCE.

    Raises
    ------
    ValueError
        Trunks, heads or seeds have records of different films.
    """
    rows = []
    for run, frame in _with_rival(records, shifted):
        for metric in metrics:
            wide, found = _wide(frame, metric), {}
            patients = wide.index.get_level_values("patient")
            for arm, loss in _arms(wide):
                split = _changes(wide[arm], loss)
                drawn = replicate_means(split.to_numpy().T, patients, n_replicates, seed)
                known = split.notna().groupby(patients).any().sum()
                found.setdefault(loss, []).append((split.mean(), pd.DataFrame(drawn, columns=split.columns), known))
            rows += [(*run, *row) for row in _effects(found, metric)]
    return pd.DataFrame(rows, columns=CHANGES)


def prediction_changes(
    predictions: pd.DataFrame, shifted: pd.DataFrame, *, n_replicates: int, seed: int = 0
) -> pd.DataFrame:
    """Each loss's change of macro AUROC, macro AP and the mean probability against BCE, and its parts.

    As `record_changes`, of predictions (class, target, logit).
    """
    rows = []
    for run, frame in _with_rival(predictions, shifted):
        points, drawn, n_patients = _averages(frame, n_replicates, seed)
        for metric in METRICS:
            found, replicates = {}, pd.DataFrame(drawn[METRICS.index(metric)], columns=points.columns)
            for arm, loss in _arms(points):
                split = _changes(points.loc[[metric], arm], loss).iloc[0]
                counts = dict.fromkeys(PARTS, n_patients)
                found.setdefault(loss, []).append((split, _changes(replicates[arm], loss), counts))
            rows += [(*run, *row) for row in _effects(found, metric)]
    return pd.DataFrame(rows, columns=CHANGES)


def _with_rival(records: pd.DataFrame, shifted: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    """The records of each task and backbone, with BCE's shifted ones as further heads of its trunk."""
    rival = shifted.assign(trunk=BASELINE, head="shifted to " + shifted["shifted_to"])
    yield from pd.concat([records, rival], ignore_index=True).groupby(["task", "backbone"], sort=False)


def _wide(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """One value of every record: a row a film and class, a column a seed, trunk and head."""
    wide = frame.pivot(index=["patient", "image", "class"], columns=["seed", "trunk", "head"], values=value)
    if len(frame) != wide.size:
        raise ValueError(f"the trunks, heads or seeds {DIFFERENT}")
    return wide.astype(np.float64)


def _arms(wide: pd.DataFrame) -> list[tuple[int, str]]:
    """The seeds and losses that have a refitted run to compare with BCE's."""
    return [(seed, trunk) for seed, trunk, head in wide if trunk == head != BASELINE]


def _changes(values: pd.DataFrame, loss: str) -> pd.DataFrame:
    """The parts of `record_changes`, row by row, of a column a trunk and head."""
    b = BASELINE
    split = parts(values[b, b], values[loss, b], values[b, loss], values[loss, loss])
    run, bce, rival = values[loss, TRAINED], values[b, TRAINED], values[b, f"shifted to {loss}"]
    split = {"trained": run - bce, **split._asdict(), "constant": rival - bce, "rest": run - rival}
    return pd.DataFrame(split, index=values.index)[PARTS]


def _averages(predictions: pd.DataFrame, n_replicates: int, seed: int) -> tuple[pd.DataFrame, np.ndarray, int]:
    """`metrics.METRICS`, a column a seed, trunk and head, with their replicates (3, R, columns); how many patients."""
    wide, classes = _wide(predictions, "logit"), list(dict.fromkeys(predictions["class"]))
    films = [wide[column].unstack("class")[classes] for column in wide]
    targets = predictions.drop_duplicates(["patient", "image", "class"])
    targets = targets.pivot(index=["patient", "image"], columns="class", values="target")[classes]
    patients = targets.index.get_level_values("patient")
    logits = np.stack([one.to_numpy() for one in films])
    points, drawn = seed_averages(logits, targets.to_numpy(), classes, patients, n_replicates, seed)
    return pd.DataFrame(points, index=list(METRICS), columns=wide.columns), drawn, patients.nunique()


def _effects(found: Mapping[str, list], metric: str) -> Iterator[tuple]:
    """Rows of the points, replicates and numbers of patients of every part, by loss and seed."""
    for loss, part in itertools.product(found, PARTS):
        by_seed = [point[part] for point, _, _ in found[loss]]
        drawn = np.mean([replicates[part] for _, replicates, _ in found[loss]], axis=0)
        n_patients = min(int(counts[part]) for _, _, counts in found[loss])
        sized = effect(np.mean(by_seed), drawn, n_patients, [by_seed])
        yield loss, part, metric, *sized, len(by_seed), n_patients

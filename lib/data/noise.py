"""What a run learns from: the true targets, or labels that are wrong as often as those that were read from reports."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.data.release import CLASSES, FINDINGS, NO_FINDING, shuffled_targets, task_targets

PUBLISHED = Path(__file__).parents[1] / "published"
# The findings that radiologists judged, each one or several of NIH's; of the others' labels no error rate is known.
MEASURED = {
    "Pneumothorax": ("Pneumothorax",),
    "Nodule or mass": ("Nodule", "Mass"),
    "Airspace opacity": ("Infiltration", "Pneumonia", "Consolidation", "Edema", "Atelectasis"),
}


def measured_noise() -> pd.DataFrame:
    """How often NIH's labels, read from reports by a program, are right: sensitivity, specificity, and n_films; the
    index is that of `MEASURED`.

    Of 4,376 films that radiologists adjudicated (Majkowska et al., Radiology 2020), a selected sample:
    published/nih_label_noise.csv.
    """
    counts = pd.read_csv(PUBLISHED / "nih_label_noise.csv")
    counts = counts.set_index(counts["finding"].str.partition(" (")[0]).loc[list(MEASURED)]
    present, labelled, both = (counts[f"n_{name}"] for name in ("adjudicated_positive", "nlp_positive", "both"))
    healthy = counts["n_films"] - present
    rates = {"sensitivity": both / present, "specificity": 1 - (labelled - both) / healthy}
    return pd.DataFrame(rates | {"n_films": counts["n_films"]})


def noisy_targets(targets: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """Targets in which the labels of the films in `rows` are wrong as often as NIH's.

    A film that has a finding of a group of `MEASURED` loses the group's labels with probability 1 - sensitivity; one
    that has none is given one of them with probability 1 - specificity, drawn by NIH's counts of its members among
    these films. 'No Finding' then stands where no finding does. Labels of findings outside the groups, and other rows,
    are as they were.

    Parameters
    ----------
    targets : uint8 (N, 15)
        `Release.targets`.
    rows : int (n,)
        Such as those of the training films.
    seed : int

    Raises
    ------
    ValueError
        Targets of a release that does not have NIH's classes.
    """
    if targets.shape[1:] != (len(CLASSES),):
        raise ValueError(f"targets are {targets.shape}: label noise is known of NIH's {len(CLASSES)} classes alone")
    labels, rng = targets[rows], np.random.default_rng((seed, 1))
    for rate, members in zip(measured_noise().itertuples(), MEASURED.values(), strict=True):
        columns = [CLASSES.index(name) for name in members]
        own, present = labels[:, columns], labels[:, columns].any(axis=1)
        drawn, weight = rng.random(len(rows)), own.sum(axis=0) + 1e-9
        added = rng.choice(len(columns), len(rows), p=weight / weight.sum())
        own[present & (drawn >= rate.sensitivity)] = 0
        false = np.flatnonzero(~present & (drawn >= rate.specificity))
        own[false, added[false]] = 1
        labels[:, columns] = own
    findings = [CLASSES.index(name) for name in FINDINGS]
    labels[:, CLASSES.index(NO_FINDING)] = ~labels[:, findings].any(axis=1)
    noisy = targets.copy()
    noisy[rows] = labels
    return noisy


def learnt_targets(targets: np.ndarray, rows: np.ndarray, run: Any) -> np.ndarray:
    """The targets of a run's task as it is trained on them, uint8 (N, M): with `run.label_noise` and
    `run.shuffle_labels` among the training films, true elsewhere.

    Parameters
    ----------
    targets : uint8
        `Release.targets`.
    rows : int (n,)
        Of the training films.
    run : lib.params.Run
        Or anything with its label_noise, shuffle_labels, seed, task and no_finding_output.
    """
    given = noisy_targets(targets, rows, run.seed) if run.label_noise else targets
    given, _ = task_targets(given, run.task, run.no_finding_output)
    return shuffled_targets(given, rows, run.seed) if run.shuffle_labels else given

"""Bootstrap intervals over patients: films of one patient are not independent, so patients are what is drawn.

Every function draws with the same rule (`patient_replicates`): the same seed and the same set of patients give the same
draws, whatever the order of the films. Two runs evaluated on the same films are therefore paired, and their differences
(`paired_difference`, `metrics.metric_differences`) carry the interval of the difference, not of two independent means.

A replicate never copies films: a film drawn twice has weight 2. Weighted sums over films become products of the counts
per patient with sums per patient, which is exact and keeps memory far below (replicates x films).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

CONFIDENCE = 0.95
BLOCK = 2**23  # float64 values of one intermediate array (64 MiB)


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
    """Mean over records with its 95 % interval over patients; of several seeds, the mean over seeds of each one's mean.

    Parameters
    ----------
    values : array_like of float, (N,) or (S, N)
        One value a record, for each of S seeds; NaN means undefined: skipped, and counted in `n_skipped`.
    patients : array_like, (N,)
        Patient of each record. All of them are drawn from, the same for every seed, also those whose values are all
        NaN, so that runs with different undefined records stay paired.
    n_replicates, seed : int
        As in `patient_replicates`; 0 replicates give a NaN interval.

    Returns
    -------
    Interval
        n, n_patients and n_skipped are those of the seed with the fewest defined records.

    Raises
    ------
    ValueError
        No records, lengths that differ, or an infinite value.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    seeds, patients = np.repeat(np.arange(len(values)), values.shape[-1]), np.tile(np.asarray(patients), len(values))
    of_seeds, drawn = _mean_intervals(values.ravel(), seeds, len(values), patients, n_replicates, seed)
    fewest = min(of_seeds, key=lambda interval: interval.n)
    low, high, n_undefined = percentile_interval(drawn.mean(axis=1), fewest.n_patients)
    point = float(np.mean([interval.point for interval in of_seeds]))
    return fewest._replace(point=point, low=low, high=high, n_undefined=n_undefined)


def mean_intervals(
    values: ArrayLike, groups: ArrayLike, patients: ArrayLike, n_replicates: int = 1000, seed: int = 0
) -> pd.DataFrame:
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
    rows, _ = _mean_intervals(np.asarray(values, dtype=np.float64), codes, n_groups, patients, n_replicates, seed)
    frame = pd.DataFrame(rows, columns=Interval._fields)
    frame.insert(0, "group", names.to_numpy())
    return frame


def paired_difference(
    values_a: ArrayLike, values_b: ArrayLike, patients: ArrayLike, n_replicates: int = 1000, seed: int = 0
) -> Interval:
    """Mean of a - b over the records where both are defined, with its 95 % interval over patients.

    For differences by group pass the differences themselves to `mean_intervals`. Of several seeds, the mean over all
    pairs of a seed of a and a seed of b: the difference of the two means over seeds, where nothing is undefined.

    Parameters
    ----------
    values_a, values_b : array_like of float, (N,), or (S, N) and (T, N)
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
    a, b = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (values_a, values_b))
    if a.shape[1] != b.shape[1]:
        shapes = f"values_a has shape {np.shape(values_a)} and values_b {np.shape(values_b)}"
        raise ValueError(f"{shapes}: both must hold the same records in the same order")
    if np.isinf(a).any() or np.isinf(b).any():
        raise ValueError("values_a or values_b holds an infinite value; undefined values must be NaN")
    return mean_interval((a[:, None] - b).reshape(-1, a.shape[1]), patients, n_replicates, seed)


def replicate_means(values: ArrayLike, patients: ArrayLike, n_replicates: int, seed: int = 0) -> np.ndarray:
    """Means over records in replicates over patients, each row of values by itself; the draws of `mean_interval`.

    Parameters
    ----------
    values : array_like of float, (S, N)
        NaN means undefined and is left out.
    patients, n_replicates, seed
        As in `mean_interval`.

    Returns
    -------
    ndarray of float64, (R, S); NaN where a replicate drew no value
    """
    values = np.asarray(values, dtype=np.float64)
    groups, everyone = np.repeat(np.arange(len(values)), values.shape[1]), np.tile(np.asarray(patients), len(values))
    return _mean_intervals(values.ravel(), groups, len(values), everyone, n_replicates, seed)[1]


def incidence(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """How many films fall on each (row, patient); repeated entries are summed."""
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def percentile_interval(replicates: np.ndarray, n_patients: int) -> tuple[float, float, int]:
    """Percentile interval of (R,) replicates without the NaN ones, and how many those are."""
    defined = replicates[~np.isnan(replicates)]
    n_undefined = len(replicates) - len(defined)
    if len(defined) == 0 or n_patients < 2:  # replicates of one patient all agree: a width of 0 would claim certainty
        return np.nan, np.nan, n_undefined
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high), n_undefined


def weighted_sums(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """counts (R, P) @ sums (P, K) in float64, without a float64 copy of all counts."""
    result = np.empty((len(counts), sums.shape[1]))
    step = max(1, BLOCK // counts.shape[1])
    for start in range(0, len(counts), step):
        np.matmul(counts[start : start + step].astype(np.float64), sums, out=result[start : start + step])
    return result


def _codes(labels: ArrayLike, name: str) -> tuple[np.ndarray, int]:
    """Labels as 0..n-1 in sorted order, and n."""
    if np.ndim(labels) != 1 or len(labels) == 0:
        raise ValueError(f"{name} must be a non-empty list, got shape {np.shape(labels)}")
    codes, unique = pd.factorize(np.asarray(labels), sort=True)
    if (codes < 0).any():
        raise ValueError(f"{name}: row {int(np.argmax(codes < 0))} is missing")
    return codes.astype(np.int64), len(unique)


def _mean_intervals(
    values: np.ndarray, groups: np.ndarray, n_groups: int, patients: ArrayLike, n_replicates: int, seed: int
) -> tuple[list[Interval], np.ndarray]:
    """The interval of each group's mean, and the means in the replicates, (R, G)."""
    if values.ndim != 1 or len(values) != len(patients) or len(values) != len(groups):
        given = f"values have shape {values.shape}, with {len(groups)} groups and {len(patients)} patients"
        raise ValueError(f"{given}: one of each a record is needed")
    if np.isinf(values).any():
        raise ValueError(f"values: record {int(np.argmax(np.isinf(values)))} is infinite; undefined values must be NaN")
    replicates = patient_replicates(patients, n_replicates, seed)
    counts, patient = replicates.counts, replicates.patient
    shape = (n_groups, counts.shape[1])
    kept = ~np.isnan(values)
    number = incidence(groups[kept], patient[kept], shape).toarray().T  # (P, G)
    total = csr_array((values[kept], (groups[kept], patient[kept])), shape=shape).toarray().T
    sums = weighted_sums(counts, np.hstack([total, number]))
    drawn = np.full((len(counts), n_groups), np.nan)
    np.divide(sums[:, :n_groups], sums[:, n_groups:], out=drawn, where=sums[:, n_groups:] > 0)

    intervals = []
    for group in range(n_groups):
        chosen = kept & (groups == group)
        n, n_patients = int(chosen.sum()), int((number[:, group] > 0).sum())
        low, high, n_undefined = percentile_interval(drawn[:, group], n_patients)
        point = float(values[chosen].mean()) if n else np.nan
        intervals.append(Interval(point, low, high, n, n_patients, int((groups == group).sum()) - n, n_undefined))
    return intervals, drawn

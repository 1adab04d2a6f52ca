"""Dose and response: one thing changed, all else equal, seed by seed."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy
from numpy.typing import ArrayLike

from lib.analysis.statistics import CONFIDENCE


class SeedInterval(NamedTuple):
    """A mean over seeds with its 95 % interval, Student's t; NaN bounds for fewer than two seeds."""

    point: float
    low: float
    high: float
    n_seeds: int


def seed_interval(values: ArrayLike) -> SeedInterval:
    """The mean of one value a seed, (S,), with its interval; NaN values are left out."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    n = len(values)
    point = float(values.mean()) if n else np.nan
    reach = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return SeedInterval(point, float(point - reach), float(point + reach), n)


def contrasts(table: pd.DataFrame, what: str, against: object) -> pd.DataFrame:
    """What a change of the column `what` alone does to each metric, paired by seed.

    Parameters
    ----------
    table : DataFrame
        A row a run and metric: metric, seed, value and what tells runs apart, `what` among it (such as loss,
        prevalence, noise).
    what : str
    against : a value of that column
        Every other value is set against it.

    Returns
    -------
    DataFrame
        The columns that tell runs apart but the seed, metric; base (the mean of `against` over the same seeds), point,
        low, high, n_seeds of the difference, see `seed_interval`. What has no run to be set against has no row.

    Raises
    ------
    ValueError
        Two rows of one run and metric.
    """
    key = [name for name in table if name not in ("value", what)]
    if table.duplicated([*key, what]).any():
        raise ValueError(f"two rows of one run and metric: {', '.join([*key, what])} must tell all rows apart")
    base = table[table[what] == against].drop(columns=what).rename(columns={"value": "base"})
    both = table[table[what] != against].merge(base, on=key)
    both["value"] -= both["base"]
    names = [name for name in [*key, what] if name != "seed"]
    rows = [
        (*group, part["base"].mean(), *seed_interval(part["value"])) for group, part in both.groupby(names, sort=False)
    ]
    return pd.DataFrame(rows, columns=[*names, "base", *SeedInterval._fields])

"""Different, equivalent or undecided: what a paired difference between two losses lets one say.

A difference of two runs varies for two reasons: other patients might have been drawn, and the same training from
another seed ends elsewhere. Its variance is the sum of both,

    se^2 = V + s^2 (1 / S_a + 1 / S_b),

with V the bootstrap variance over patients of the difference of the means over seeds (the same patients in both arms),
and s^2 the variance between seeds, pooled over the runs of one task and backbone. Seeds are not resampled: of S seeds
a bootstrap sees (S - 1) / S of their variance, half of it where there are two, and knows nothing of its own
uncertainty. Here that enters by the degrees of freedom (Satterthwaite's; where those of s^2 are fewer than 4, these
themselves), and the interval is symmetric about the point,
``point +- t se``: percentile intervals of averages over rare classes are pulled aside.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import t as student

from lib.analysis.statistics import CONFIDENCE

POWER = 0.8
# With fewer degrees of freedom the variance between seeds is often far too small by chance, and Satterthwaite's rule
# then takes it for known: in simulations of no effect 10 to 18 % of families had a false claim, with 4 at most 6 %.
FEW = 4
VERDICTS = ("different", "equivalent", "undecided")


class Effect(NamedTuple):
    """A difference with what it rests on.

    Attributes
    ----------
    point : float
        Difference of the two means over seeds of the metric of each seed.
    se : float
        Its standard error over patients and seeds.
    df : float
        Degrees of freedom of `se`.
    low, high : float
        95 % interval ``point -+ t(df) se``.
    detectable : float
        The difference that would be called different with a probability of 80 %, were it the only one tested:
        ``(t(df; 0.975) + t(df; 0.8)) se``.
    seeds : bool
        Whether the chance of training is in `se`; False where no run has a second seed.
    """

    point: float
    se: float
    df: float
    low: float
    high: float
    detectable: float
    seeds: bool


def seed_variance(runs: Sequence[ArrayLike]) -> tuple[float, int]:
    """Variance between the seeds of one run, pooled over runs, and its degrees of freedom.

    Parameters
    ----------
    runs : sequence of (S,) floats
        A metric of each seed of each run, on the same films; runs of one seed add nothing.

    Returns
    -------
    variance : float
        ``sum_r sum_s (x_rs - mean_r)^2 / df``; NaN where no run has two seeds.
    df : int
        ``sum_r (S_r - 1)``
    """
    runs = [np.asarray(run, dtype=np.float64) for run in runs if len(run) > 1]
    df = sum(len(run) - 1 for run in runs)
    return (sum(float(((run - run.mean()) ** 2).sum()) for run in runs) / df if df else np.nan), df


def effect(
    point: float, drawn: ArrayLike, n_patients: int, seeds: Sequence[int], between: tuple[float, int] = (np.nan, 0)
) -> Effect:
    """A difference with its standard error over patients and seeds.

    Parameters
    ----------
    point : float
        The difference of the means over seeds.
    drawn : (R,) floats
        The same in R bootstrap replicates over patients, see `statistics`; NaN where a replicate has none.
    n_patients : int
        Patients that were drawn from.
    seeds : sequence of int
        How many seeds each mean that was subtracted is over, such as (S_a, S_b).
    between : (variance, degrees of freedom)
        Of `seed_variance`.

    Returns
    -------
    Effect

    Raises
    ------
    ValueError
        Fewer than two patients or two replicates: there is no standard error.
    """
    drawn = np.asarray(drawn, dtype=np.float64)
    drawn = drawn[~np.isnan(drawn)]
    if n_patients < 2 or len(drawn) < 2:
        raise ValueError(f"{n_patients} patients, {len(drawn)} replicates: a standard error needs two of each")
    variance, df = between
    parts = [(float(drawn.var(ddof=1)), n_patients - 1)]
    parts += [(variance * sum(1 / number for number in seeds), df)] if df else []
    total = sum(part for part, _ in parts)
    # Satterthwaite 1946. Arms that are equal to the bit have no variance at all: nothing is left to chance.
    freedom = total**2 / sum(part**2 / df for part, df in parts) if total else np.inf
    if 0 < df < FEW:
        freedom = min(freedom, df)
    se = float(np.sqrt(total))
    reach = student.ppf((1 + CONFIDENCE) / 2, freedom)
    detectable = (reach + student.ppf(POWER, freedom)) * se
    return Effect(float(point), se, float(freedom), point - reach * se, point + reach * se, float(detectable), bool(df))


def holm(p: ArrayLike) -> np.ndarray:
    """P values adjusted by Holm (1979): rejecting those of at most alpha has a familywise error of at most alpha.

    Parameters
    ----------
    p : (m,) floats in [0, 1]; NaN is no test and stays

    Returns
    -------
    (m,) floats: of the k-th smallest the largest of ``(m + 1 - j) p_(j)``, j up to k, at most 1
    """
    p = np.asarray(p, dtype=np.float64)
    adjusted, order = np.full(p.shape, np.nan), np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def verdicts(effects: pd.DataFrame) -> pd.DataFrame:
    """A verdict for each difference, corrected over its family.

    Two tests: that the difference is 0, and that it is at least `margin` one way or the other (TOST, Schuirmann 1987).
    Each kind is corrected over the family by itself, so in a family each kind of false claim is made with a probability
    of at most 5 %. Never are both nulls of one cell true.

    Parameters
    ----------
    effects : DataFrame
        family, margin (positive; NaN: equivalence is not asked), point, se, df, one row a cell.

    Returns
    -------
    DataFrame
        The same with p_different and p_equivalent (Holm's within the family), and verdict: 'equivalent' (within the
        margin, whether or not it is 0), else 'different' (which way: the sign of `point`), else 'undecided'.

    Raises
    ------
    ValueError
        A margin that is not positive.
    """
    if (effects["margin"] <= 0).any():
        raise ValueError(f"margin is {effects['margin'].min()}; it must be positive")
    point, df = effects["point"].to_numpy(float), effects["df"].to_numpy(float)
    se, margin = effects["se"].to_numpy(float), effects["margin"].to_numpy(float)
    # A standard error of 0, of arms that are equal, makes the quotients infinite or, for 0 / 0, no difference.
    with np.errstate(divide="ignore", invalid="ignore"):
        apart, room = np.nan_to_num(np.abs(point) / se, nan=0.0), (margin - np.abs(point)) / se
    tests = {"p_different": 2 * student.sf(apart, df), "p_equivalent": student.sf(room, df)}
    found = effects.assign(**tests)
    families = found.groupby("family", sort=False)
    found = found.assign(**{name: families[name].transform(lambda p: holm(p.to_numpy())) for name in tests})
    alpha = 1 - CONFIDENCE
    chosen = [found["p_equivalent"] <= alpha, found["p_different"] <= alpha]
    return found.assign(verdict=np.select(chosen, ["equivalent", "different"], "undecided"))

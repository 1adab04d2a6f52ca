"""Different, equivalent or undecided: what a paired difference between two losses lets one say.

A difference of two runs varies for two reasons: other patients might have been drawn, and the same training from
another seed ends elsewhere. Its variance is the sum of both,

    se^2 = V + s_a^2 / S_a + s_b^2 / S_b,

with V the bootstrap variance over patients of the difference of the means over seeds (the same patients in both arms),
and s^2 the variance between the S seeds of an arm, of each arm by itself: one loss may be steadier than another. Seeds
are not resampled: of S seeds a bootstrap sees (S - 1) / S of their variance, half of it where there are two, and knows
nothing of its own uncertainty. That enters by the degrees of freedom: Satterthwaite's of the sum, and never more than
the S_a + S_b - 2 of the seeds. Without this bound Welch's test makes up to 10 % false claims with two seeds an arm, and
6 % with three; with it at most 4 %, fewer where the patients' part is large. Where both are scores of the same networks
the difference is taken seed by seed, with one variance and the bound S - 1 (twice that would make up to 7 %): few seeds
show little there. Both parts hold the seeds' effect on single films, so their sum is a little too large. The interval
is symmetric about the point, ``point +- t se``: percentile intervals of averages over rare classes are pulled aside.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy
from numpy.typing import ArrayLike

from lib.analysis.statistics import CONFIDENCE

POWER = 0.8
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
        see `detectable`.
    seeds : bool
        Whether the chance of training is in `se`; False where an arm has one seed.
    """

    point: float
    se: float
    df: float
    low: float
    high: float
    detectable: float
    seeds: bool


def effect(point: float, drawn: ArrayLike, n_patients: int, arms: Sequence[ArrayLike]) -> Effect:
    """A difference with its standard error over patients and seeds.

    Parameters
    ----------
    point : float
        The difference of the means over seeds.
    drawn : (R,) floats
        The same in R bootstrap replicates over patients, see `statistics`; NaN where a replicate has none.
    n_patients : int
        Patients that were drawn from.
    arms : sequence of (S,) floats
        The metric of each seed of each mean in the difference; one arm where the difference is taken seed by seed.

    Returns
    -------
    Effect
        All NaN but `point` and `seeds` where there is no standard error: no point, fewer than two patients (replicates
        of one all agree, whoever else is drawn: that is no certainty), or fewer than two replicates.
    """
    drawn, arms = np.asarray(drawn, dtype=np.float64), [np.asarray(arm, dtype=np.float64) for arm in arms]
    drawn, seeds = drawn[~np.isnan(drawn)], all(len(arm) > 1 for arm in arms)
    if np.isnan(point) or n_patients < 2 or len(drawn) < 2:
        return Effect(float(point), *[np.nan] * 5, seeds)
    parts = [(float(drawn.var(ddof=1)), n_patients - 1)]
    parts += [(float(arm.var(ddof=1)) / len(arm), len(arm) - 1) for arm in arms if seeds]
    total = sum(part for part, _ in parts)
    # Satterthwaite 1946. Arms that are equal to the bit have no variance at all: nothing is left to chance.
    freedom = total**2 / sum(part**2 / df for part, df in parts) if total else np.inf
    if seeds and total:
        freedom = min(freedom, sum(len(arm) - 1 for arm in arms))
    se = float(np.sqrt(total))
    reach = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    found = detectable(se, freedom)
    return Effect(float(point), se, float(freedom), point - reach * se, point + reach * se, float(found), seeds)


def detectable(se: ArrayLike, df: ArrayLike, tests: ArrayLike = 1) -> np.ndarray:
    """The difference that is called different with a probability of 80 % where it is one of `tests` (Bonferroni, the
    bar of Holm's first step): ``(t(df; 1 - 0.025 / tests) + t(df; 0.8)) se``."""
    return (
        scipy.stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / np.asarray(tests), df) + scipy.stats.t.ppf(POWER, df)
    ) * np.asarray(se)


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


def verdicts(effects: pd.DataFrame, family: Sequence[str] = ("family",)) -> pd.DataFrame:
    """A verdict for each difference, corrected over its family.

    Two tests: that the difference is 0, and that it is at least `margin` one way or the other (TOST, Schuirmann 1987).
    Each kind is corrected over the family by itself, so in a family each kind of false claim is made with a probability
    of at most 5 %. Never are both nulls of one cell true.

    Parameters
    ----------
    effects : DataFrame
        margin (positive; NaN: equivalence is not asked), point, se, df, one row a cell.
    family : sequence of str
        The columns whose values tell families apart.

    Returns
    -------
    DataFrame
        The same with p_different and p_equivalent (Holm's within the family), tests (cells of the family that have a
        standard error), detectable (of so many tests), and verdict: 'equivalent' (within the margin, whether or not it
        is 0), else 'different' (which way: the sign of `point`), else 'undecided'.

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
    tests = {"p_different": 2 * scipy.stats.t.sf(apart, df), "p_equivalent": scipy.stats.t.sf(room, df)}
    found = effects.assign(**tests)
    families = found.groupby(list(family), sort=False)
    found = found.assign(**{name: families[name].transform(lambda p: holm(p.to_numpy())) for name in tests})
    found["tests"] = families["se"].transform("count")
    found["detectable"] = detectable(se, df, np.maximum(found["tests"], 1))
    alpha = 1 - CONFIDENCE
    chosen = [found["p_equivalent"] <= alpha, found["p_different"] <= alpha]
    return found.assign(verdict=np.select(chosen, ["equivalent", "different"], "undecided"))

"""Verdicts: each part against its formula, and the whole against data in which the truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib.analysis.statistics import patient_replicates, weighted_sums
from lib.analysis.verdicts import effect, holm, verdicts


def test_an_effect_adds_the_variances_of_patients_and_of_each_arms_seeds():
    drawn = np.array([0.1, 0.2, np.nan, 0.4, 0.25])
    arms = [[0.5, 0.7, 0.9, 0.6, 0.4], [0.2, 0.25, 0.1, 0.3]]
    found = effect(0.4, drawn, n_patients=40, arms=arms)
    parts = [(np.var([0.1, 0.2, 0.4, 0.25], ddof=1), 39)]
    parts += [(np.var(arm, ddof=1) / len(arm), len(arm) - 1) for arm in arms]
    total = sum(part for part, _ in parts)
    df = min(total**2 / sum(part**2 / df for part, df in parts), 5 + 4 - 2)
    se = math.sqrt(total)
    assert found.point == pytest.approx(0.4) and found.se == pytest.approx(se) and found.df == pytest.approx(df)
    reach = stats.t(df).ppf(0.975) * se
    assert (found.low, found.high) == pytest.approx((0.4 - reach, 0.4 + reach))
    assert found.detectable == pytest.approx(reach + stats.t(df).ppf(0.8) * se) and found.seeds


@pytest.mark.parametrize(("arms", "df"), [([[0.1, 0.1 + 1e-9]], 1), ([[0, 1e-9], [0, 0]], 2), ([[0, 0, 1e-9]] * 2, 4)])
def test_few_seeds_are_not_taken_for_a_known_variance(arms, df):
    """However small they happen to differ: Satterthwaite's rule would give nearly n_patients degrees of freedom."""
    assert effect(0.4, [0.1, 0.2, 0.4, 0.25], 40, arms).df == df


def test_the_steadier_loss_does_not_lend_its_variance():
    shaky, steady = [0.0, 0.4, 0.8], [0.5, 0.5, 0.5]
    assert effect(0.1, np.zeros(5), 40, [shaky, steady]).se == pytest.approx(math.sqrt(0.16 / 3))


def test_one_seed_says_that_the_chance_of_training_is_not_in_it():
    found = effect(0.3, [0.1, 0.2, 0.4], n_patients=9, arms=[[0.5], [0.2]])
    assert (
        not found.seeds and found.df == pytest.approx(8) and found.se == pytest.approx(np.std([0.1, 0.2, 0.4], ddof=1))
    )


def test_runs_that_are_equal_to_the_bit_differ_by_nothing():
    found = effect(0.0, np.zeros(10), n_patients=9, arms=[[0.5], [0.2]])
    assert (found.point, found.se, found.low, found.high) == (0, 0, 0, 0)
    table = pd.DataFrame([found._asdict() | {"family": "f", "margin": 0.01}])
    assert verdicts(table)["verdict"].item() == "equivalent"
    assert verdicts(table.assign(margin=np.nan))["verdict"].item() == "undecided"


@pytest.mark.parametrize(
    ("point", "drawn", "n_patients"),
    [(0.3, [0.1], 9), (0.3, [0.1, np.nan], 9), (0.3, [0.1, 0.2], 1), (np.nan, [0.1, 0.2], 9)],
)
def test_no_standard_error_is_made_of_one_draw_or_one_patient(point, drawn, n_patients):
    found = effect(point, drawn, n_patients, [[1.0], [2.0]])
    assert found.point == pytest.approx(point, nan_ok=True) and not found.seeds
    assert all(math.isnan(value) for value in (found.se, found.df, found.low, found.high, found.detectable))
    table = pd.DataFrame([found._asdict() | {"family": "f", "margin": 0.01}])
    assert verdicts(table)[["verdict", "tests"]].values.tolist() == [["undecided", 0]]


def test_holm_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(7) ** 3
        order = sorted(range(7), key=p.__getitem__)
        slow = [0.0] * 7
        for k, index in enumerate(order):
            slow[index] = min(1.0, max((7 - j) * p[order[j]] for j in range(k + 1)))
        np.testing.assert_allclose(holm(p), slow, rtol=1e-12)
    np.testing.assert_allclose(holm([0.01, np.nan, 0.04]), [0.02, np.nan, 0.04])


def cells(*rows):
    return pd.DataFrame(rows, columns=["family", "margin", "point", "se", "df"])


def test_the_three_verdicts_and_their_order():
    table = cells(
        ("a", 0.02, 0.10, 0.01, np.inf),  # far from 0
        ("a", 0.02, 0.001, 0.003, np.inf),  # within the margin
        ("a", 0.02, 0.02, 0.02, np.inf),  # neither
        ("a", 0.02, 0.005, 0.001, np.inf),  # not 0, and within the margin all the same
        ("b", np.nan, 0.0, 0.001, np.inf),  # nobody asks for equivalence
    )
    assert list(verdicts(table)["verdict"]) == ["different", "equivalent", "undecided", "equivalent", "undecided"]


def test_a_family_is_corrected_by_itself():
    weak = ("a", np.nan, 2.2, 1.0, np.inf)  # p = .028: enough alone, not among three
    assert verdicts(cells(weak))["verdict"].item() == "different"
    assert list(verdicts(cells(weak, weak, weak))["verdict"]) == ["undecided"] * 3
    other = ("b", np.nan, 0.0, 1.0, np.inf)
    assert verdicts(cells(weak, other, other))["verdict"].iloc[0] == "different"


def test_the_detectable_difference_is_of_all_tests_of_the_family():
    found = verdicts(cells(*[("a", np.nan, 0.5, 0.1, 6)] * 3, ("b", np.nan, 0.5, 0.1, 6)))
    assert list(found["tests"]) == [3, 3, 3, 1]
    at_three = (stats.t(6).ppf(1 - 0.025 / 3) + stats.t(6).ppf(0.8)) * 0.1
    assert found["detectable"].iloc[0] == pytest.approx(at_three) and at_three > found["detectable"].iloc[3]
    # What it says: of true differences of this size eight in ten pass the bar of Holm's first step.
    drawn = at_three / 0.1 + stats.norm.rvs(size=40000, random_state=0)
    scale = np.sqrt(stats.chi2(6).rvs(size=40000, random_state=1) / 6)
    assert np.mean(drawn / scale > stats.t(6).ppf(1 - 0.025 / 3)) == pytest.approx(0.8, abs=0.03)


def test_a_margin_is_positive():
    with pytest.raises(ValueError, match="must be positive"):
        verdicts(cells(("a", 0.0, 0.1, 0.01, 10)))


# ---- against data in which the truth is known


def simulated(rng, *, shifts, seeds, n_patients, between, within=1.0):
    """Effects of runs whose records are patient + seed + record: each run against the first, which has shift 0."""
    n_films = rng.integers(1, 4, n_patients)
    patients = np.repeat(np.arange(n_patients), n_films)
    common = rng.normal(0, 0.7, n_patients)[patients] + rng.normal(0, 0.7, len(patients))
    values = [
        np.stack([common + shift + rng.normal(0, between) + rng.normal(0, within, len(patients)) for _ in range(s)])
        for shift, s in zip(shifts, seeds, strict=True)
    ]
    replicates = patient_replicates(patients, 200, int(rng.integers(2**31)))
    films = pd.DataFrame({"patient": patients})

    def means(run):  # of each seed's mean in each replicate
        sums = films.assign(**{str(k): one for k, one in enumerate(run)}, n=1.0).groupby("patient").sum().to_numpy()
        drawn = weighted_sums(replicates.counts, sums)
        return (drawn[:, :-1] / drawn[:, -1:]).mean(axis=1)

    base, drawn = values[0].mean(), means(values[0])
    found = [
        effect(run.mean() - base, means(run) - drawn, n_patients, [run.mean(axis=1), values[0].mean(axis=1)])
        for run in values[1:]
    ]
    return pd.DataFrame(found).assign(family="losses")


def rates(shifts, margin, *, rounds, seeds=(2, 2, 2, 2), n_patients=80, between=0.1):
    """Shares of rounds in which any run was called different, and equivalent; and of intervals that hold the truth."""
    rng = np.random.default_rng(5)
    different, equivalent, held = 0, 0, []
    for _ in range(rounds):
        table = simulated(rng, shifts=shifts, seeds=seeds, n_patients=n_patients, between=between)
        found = verdicts(table.assign(margin=margin))["verdict"]
        different += (found == "different").any()
        equivalent += (found == "equivalent").any()
        truth = np.array(shifts[1:])
        held += list((table["low"] <= truth) & (truth <= table["high"]))
    return different / rounds, equivalent / rounds, np.mean(held)


@pytest.mark.parametrize("seeds", [(2, 2, 2, 2), (3, 3, 3, 3), (3, 2, 2, 2)])
def test_false_claims_of_a_family_are_rare_and_intervals_hold_the_truth(seeds):
    different, _, held = rates((0, 0, 0, 0), np.nan, rounds=120, seeds=seeds)
    assert different <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 120) and held >= 0.93


def test_seeds_left_out_would_make_false_claims():
    """The same data with one seed each: the reason why a difference of single runs says little."""
    different, _, held = rates((0, 0, 0, 0), np.nan, rounds=60, seeds=(1, 1, 1, 1), between=0.3)
    assert different > 0.3 and held < 0.8


def test_a_difference_at_the_margin_is_rarely_called_equivalent_and_a_planted_one_is_found():
    _, equivalent, _ = rates((0, 0.3, 0.3, 0.3), 0.3, rounds=80)
    assert equivalent <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 80)
    power = [rates((0, *[shift] * 3), np.nan, rounds=30, seeds=(3, 3, 3, 3))[0] for shift in (0.2, 0.5, 1.0)]
    assert power == sorted(power) and power[-1] > 0.9

"""Verdicts: each part against its formula, and the whole against data in which the truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib.analysis.statistics import patient_replicates, weighted_sums
from lib.analysis.verdicts import effect, holm, seed_variance, verdicts


def test_variance_between_seeds_is_pooled_over_runs_that_have_several():
    runs = [[0.1, 0.3], [1.0], [2.0, 2.1, 2.5]]
    by_hand = (2 * 0.1**2 + (0.2**2 + 0.1**2 + 0.3**2)) / 3
    variance, df = seed_variance(runs)
    assert df == 3 and variance == pytest.approx(by_hand, rel=1e-12)
    # A constant a run changes nothing: the runs' own means are not compared.
    assert seed_variance([[5.1, 5.3], [2.0, 2.1, 2.5]])[0] == pytest.approx(by_hand, rel=1e-12)
    variance, df = seed_variance([[1.0], [2.0]])
    assert math.isnan(variance) and df == 0


def test_an_effect_adds_both_variances_and_their_freedom():
    drawn = np.array([0.1, 0.2, np.nan, 0.4, 0.25])
    found = effect(0.4, drawn, n_patients=40, seeds=(2, 1), between=(0.01, 4))
    patients = np.var([0.1, 0.2, 0.4, 0.25], ddof=1)
    seeds = 0.01 * (1 / 2 + 1)
    df = (patients + seeds) ** 2 / (patients**2 / 39 + seeds**2 / 4)
    se = math.sqrt(patients + seeds)
    assert found.point == pytest.approx(0.4) and found.se == pytest.approx(se) and found.df == pytest.approx(df)
    reach = stats.t(df).ppf(0.975) * se
    assert (found.low, found.high) == pytest.approx((0.4 - reach, 0.4 + reach))
    assert found.detectable == pytest.approx(reach + stats.t(df).ppf(0.8) * se) and found.seeds


@pytest.mark.parametrize("df", [1, 2, 3])
def test_few_seeds_are_not_taken_for_a_known_variance(df):
    """However small they happen to differ: Satterthwaite's rule would give nearly n_patients degrees of freedom."""
    found = effect(0.4, [0.1, 0.2, 0.4, 0.25], n_patients=40, seeds=(2, 1), between=(1e-9, df))
    assert found.df == df


def test_one_seed_says_that_the_chance_of_training_is_not_in_it():
    found = effect(0.3, [0.1, 0.2, 0.4], n_patients=9, seeds=(1, 1))
    assert (
        not found.seeds and found.df == pytest.approx(8) and found.se == pytest.approx(np.std([0.1, 0.2, 0.4], ddof=1))
    )


def test_runs_that_are_equal_to_the_bit_differ_by_nothing():
    found = effect(0.0, np.zeros(10), n_patients=9, seeds=(1, 1))
    assert (found.point, found.se, found.low, found.high) == (0, 0, 0, 0)
    table = pd.DataFrame([found._asdict() | {"family": "f", "margin": 0.01}])
    assert verdicts(table)["verdict"].item() == "equivalent"
    assert verdicts(table.assign(margin=np.nan))["verdict"].item() == "undecided"


@pytest.mark.parametrize(("drawn", "n_patients"), [([0.1], 9), ([0.1, np.nan], 9), ([0.1, 0.2], 1)])
def test_no_standard_error_is_made_of_one_draw_or_one_patient(drawn, n_patients):
    with pytest.raises(ValueError, match="needs two of each"):
        effect(0.3, drawn, n_patients, (1, 1))


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

    between = seed_variance([run.mean(axis=1) for run in values])
    base, drawn = values[0].mean(), means(values[0])
    found = [
        effect(run.mean() - base, means(run) - drawn, n_patients, (len(run), len(values[0])), between)
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


@pytest.mark.parametrize("seeds", [(2, 2, 2, 2), (3, 1, 1, 1), (2, 1, 1, 1)])
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
    power = [rates((0, shift, shift, shift), np.nan, rounds=30)[0] for shift in (0.2, 0.5, 1.0)]
    assert power == sorted(power) and power[-1] > 0.9

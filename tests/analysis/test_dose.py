"""Contrasts paired by seed, against loops and SciPy's test."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from lib.analysis.dose import contrasts, seed_interval


def draw(seeds=(0, 1, 2)):
    rows = [
        (prevalence, noise, loss, seed, metric)
        for prevalence in (1.0, 0.1)
        for noise in (False, True)
        for loss in ("bce", "wbce", "focal")
        for seed in seeds
        for metric in ("auroc", "ior")
    ]
    table = pd.DataFrame(rows, columns=["prevalence", "noise", "loss", "seed", "metric"])
    return table.assign(value=np.random.default_rng(0).normal(size=len(table)))


@pytest.mark.parametrize("n", [2, 3, 7])
def test_an_interval_is_students(n):
    values = np.random.default_rng(n).normal(size=n)
    found, expected = seed_interval([*values, np.nan]), ttest_1samp(values, 0).confidence_interval()
    assert found.n_seeds == n and found.point == pytest.approx(values.mean())
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high])


def test_one_seed_has_no_interval_and_none_no_mean():
    one, none = seed_interval([0.3]), seed_interval([np.nan])
    assert one.point == 0.3 and one.n_seeds == 1 and np.isnan([one.low, one.high]).all()
    assert none.n_seeds == 0 and np.isnan(none[:3]).all()


@pytest.mark.parametrize("what, against", [("loss", "bce"), ("noise", False), ("prevalence", 1.0)])
def test_contrasts_against_loops(what, against):
    table = draw().sample(frac=1, random_state=0, ignore_index=True)
    found = contrasts(table, what, against)
    names = [name for name in ("prevalence", "noise", "loss", "metric") if name != what]
    expected = 0
    for other in set(table[what]) - {against}:
        for group, part in table.groupby(names):
            values = {value: part[part[what] == value].set_index("seed")["value"] for value in (against, other)}
            rows = found[(found[names] == pd.Series(group, names)).all(axis=1) & (found[what] == other)]
            assert len(rows) == 1
            row, mine = rows.iloc[0], seed_interval([values[other][seed] - values[against][seed] for seed in range(3)])
            np.testing.assert_allclose([row["point"], row["low"], row["high"]], mine[:3], rtol=1e-12)
            assert row["base"] == pytest.approx(values[against].mean()) and row["n_seeds"] == 3
            expected += 1
    assert len(found) == expected


def test_a_seed_without_its_partner_is_left_out():
    table = draw()
    found = contrasts(table[~((table["loss"] == "bce") & (table["seed"] == 2))], "loss", "bce")
    assert (found["n_seeds"] == 2).all() and len(found) == 16
    assert contrasts(table[table["noise"]], "noise", False).empty


def test_two_runs_that_cannot_be_told_apart_are_refused():
    table = draw()
    with pytest.raises(ValueError, match="two rows of one run and metric: .*must tell all rows apart"):
        contrasts(pd.concat([table, table[:1]]), "loss", "bce")

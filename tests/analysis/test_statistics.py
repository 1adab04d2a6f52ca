import numpy as np
import pytest

from lib.analysis.statistics import Interval, mean_interval, mean_intervals, paired_difference, patient_replicates
from tests.analysis import reference_statistics as reference


def film_patients(n=40, n_patients=15):
    """Patients of n films."""
    return np.random.default_rng(0).permutation([f"{i % n_patients:08d}" for i in range(n)])


# Draws


def test_replicates_are_the_literal_draws():
    patients = film_patients()
    replicates = patient_replicates(patients, 20, seed=3)
    weights = replicates.counts[:, replicates.patient]
    for row, drawn in zip(weights, reference.resampled_films(patients, 20, seed=3), strict=True):
        np.testing.assert_array_equal(row, np.bincount(drawn, minlength=len(patients)))
    assert (replicates.counts.sum(axis=1) == len(set(patients))).all()


def test_replicates_depend_on_the_seed_and_the_patients_only():
    patients = film_patients()
    a, b = patient_replicates(patients, 10, seed=1), patient_replicates(patients[::-1], 30, seed=1)
    np.testing.assert_array_equal(a.counts, b.counts[:10])
    np.testing.assert_array_equal(a.patient, b.patient[::-1])
    assert (a.counts != patient_replicates(patients, 10, seed=2).counts).any()


def test_replicates_leave_the_global_generator_alone():
    state = np.random.get_state()[1].copy()
    patient_replicates(np.arange(5), 10, seed=0)
    np.testing.assert_array_equal(state, np.random.get_state()[1])


@pytest.mark.parametrize("n_replicates", [-1, 2.5, True, None])
def test_replicates_must_be_a_count(n_replicates):
    with pytest.raises(ValueError, match="n_replicates"):
        patient_replicates(["a"], n_replicates, seed=0)


def test_missing_patient_is_named():
    with pytest.raises(ValueError, match="patients: row 1 is missing"):
        patient_replicates(["a", None, "b"], 5, seed=0)
    with pytest.raises(ValueError, match="non-empty"):
        patient_replicates([], 5, seed=0)


# Means


def test_means_by_group_equal_a_literal_resampling_loop():
    generator = np.random.default_rng(0)
    patients = film_patients(n=50, n_patients=14)
    values, groups = generator.random(50), generator.choice(["Mass", "Nodule", "Hernia"], size=50, p=[0.6, 0.3, 0.1])
    values[generator.random(50) < 0.2] = np.nan
    frame = mean_intervals(values, groups, patients, 80, seed=7).set_index("group")
    assert list(frame.index) == ["Hernia", "Mass", "Nodule"]
    drawn = reference.resampled_films(patients, 80, seed=7)
    for group, row in frame.iterrows():
        means = []
        for chosen in drawn:
            used = [values[i] for i in chosen if groups[i] == group and not np.isnan(values[i])]
            means.append(np.mean(used) if used else np.nan)
        inside = groups == group
        np.testing.assert_allclose(row["point"], np.nanmean(values[inside]), atol=1e-12)
        np.testing.assert_allclose((row["low"], row["high"]), reference.percentile_interval(means), atol=1e-12)
        assert row["n"] + row["n_skipped"] == inside.sum() and row["n_skipped"] == np.isnan(values[inside]).sum()
        assert row["n_undefined"] == np.isnan(means).sum()
        assert row["n_patients"] == len(set(patients[inside & ~np.isnan(values)]))


def test_one_group_is_the_mean_interval():
    patients = film_patients()
    values = np.random.default_rng(0).random(len(patients))
    frame = mean_intervals(values, ["x"] * len(values), patients, 50, seed=4)
    assert tuple(frame.loc[0, list(Interval._fields)]) == mean_interval(values, patients, 50, seed=4)


def test_nan_records_do_not_change_the_draws():
    patients = film_patients()
    values = np.random.default_rng(0).random(len(patients))
    values[patients == patients[0]] = np.nan
    interval = mean_interval(values, patients, 100, seed=0)
    weights = patient_replicates(patients, 100, seed=0)
    kept = ~np.isnan(values)
    means = [np.average(values[kept], weights=counts[weights.patient][kept]) for counts in weights.counts]
    np.testing.assert_allclose(interval[1:3], reference.percentile_interval(means), atol=1e-12)
    assert interval.n_skipped == (~kept).sum()


def test_too_few_patients_have_no_interval():
    assert mean_interval([1.0, 3.0], ["a", "a"], 20)[:1] == (2.0,)
    assert np.isnan(mean_interval([1.0, 3.0], ["a", "a"], 20)[1:3]).all()
    assert np.isnan(mean_interval([1.0, np.nan], ["a", "b"], 20)[1:3]).all()
    assert np.isnan(mean_interval([np.nan, np.nan], ["a", "b"], 20)[:3]).all()
    assert np.isnan(mean_interval([1.0, 2.0], ["a", "b"], 0)[1:3]).all()


def test_paired_difference_skips_records_undefined_in_either():
    patients = list("aabbcc")
    a, b = [1, 2, np.nan, 4, 5, 6], [0, 2, 3, np.nan, 5, 4]
    interval = paired_difference(a, b, patients, 50)
    assert (interval.point, interval.n, interval.n_skipped) == (0.75, 4, 2)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_means_of_several_seeds_equal_a_literal_resampling_loop(n_seeds):
    generator = np.random.default_rng(8)
    patients = film_patients(n=30, n_patients=9)
    values = generator.random((n_seeds, 30)) + 5 * np.arange(n_seeds)[:, None] ** 2
    values[generator.random(values.shape) < 0.2] = np.nan
    values[0, patients == patients[0]] = np.nan

    def mean(films):
        return np.mean([np.nanmean([seed[i] for i in films]) for seed in values])

    found = mean_interval(values, patients, 60, seed=3)
    means = [mean(films) for films in reference.resampled_films(patients, 60, seed=3)]
    np.testing.assert_allclose(found.point, mean(range(30)), atol=1e-12)
    np.testing.assert_allclose((found.low, found.high), reference.percentile_interval(means), atol=1e-12)
    left = [np.isnan(seed).sum() for seed in values]
    assert found.n_skipped == max(left) and found.n == 30 - max(left)
    if n_seeds == 1:
        assert found == mean_interval(values[0], patients, 60, seed=3)
    else:
        assert abs(found.point - np.nanmean(values)) > 0.01  # records of all seeds together would weigh seeds unevenly


def test_a_difference_of_several_seeds_is_that_of_their_means():
    generator = np.random.default_rng(9)
    patients = film_patients(n=30, n_patients=9)
    a, b = generator.random((3, 30)), generator.random((2, 30))
    found = paired_difference(a, b, patients, 60, seed=3)
    expected = mean_interval(a.mean(axis=0) - b.mean(axis=0), patients, 60, seed=3)
    np.testing.assert_allclose(found[:3], expected[:3], atol=1e-12)
    assert found[3:] == expected[3:]
    one = paired_difference(a[0], b[0], patients, 60, seed=3)
    assert one == mean_interval(a[0] - b[0], patients, 60, seed=3)
    with pytest.raises(ValueError, match=r"\(3, 30\) and values_b \(29,\): both must hold the same records"):
        paired_difference(a, b[0, :29], patients, 5)


def test_pairing_shrinks_the_interval_of_correlated_runs():
    generator = np.random.default_rng(0)
    patients = np.repeat(np.arange(60), 3)
    a = generator.normal(size=60)[patients] + generator.normal(size=180)
    b = a - 0.1 + 0.1 * generator.normal(size=180)
    paired, alone = paired_difference(a, b, patients, 300), mean_interval(a, patients, 300)
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    assert paired.low > 0 > alone.low - alone.point


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="record 1 is infinite"):
        mean_interval([1.0, np.inf], ["a", "b"], 5)
    with pytest.raises(ValueError, match="one of each a record"):
        mean_interval([1.0, 2.0], ["a"], 5)
    with pytest.raises(ValueError, match="non-empty"):
        mean_interval([], [], 5)
    with pytest.raises(ValueError, match="same records"):
        paired_difference([1.0], [1.0, 2.0], ["a"], 5)
    with pytest.raises(ValueError, match="infinite"):
        paired_difference([np.inf], [np.inf], ["a"], 5)
    with pytest.raises(ValueError, match="groups: row 1 is missing"):
        mean_intervals([1.0, 2.0], ["x", None], ["a", "b"], 5)


# Coverage on clustered data: the truth is known


def test_coverage_of_the_mean_over_patients():
    """95 % intervals over patients hold the true mean about 95 % of the time; over films far less."""
    generator = np.random.default_rng(0)
    by_patient = by_film = 0
    for trial in range(300):
        patients = np.repeat(np.arange(60), generator.integers(1, 8, size=60))
        values = 0.5 + generator.normal(size=60)[patients] + 0.3 * generator.normal(size=len(patients))
        interval = mean_interval(values, patients, 300, seed=trial)
        by_patient += interval.low <= 0.5 <= interval.high
        interval = mean_interval(values, np.arange(len(values)), 300, seed=trial)
        by_film += interval.low <= 0.5 <= interval.high
    assert 0.90 <= by_patient / 300 <= 0.98
    assert by_film / 300 < 0.80

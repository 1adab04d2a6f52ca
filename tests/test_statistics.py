import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score, roc_auc_score

from lib.analysis import statistics
from lib.analysis.statistics import (
    mean_interval,
    mean_intervals,
    metric_differences,
    metric_intervals,
    paired_difference,
    patient_replicates,
    ranking_metrics,
)
from tests import reference_statistics as reference

CLASSES = ["Effusion", "Mass", "No Finding"]


def films(n=40, n_patients=15, seed=0, decimals=1):
    """Logits with ties, targets and patients of n films."""
    generator = np.random.default_rng(seed)
    targets = (generator.random((n, 3)) < [0.4, 0.15, 0.5]).astype(np.uint8)
    logits = np.round(generator.normal(size=(n, 3)) + targets, decimals)
    patients = generator.permutation([f"{i % n_patients:08d}" for i in range(n)])
    return logits, targets, patients


def single(scores, targets):
    """AUROC and AP of unweighted films."""
    n = len(scores)
    a, p = ranking_metrics(scores, targets, np.ones((1, n)), np.arange(n))
    return a[0], p[0]


# Draws


def test_replicates_are_the_literal_draws():
    _, _, patients = films()
    replicates = patient_replicates(patients, 20, seed=3)
    weights = replicates.counts[:, replicates.patient]
    for row, drawn in zip(weights, reference.resampled_films(patients, 20, seed=3), strict=True):
        np.testing.assert_array_equal(row, np.bincount(drawn, minlength=len(patients)))
    assert (replicates.counts.sum(axis=1) == len(set(patients))).all()


def test_replicates_depend_on_the_seed_and_the_patients_only():
    _, _, patients = films()
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


# AUROC and AP


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_ranking_equals_pairs_and_steps(seed, decimals):
    logits, targets, _ = films(n=25, seed=seed, decimals=decimals)
    for m in range(3):
        a, p = single(logits[:, m], targets[:, m])
        np.testing.assert_allclose(a, reference.auroc(logits[:, m], targets[:, m]), atol=1e-12)
        np.testing.assert_allclose(p, reference.average_precision(logits[:, m], targets[:, m]), atol=1e-12)


@pytest.mark.parametrize("decimals", [0, 2])
def test_ranking_equals_sklearn_with_weights(decimals):
    generator = np.random.default_rng(0)
    logits, targets, _ = films(n=300, decimals=decimals)
    integers = generator.poisson(1, size=(20, 300))
    fractions = generator.random((20, 300)) * (generator.random((20, 300)) < 0.7)
    for weights in (integers, fractions):
        a, p = ranking_metrics(logits[:, 0], targets[:, 0], weights, np.arange(300))
        for r, w in enumerate(weights):
            np.testing.assert_allclose(a[r], roc_auc_score(targets[:, 0], logits[:, 0], sample_weight=w), atol=1e-12)
            np.testing.assert_allclose(p[r], average_precision_score(targets[:, 0], logits[:, 0], sample_weight=w), atol=1e-12)


def test_ranking_is_the_same_in_small_blocks(monkeypatch):
    logits, targets, patients = films(n=60)
    replicates = patient_replicates(patients, 50, seed=0)
    whole = ranking_metrics(logits[:, 0], targets[:, 0], replicates.counts, replicates.patient)
    monkeypatch.setattr(statistics, "_BLOCK", 100)
    blocks = ranking_metrics(logits[:, 0], targets[:, 0], replicates.counts, replicates.patient)
    np.testing.assert_array_equal(whole, blocks)


def test_ranking_hard_cases():
    assert single([1, 1, 1, 1], [1, 0, 0, 0]) == (0.5, 0.25)  # all alike: chance, and the prevalence
    assert single([4, 3, 2, 1], [1, 1, 0, 0]) == (1.0, 1.0)
    assert single([1, 2, 3, 4], [1, 0, 0, 0]) == (0.0, 0.25)
    assert single([700, -700, 700.5, -699], [1, 0, 1, 0]) == (1.0, 1.0)  # sigmoids of 700 and 700.5 tie, logits do not
    for targets in ([0, 0, 0], [1, 1, 1]):
        assert np.isnan(single([1, 2, 3], targets)).all()


def test_replicate_without_a_label_is_undefined():
    a, p = ranking_metrics([2, 1, 0], [1, 0, 0], [[0, 2, 1], [3, 0, 0], [1, 1, 1], [1, 0, 2]], [0, 1, 2])
    np.testing.assert_array_equal(a, [np.nan, np.nan, 1, 1])
    np.testing.assert_array_equal(p, [np.nan, np.nan, 1, 1])


def test_metric_intervals_equal_a_literal_resampling_loop():
    logits, targets, patients = films(n=40, n_patients=12)
    targets[:, 1] = 0
    targets[patients == patients[0], 1] = 1  # all positives in one patient: undefined in about a third of the replicates
    frame = metric_intervals(logits, targets, CLASSES, patients, n_replicates=60, seed=5).set_index(["class", "metric"])
    drawn = reference.resampled_films(patients, 60, seed=5)

    def all_metrics(chosen):
        rows = {}
        for m, name in enumerate(CLASSES):
            z, t = logits[chosen, m], targets[chosen, m]
            rows[name, "auroc"] = reference.auroc(z, t)
            rows[name, "ap"] = reference.average_precision(z, t)
            rows[name, "mean_probability"] = expit(z).mean()
        for average, names in (("Average", CLASSES), ("Average (2 findings)", CLASSES[:2])):
            for metric in ("auroc", "ap", "mean_probability"):
                values = [rows[name, metric] for name in names if not np.isnan(rows[name, metric])]
                rows[average, metric] = np.mean(values)
        return rows

    point, replicates = all_metrics(range(len(patients))), [all_metrics(chosen) for chosen in drawn]
    assert set(frame.index) == set(point)
    for key, row in frame.iterrows():
        values = [replicate[key] for replicate in replicates]
        np.testing.assert_allclose(row["point"], point[key], atol=1e-12)
        low, high = reference.percentile_interval(values)
        if key[1] == "ap" and key[0].startswith("Average"):  # the basic interval: the replicates lie above the point
            low, high = max(2 * point[key] - high, 0), min(2 * point[key] - low, 1)
        np.testing.assert_allclose((row["low"], row["high"]), (low, high), atol=1e-12)
        assert row["n_undefined"] == np.isnan(values).sum()
    assert frame.loc[("Mass", "auroc"), "n_undefined"] > 0
    assert frame.loc[("Mass", "mean_probability"), "n_undefined"] == 0


def test_metric_intervals_do_not_depend_on_the_order_of_films():
    logits, targets, patients = films()
    order = np.random.default_rng(1).permutation(len(patients))
    a = metric_intervals(logits, targets, CLASSES, patients, 50, seed=0)
    b = metric_intervals(logits[order], targets[order], CLASSES, patients[order], 50, seed=0)
    pd.testing.assert_frame_equal(a, b, rtol=1e-12)
    pd.testing.assert_frame_equal(a, metric_intervals(logits, targets, CLASSES, patients, 50, seed=0), check_exact=True)


def test_class_with_one_label_is_undefined_and_not_averaged():
    logits, targets, patients = films()
    targets[:, 0] = 0
    frame = metric_intervals(logits, targets, CLASSES, patients, 30).set_index(["class", "metric"])
    assert frame.loc[("Effusion", "auroc"), ["point", "low", "high"]].isna().all()
    assert frame.loc[("Effusion", "ap"), "n_undefined"] == 30
    assert frame.loc[("Effusion", "mean_probability"), ["point", "low", "high"]].notna().all()
    for metric in statistics.METRICS:
        points = frame.xs(metric, level="metric")["point"]
        np.testing.assert_allclose(points["Average"], (points["Mass"] + points["No Finding"]) / 2)
        np.testing.assert_allclose(points["Average (2 findings)"], points["Mass"])


def test_nothing_defined_is_nan_everywhere():
    frame = metric_intervals([[0.0], [1.0]], [[0], [0]], ["Unhealthy"], ["a", "b"], 10).set_index(["class", "metric"])
    assert frame.loc["Average"][["point", "low", "high"]].isna().all(axis=None)


def test_differences_of_two_runs_are_paired():
    logits, targets, patients = films(n=200, n_patients=80, decimals=6)
    similar = logits + np.random.default_rng(1).normal(scale=0.05, size=logits.shape)
    a = metric_intervals(logits, targets, CLASSES, patients, 200)
    b = metric_intervals(similar, targets, CLASSES, patients, 200)
    difference = metric_differences(logits, similar, targets, CLASSES, patients, 200)
    np.testing.assert_allclose(difference["point"], a["point"] - b["point"], atol=1e-12)
    paired, unpaired = difference["high"] - difference["low"], a["high"] - a["low"]
    assert (paired < 0.5 * unpaired).all()
    same = metric_differences(logits, logits, targets, CLASSES, patients, 50)
    assert (same[["point", "low", "high"]] == 0).all(axis=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((0, 3)), "targets": np.zeros((0, 3)), "patients": []}, "empty"),
        ({"targets": np.zeros((4, 2))}, r"\(4, 3\) and targets \(4, 2\)"),
        ({"logits": np.zeros(4), "targets": np.zeros(4)}, r"must be \(films, classes\)"),
        ({"classes": ["a", "b"]}, "2 classes are named for 3 outputs"),
        ({"classes": ["a", "b", "a"]}, "repeat"),
        ({"patients": ["a"]}, "1 patients are given for 4 films"),
        (
            {"logits": np.array([[0, 0, 0], [0, np.nan, np.inf], [0] * 3, [0] * 3])},
            "2 logits that are not finite; the first is nan in row 1, class 'b'",
        ),
        ({"targets": np.full((4, 3), 2)}, "12 targets other than 0 and 1; the first is 2 in row 0, class 'a'"),
    ],
)
def test_bad_predictions_are_named(change, message):
    inputs = {"logits": np.zeros((4, 3)), "targets": np.eye(4, 3), "classes": ["a", "b", "c"], "patients": list("abcd")} | change
    with pytest.raises(ValueError, match=message):
        metric_intervals(**inputs, n_replicates=2)


# Means


def test_means_by_group_equal_a_literal_resampling_loop():
    generator = np.random.default_rng(0)
    _, _, patients = films(n=50, n_patients=14)
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
    _, _, patients = films()
    values = np.random.default_rng(0).random(len(patients))
    frame = mean_intervals(values, ["x"] * len(values), patients, 50, seed=4)
    assert tuple(frame.loc[0, list(statistics.Interval._fields)]) == mean_interval(values, patients, 50, seed=4)


def test_nan_records_do_not_change_the_draws():
    _, _, patients = films()
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


def test_coverage_of_the_auroc_over_patients():
    """Binormal scores with a patient effect; patients are positive or negative, so the true AUROC is Phi(d / sqrt(2 v))."""
    from scipy.stats import norm

    generator = np.random.default_rng(1)
    shift, effect, noise = 1.0, 0.8, 0.6
    truth = norm.cdf(shift / np.sqrt(2 * (effect**2 + noise**2)))
    covered = 0
    for trial in range(200):
        patients = np.repeat(np.arange(120), generator.integers(1, 5, size=120))
        targets = (np.arange(120) < 40)[patients]
        logits = shift * targets + effect * generator.normal(size=120)[patients] + noise * generator.normal(size=len(patients))
        frame = metric_intervals(logits[:, None], targets[:, None], ["x"], patients, 200, seed=trial)
        covered += frame["low"][0] <= truth <= frame["high"][0]
    assert 0.89 <= covered / 200 <= 0.99


def test_coverage_of_the_paired_difference_of_average_precision():
    """Rare classes, where AP itself is biased upwards in the replicates: in the difference of two runs the bias cancels."""
    generator = np.random.default_rng(2)

    def two_runs(n, n_patients):
        patients = generator.integers(n_patients, size=n)
        targets = generator.random((n, 3)) < [0.03, 0.06, 0.12]
        a = 1.2 * targets + 0.6 * generator.normal(size=(n_patients, 3))[patients] + 0.8 * generator.normal(size=(n, 3))
        return a, a + 0.6 * generator.normal(size=(n, 3)), targets, patients

    def average_difference(n_replicates, seed, a, b, targets, patients):
        frame = metric_differences(a, b, targets, ["x", "y", "z"], patients, n_replicates, seed)
        return frame.set_index(["class", "metric"]).loc[("Average", "ap")]

    truth = average_difference(0, 0, *two_runs(200_000, 200_000))["point"]
    rows = [average_difference(150, trial, *two_runs(400, 160)) for trial in range(120)]
    covered = np.mean([row["low"] <= truth <= row["high"] for row in rows])
    assert 0.88 <= covered <= 0.99

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from lib.analysis import metrics
from lib.analysis.metrics import (
    COLUMNS,
    METRICS,
    classification_metrics,
    metric_differences,
    metric_intervals,
    ranking_metrics,
)
from lib.analysis.statistics import patient_replicates
from tests.analysis import reference_metrics as reference
from tests.analysis import reference_statistics as statistics_reference

CLASSES = ["Effusion", "Mass", "No Finding"]
AVERAGES = ["Average", "Average (2 findings)"]
PLAN = """class n_positive n_negative prevalence auroc auroc_ci_low auroc_ci_high ap ap_ci_low ap_ci_high
    mean_probability mean_probability_ci_low mean_probability_ci_high mean_probability_positives
    mean_probability_negatives brier ece""".split()


def films(n=120, n_patients=40, seed=0):
    generator = np.random.default_rng(seed)
    targets = (generator.random((n, 3)) < [0.4, 0.15, 0.5]).astype(np.uint8)
    logits = (generator.normal(size=(n, 3)) * 2 + targets - 1).astype(np.float32)
    return logits, targets, generator.integers(n_patients, size=n)


def test_every_column_against_its_definition():
    logits, targets, patients = films()
    frame = classification_metrics(logits, targets, CLASSES, patients, n_replicates=50)
    assert list(frame.columns) == COLUMNS == PLAN
    assert list(frame["class"]) == CLASSES + AVERAGES
    for m in range(3):
        row, z, t = frame.loc[m], logits[:, m].astype(float), targets[:, m]
        p = [reference.sigmoid(value) for value in z]
        expected = {
            "n_positive": t.sum(),
            "n_negative": (1 - t).sum(),
            "prevalence": t.mean(),
            "auroc": roc_auc_score(t, z),
            "ap": average_precision_score(t, z),
            "mean_probability": reference.mean(p),
            "mean_probability_positives": reference.mean(value for value, target in zip(p, t, strict=True) if target),
            "mean_probability_negatives": reference.mean(
                value for value, target in zip(p, t, strict=True) if not target
            ),
            "brier": reference.brier(z, t),
            "ece": reference.calibration_error(z, t, 15),
        }
        for column, value in expected.items():
            np.testing.assert_allclose(row[column], value, atol=1e-12, err_msg=column)
        np.testing.assert_allclose(row["brier"], brier_score_loss(t, p), atol=1e-12)
        for metric in ("auroc", "ap", "mean_probability"):
            assert row[f"{metric}_ci_low"] < row[metric] < row[f"{metric}_ci_high"]


def test_averages():
    logits, targets, patients = films()
    frame = classification_metrics(logits, targets, CLASSES, patients, n_replicates=0).set_index("class")
    means = [column for column in PLAN[3:] if "_ci_" not in column]
    for name, classes in (("Average", CLASSES), ("Average (2 findings)", CLASSES[:2])):
        np.testing.assert_allclose(frame.loc[name, means].astype(float), frame.loc[classes, means].mean(), atol=1e-12)
        assert frame.loc[name, "n_positive"] == frame.loc[classes, "n_positive"].sum()
    assert frame["n_positive"].dtype == frame["n_negative"].dtype == np.int64
    names = [f"class {i}" for i in range(14)] + ["No Finding"]
    frame = classification_metrics(np.zeros((2, 15)), np.eye(2, 15), names, [0, 1], n_replicates=0)
    assert list(frame["class"][15:]) == ["Average", "Average (14 findings)"]


def test_intervals_are_those_of_metric_intervals():
    logits, targets, patients = films()
    frame = classification_metrics(logits, targets, CLASSES, patients, n_replicates=40, seed=9).set_index("class")
    intervals = metric_intervals(logits, targets, CLASSES, patients, n_replicates=40, seed=9)
    for row in intervals.itertuples():
        values = frame.loc[row[1], [row.metric, f"{row.metric}_ci_low", f"{row.metric}_ci_high"]].astype(float)
        np.testing.assert_array_equal(values, (row.point, row.low, row.high))


def test_no_replicates_gives_nan_intervals():
    frame = classification_metrics(*films()[:2], CLASSES, films()[2], n_replicates=0)
    bounds = [column for column in COLUMNS if "_ci_" in column]
    assert frame[bounds].isna().all(axis=None) and frame.drop(columns=bounds).notna().all(axis=None)


def test_binary_task_has_one_average():
    logits, targets, patients = films()
    frame = classification_metrics(logits[:, :1], targets[:, :1], ["Unhealthy"], patients, n_replicates=20)
    assert list(frame["class"]) == ["Unhealthy", "Average"]
    pd.testing.assert_series_equal(frame.loc[0, COLUMNS[1:]], frame.loc[1, COLUMNS[1:]], check_names=False)


@pytest.mark.parametrize("label", [0, 1])
def test_class_with_one_label(label):
    logits, targets, patients = films()
    targets[:, 1] = label
    frame = classification_metrics(logits, targets, CLASSES, patients, n_replicates=20).set_index("class")
    undefined = ["auroc", "auroc_ci_low", "auroc_ci_high", "ap", "ap_ci_low", "ap_ci_high"]
    undefined.append("mean_probability_negatives" if label else "mean_probability_positives")
    assert list(frame.columns[frame.loc["Mass"].isna()]) == sorted(undefined, key=COLUMNS.index)
    assert frame.loc["Average"].notna().all()
    np.testing.assert_allclose(frame.loc["Average", "brier"], frame.loc[["Effusion", "No Finding"], "brier"].mean())
    np.testing.assert_allclose(frame.loc["Average (2 findings)", "auroc"], frame.loc["Effusion", "auroc"])


def test_no_class_with_both_labels_never_crashes():
    frame = classification_metrics([[1.0], [2.0]], [[1], [1]], ["Unhealthy"], ["a", "b"], n_replicates=5)
    assert frame.loc[1, COLUMNS[3:]].isna().all() and frame.loc[1, "n_positive"] == 0


def test_extreme_logits():
    """Sigmoids saturate, the order of the logits does not."""
    logits = np.array([[700.0], [699.0], [-699.0], [-700.0]])
    row = classification_metrics(logits, [[1], [0], [1], [0]], ["x"], [0, 1, 2, 3], n_replicates=20).loc[0]
    values = row[["auroc", "ap", "mean_probability", "brier", "ece"]].astype(float)
    np.testing.assert_allclose(values, [0.75, 5 / 6, 0.5, 0.5, 0.5], atol=1e-12)
    assert row["mean_probability_positives"] == row["mean_probability_negatives"] == 0.5


def test_constant_logits():
    row = classification_metrics(np.zeros((4, 1)), [[1], [0], [0], [0]], ["x"], [0, 1, 2, 3], n_replicates=20).loc[0]
    assert (row["auroc"], row["ap"], row["mean_probability"], row["brier"], row["ece"]) == (0.5, 0.25, 0.5, 0.25, 0.25)


def test_one_film_and_one_patient():
    frame = classification_metrics([[0.3, -2.0]], [[1, 0]], ["a", "b"], ["p"], n_replicates=5)
    assert frame["auroc"].isna().all() and frame.loc[:1, "mean_probability"].notna().all()
    logits, targets, _ = films()
    frame = classification_metrics(logits, targets, CLASSES, np.zeros(len(logits), dtype=int), n_replicates=5)
    assert frame["auroc"].notna().all()
    assert frame[[column for column in COLUMNS if "_ci_" in column]].isna().all(axis=None)


def test_tensors_and_seeds():
    logits, targets, patients = films()
    a = classification_metrics(torch.tensor(logits), torch.tensor(targets).float(), CLASSES, patients, 30, seed=1)
    pd.testing.assert_frame_equal(
        a, classification_metrics(logits, targets, CLASSES, patients, 30, seed=1), check_exact=True
    )
    assert (
        a["auroc_ci_low"] != classification_metrics(logits, targets, CLASSES, patients, 30, seed=2)["auroc_ci_low"]
    ).any()


def test_calibration_error_by_hand(monkeypatch):
    monkeypatch.setattr(metrics, "N_BINS", 2)
    probabilities = np.array([0.0, 0.05, 0.1, 0.45, 0.5, 1.0])
    with np.errstate(divide="ignore"):
        logits = np.clip(np.log(probabilities / (1 - probabilities)), -800, 800)[:, None]
    frame = classification_metrics(logits, [[0], [1], [1], [0], [1], [1]], ["x"], range(6), n_replicates=0)
    # Four films of mean 0.15 and frequency 0.5, two of 0.75 and 1: 0.5 belongs to the upper bin.
    assert frame["ece"][0] == pytest.approx((4 * 0.35 + 2 * 0.25) / 6)
    monkeypatch.setattr(metrics, "N_BINS", 7)
    logits, targets, patients = films(n=20)  # bins without a film
    for m, found in enumerate(classification_metrics(logits, targets, CLASSES, patients, n_replicates=0)["ece"][:3]):
        assert found == pytest.approx(reference.calibration_error(logits[:, m], targets[:, m], 7), abs=1e-12)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_several_seeds_are_scored_one_by_one(n_seeds):
    """The mean over seeds of each seed's metric, and the same of its replicates: not the metric of mean predictions."""
    _, targets, patients = tied_films(n=40, n_patients=12)
    generator = np.random.default_rng(4)
    seeds = np.round(generator.normal(size=(n_seeds, 40, 3)) + targets, 1)
    frame = classification_metrics(seeds, targets, CLASSES, patients, n_replicates=60, seed=5)
    alone = [classification_metrics(one, targets, CLASSES, patients, n_replicates=0) for one in seeds]
    columns = [column for column in COLUMNS[1:] if "_ci_" not in column]
    np.testing.assert_allclose(frame[columns], np.mean([one[columns] for one in alone], axis=0), atol=1e-12)
    drawn = statistics_reference.resampled_films(patients, 60, seed=5)
    for m in range(3):
        values = [
            np.mean([statistics_reference.auroc(one[chosen, m], targets[chosen, m]) for one in seeds])
            for chosen in drawn
        ]
        low, high = statistics_reference.percentile_interval(values)
        np.testing.assert_allclose(
            frame.loc[m, ["auroc_ci_low", "auroc_ci_high"]].astype(float), (low, high), atol=1e-12
        )
    if n_seeds == 1:
        single = classification_metrics(seeds[0], targets, CLASSES, patients, n_replicates=60, seed=5)
        pd.testing.assert_frame_equal(frame, single, check_exact=True)
    else:
        ensemble = classification_metrics(seeds.mean(axis=0), targets, CLASSES, patients, n_replicates=0)
        assert (ensemble["auroc"] > frame["auroc"] + 0.05).all()


def test_differences_of_several_seeds_are_those_of_their_means():
    logits, targets, patients = tied_films(n=60, n_patients=20)
    generator = np.random.default_rng(6)
    a, b = (logits + generator.normal(scale=0.7, size=(n, *logits.shape)) for n in (3, 2))
    frame = metric_differences(a, b, targets, CLASSES, patients, 40, seed=2)
    mine, others = (metric_intervals(seeds, targets, CLASSES, patients, 0) for seeds in (a, b))
    np.testing.assert_allclose(frame["point"], mine["point"] - others["point"], atol=1e-12)
    values = []
    for chosen in statistics_reference.resampled_films(patients, 40, seed=2):
        of = [np.mean([statistics_reference.auroc(z[chosen, 0], targets[chosen, 0]) for z in run]) for run in (a, b)]
        values.append(of[0] - of[1])
    row = frame.set_index(["class", "metric"]).loc[("Effusion", "auroc")]
    np.testing.assert_allclose((row["low"], row["high"]), statistics_reference.percentile_interval(values), atol=1e-12)


def test_calibrated_predictions_have_a_small_error():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20000, 1)) * 2
    targets = generator.random((20000, 1)) < 1 / (1 + np.exp(-logits))
    frame = classification_metrics(
        np.hstack([logits, logits + 2]), np.hstack([targets, targets]), ["a", "b"], range(20000), 0
    )
    assert frame["ece"][0] < 0.02
    assert frame["ece"][1] > 0.2
    np.testing.assert_allclose(frame["auroc"][0], frame["auroc"][1])


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (np.zeros((0, 1)), np.zeros((0, 1)), "empty"),
        (np.zeros((2, 1)), np.zeros((3, 1)), "shape"),
        ([[0.0], [np.inf]], [[0], [1]], "row 1, class 'x'"),
    ],
)
def test_bad_input_is_named(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(logits, targets, ["x"], list(range(len(logits))), n_replicates=2)


# AUROC and AP under weights, and their intervals


def tied_films(n=40, n_patients=15, seed=0, decimals=1):
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


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_ranking_equals_pairs_and_steps(seed, decimals):
    logits, targets, _ = tied_films(n=25, seed=seed, decimals=decimals)
    for m in range(3):
        a, p = single(logits[:, m], targets[:, m])
        np.testing.assert_allclose(a, statistics_reference.auroc(logits[:, m], targets[:, m]), atol=1e-12)
        np.testing.assert_allclose(p, statistics_reference.average_precision(logits[:, m], targets[:, m]), atol=1e-12)


@pytest.mark.parametrize("decimals", [0, 2])
def test_ranking_equals_sklearn_with_weights(decimals):
    generator = np.random.default_rng(0)
    logits, targets, _ = tied_films(n=300, decimals=decimals)
    integers = generator.poisson(1, size=(20, 300))
    fractions = generator.random((20, 300)) * (generator.random((20, 300)) < 0.7)
    for weights in (integers, fractions):
        a, p = ranking_metrics(logits[:, 0], targets[:, 0], weights, np.arange(300))
        for r, w in enumerate(weights):
            np.testing.assert_allclose(a[r], roc_auc_score(targets[:, 0], logits[:, 0], sample_weight=w), atol=1e-12)
            np.testing.assert_allclose(
                p[r], average_precision_score(targets[:, 0], logits[:, 0], sample_weight=w), atol=1e-12
            )


def test_ranking_is_the_same_in_small_blocks(monkeypatch):
    logits, targets, patients = tied_films(n=60)
    replicates = patient_replicates(patients, 50, seed=0)
    whole = ranking_metrics(logits[:, 0], targets[:, 0], replicates.counts, replicates.patient)
    monkeypatch.setattr(metrics, "BLOCK", 100)
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
    logits, targets, patients = tied_films(n=40, n_patients=12)
    targets[:, 1] = 0
    targets[patients == patients[0], 1] = (
        1  # all positives in one patient: undefined in about a third of the replicates
    )
    frame = metric_intervals(logits, targets, CLASSES, patients, n_replicates=60, seed=5).set_index(["class", "metric"])
    drawn = statistics_reference.resampled_films(patients, 60, seed=5)

    def all_metrics(chosen):
        rows = {}
        for m, name in enumerate(CLASSES):
            z, t = logits[chosen, m], targets[chosen, m]
            rows[name, "auroc"] = statistics_reference.auroc(z, t)
            rows[name, "ap"] = statistics_reference.average_precision(z, t)
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
        low, high = statistics_reference.percentile_interval(values)
        if key[1] == "ap" and key[0].startswith("Average"):  # the basic interval: the replicates lie above the point
            low, high = max(2 * point[key] - high, 0), min(2 * point[key] - low, 1)
        np.testing.assert_allclose((row["low"], row["high"]), (low, high), atol=1e-12)
        assert row["n_undefined"] == np.isnan(values).sum()
    assert frame.loc[("Mass", "auroc"), "n_undefined"] > 0
    assert frame.loc[("Mass", "mean_probability"), "n_undefined"] == 0


def test_metric_intervals_do_not_depend_on_the_order_of_films():
    logits, targets, patients = tied_films()
    order = np.random.default_rng(1).permutation(len(patients))
    a = metric_intervals(logits, targets, CLASSES, patients, 50, seed=0)
    b = metric_intervals(logits[order], targets[order], CLASSES, patients[order], 50, seed=0)
    pd.testing.assert_frame_equal(a, b, rtol=1e-12)
    pd.testing.assert_frame_equal(a, metric_intervals(logits, targets, CLASSES, patients, 50, seed=0), check_exact=True)


def test_class_with_one_label_is_undefined_and_not_averaged():
    logits, targets, patients = tied_films()
    targets[:, 0] = 0
    frame = metric_intervals(logits, targets, CLASSES, patients, 30).set_index(["class", "metric"])
    assert frame.loc[("Effusion", "auroc"), ["point", "low", "high"]].isna().all()
    assert frame.loc[("Effusion", "ap"), "n_undefined"] == 30
    assert frame.loc[("Effusion", "mean_probability"), ["point", "low", "high"]].notna().all()
    for metric in METRICS:
        points = frame.xs(metric, level="metric")["point"]
        np.testing.assert_allclose(points["Average"], (points["Mass"] + points["No Finding"]) / 2)
        np.testing.assert_allclose(points["Average (2 findings)"], points["Mass"])


def test_nothing_defined_is_nan_everywhere():
    frame = metric_intervals([[0.0], [1.0]], [[0], [0]], ["Unhealthy"], ["a", "b"], 10).set_index(["class", "metric"])
    assert frame.loc["Average"][["point", "low", "high"]].isna().all(axis=None)


def test_differences_of_two_runs_are_paired():
    logits, targets, patients = tied_films(n=200, n_patients=80, decimals=6)
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
        (
            {"logits": np.stack([np.zeros((4, 3)), np.full((4, 3), np.inf)])},
            "12 logits that are not finite; the first is inf in row 0, class 'a'",
        ),
        ({"logits": np.zeros((2, 3, 3))}, r"\(2, 3, 3\) and targets \(4, 3\)"),
        ({"targets": np.full((4, 3), 2)}, "12 targets other than 0 and 1; the first is 2 in row 0, class 'a'"),
    ],
)
def test_bad_predictions_are_named(change, message):
    inputs = {
        "logits": np.zeros((4, 3)),
        "targets": np.eye(4, 3),
        "classes": ["a", "b", "c"],
        "patients": list("abcd"),
    } | change
    with pytest.raises(ValueError, match=message):
        metric_intervals(**inputs, n_replicates=2)


# Coverage on clustered data: the truth is known


def test_coverage_of_the_auroc_over_patients():
    """Binormal scores with a patient effect; patients are positive or negative, so the true AUROC is Phi(d / sqrt(2
    v))."""
    generator = np.random.default_rng(1)
    shift, effect, noise = 1.0, 0.8, 0.6
    truth = norm.cdf(shift / np.sqrt(2 * (effect**2 + noise**2)))
    covered = 0
    for trial in range(200):
        patients = np.repeat(np.arange(120), generator.integers(1, 5, size=120))
        targets = (np.arange(120) < 40)[patients]
        logits = (
            shift * targets
            + effect * generator.normal(size=120)[patients]
            + noise * generator.normal(size=len(patients))
        )
        frame = metric_intervals(logits[:, None], targets[:, None], ["x"], patients, 200, seed=trial)
        covered += frame["low"][0] <= truth <= frame["high"][0]
    assert 0.89 <= covered / 200 <= 0.99


def test_coverage_of_the_paired_difference_of_average_precision():
    """Rare classes, where AP itself is biased upwards in the replicates: in the difference of two runs the bias
    cancels."""
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

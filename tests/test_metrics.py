import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from lib.analysis.metrics import COLUMNS, calibration_curve, classification_metrics
from lib.analysis.statistics import metric_intervals
from tests import reference_metrics as reference

CLASSES = ["Effusion", "Mass", "No Finding"]
AVERAGES = ["Average", "Average (2 findings)"]
PLAN = ["class", "n_positive", "n_negative", "prevalence", "auroc", "auroc_ci_low", "auroc_ci_high", "ap", "ap_ci_low", "ap_ci_high"]
PLAN += ["mean_probability", "mean_probability_ci_low", "mean_probability_ci_high"]
PLAN += ["mean_probability_positives", "mean_probability_negatives", "brier", "ece"]


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
            "mean_probability_negatives": reference.mean(value for value, target in zip(p, t, strict=True) if not target),
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


def test_intervals_are_those_of_the_statistics():
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
    pd.testing.assert_frame_equal(a, classification_metrics(logits, targets, CLASSES, patients, 30, seed=1), check_exact=True)
    assert (a["auroc_ci_low"] != classification_metrics(logits, targets, CLASSES, patients, 30, seed=2)["auroc_ci_low"]).any()


def test_calibration_curve():
    probabilities = np.array([0.0, 0.05, 0.1, 0.45, 0.5, 1.0])
    with np.errstate(divide="ignore"):
        logits = np.clip(np.log(probabilities / (1 - probabilities)), -800, 800)[:, None]
    curve = calibration_curve(logits, [[0], [1], [1], [0], [1], [1]], ["x"], n_bins=2)
    np.testing.assert_array_equal(curve["n"], [4, 2])  # 0.5 belongs to the upper bin
    np.testing.assert_allclose(curve["mean_probability"], [0.15, 0.75])
    np.testing.assert_allclose(curve["frequency"], [0.5, 1.0])
    assert list(curve.columns) == ["class", "bin", "bin_low", "bin_high", "n", "mean_probability", "frequency"]

    logits, targets, _ = films()
    curve = calibration_curve(logits, targets, CLASSES)
    assert (curve.groupby("class")["n"].sum() == len(logits)).all() and len(curve) == 45
    assert curve.loc[curve["n"] == 0, ["mean_probability", "frequency"]].isna().all(axis=None)
    ece = classification_metrics(logits, targets, CLASSES, range(len(logits)), n_replicates=0)["ece"][:3]
    gap = (curve["mean_probability"] - curve["frequency"]).abs().fillna(0) * curve["n"] / len(logits)
    np.testing.assert_allclose(ece, gap.groupby(curve["class"], sort=False).sum(), atol=1e-12)
    with pytest.raises(ValueError, match="n_bins"):
        calibration_curve(logits, targets, CLASSES, n_bins=0)


def test_calibrated_predictions_have_a_small_error():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20000, 1)) * 2
    targets = generator.random((20000, 1)) < 1 / (1 + np.exp(-logits))
    frame = classification_metrics(np.hstack([logits, logits + 2]), np.hstack([targets, targets]), ["a", "b"], range(20000), 0)
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

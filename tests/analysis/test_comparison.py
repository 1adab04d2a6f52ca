import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from lib.analysis import comparison
from lib.analysis.metrics import classification_metrics, metric_differences


def run(loss, seed=0, backbone="tdensenet", task="multilabel"):
    return {"task": task, "backbone": backbone, "loss": loss, "seed": seed}


def concepts(values, loss, seed=0, images="abc", **kind):
    """One record a film; films a and b are of one patient."""
    patients = ["1" if image in "ab" else "2" for image in images]
    return pd.DataFrame({"image": list(images), "patient": patients, "unique": values}).assign(
        **run(loss, seed, **kind)
    )


def predictions(loss, seed=0, n=60, shift=0.0, **kind):
    """Two classes on n films of n // 2 patients; the same films whatever the loss."""
    truth, noise = np.random.default_rng(0), np.random.default_rng((seed, len(loss)))
    targets = truth.integers(0, 2, (n, 2))
    logits = targets + noise.normal(0, 1.5, (n, 2)) + shift
    films = pd.DataFrame({"image": [f"{i:03d}" for i in range(n)], "patient": [str(i // 2) for i in range(n)]})
    parts = [
        films.assign(**{"class": name, "target": targets[:, m], "logit": logits[:, m]})
        for m, name in enumerate(["Mass", "Edema"])
    ]
    return pd.concat(parts, ignore_index=True).assign(**run(loss, seed, **kind))


# --- records of films


def test_means_of_every_run():
    records = pd.concat(
        [concepts([1, 2, 6], "focal"), concepts([2, 2, 2], "bce"), concepts([5, 5, 8], "bce", backbone="resnet50")]
    )
    table = comparison.record_means(records, ["unique"], ["image"], n_replicates=50)
    assert table[["backbone", "loss", "value"]].values.tolist() == [
        ["tdensenet", "focal", 3.0],
        ["tdensenet", "bce", 2.0],
        ["resnet50", "bce", 6.0],
    ]
    assert (table["n"] == 3).all() and (table["n_skipped"] == 0).all() and (table["seeds"] == 1).all()
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    assert table.loc[1, ["ci_low", "ci_high"]].tolist() == [2, 2]


def test_seeds_are_averaged_after_each_one_s_mean():
    records = pd.concat([concepts([1, 2, np.nan], "bce", 0), concepts([3, np.nan, np.nan], "bce", 1)])
    table = comparison.record_means(records, ["unique"], ["image"], n_replicates=0)
    # Means 1.5 and 3; the second seed leaves out two records.
    assert table.loc[0, ["value", "n", "n_skipped", "seeds"]].tolist() == [2.25, 1, 2, 2]


def test_differences_of_several_seeds():
    bce = pd.concat([concepts([1, 2, 6], "bce", seed) for seed in (0, 1)])
    focal = pd.concat(
        [concepts([2, 3, 7], "focal", 0), concepts([5, 6, 10], "focal", 1), concepts([1, 2, 6], "focal", 2)]
    )
    for records in (pd.concat([bce, focal]), pd.concat([focal, bce[bce["seed"] == 0]]).sample(frac=1, random_state=1)):
        table = comparison.record_differences(records, ["unique"], ["image"], n_replicates=30)
        values = table.loc[0, ["difference", "ci_low", "ci_high"]].astype(float)
        np.testing.assert_allclose(values, 5 / 3)  # (1 + 4 + 0) / 3, the same on every film


def test_seeds_with_records_of_different_films_are_refused():
    records = pd.concat([concepts([1, 2, 6], "bce", 0), concepts([1, 2], "bce", 1, images="ab")])
    with pytest.raises(ValueError, match="the seeds of multilabel-tdensenet-bce were evaluated on different films"):
        comparison.record_means(records, ["unique"], ["image"], n_replicates=0)
    frames = [predictions("bce", 0), predictions("bce", 1).query("image != '003'")]
    with pytest.raises(ValueError, match="the seeds of multilabel-tdensenet-bce were evaluated on different films"):
        comparison.prediction_metrics(pd.concat(frames), n_replicates=0)


def test_a_record_is_a_film_and_a_class():
    records = pd.DataFrame(
        {
            "image": ["a", "a", "b"],
            "patient": ["1", "1", "2"],
            "class": ["Mass", "Edema", "Mass"],
            "iobb": [0.2, 0.4, 0.9],
            "ior": [0.1, np.nan, 0.3],
        }
    )
    table = comparison.record_means(
        records.assign(**run("bce")), ["iobb", "ior"], ["image", "class"], n_replicates=0
    ).set_index("metric")
    assert table.loc["iobb", "value"] == pytest.approx(0.5) and table.loc["iobb", "n"] == 3
    assert table.loc["ior", "value"] == pytest.approx(0.2) and table.loc["ior", "n_skipped"] == 1


def test_differences_are_paired_with_bce_of_the_same_task_and_backbone():
    bce, focal = concepts([1, 2, 6], "bce"), concepts([3, 4, 8], "focal")
    other = concepts([0, 0, 3], "wbce", backbone="resnet50")  # no BCE run beside it
    records = pd.concat(
        [
            focal.sample(frac=1, random_state=0),
            bce,
            other,
            concepts([1, 2, 3], "bce", backbone="resnet50", task="binary"),
        ]
    )
    table = comparison.record_differences(records, ["unique"], ["image"], n_replicates=200)
    assert len(table) == 1
    assert table.loc[0, ["task", "backbone", "loss", "metric"]].tolist() == [
        "multilabel",
        "tdensenet",
        "focal",
        "unique",
    ]
    assert table.loc[0, ["difference", "ci_low", "ci_high"]].tolist() == [
        2,
        2,
        2,
    ]  # each film by 2: unpaired the interval would be wide


def test_an_undefined_record_leaves_its_pair_out():
    records = pd.concat([concepts([1, np.nan, 6], "bce"), concepts([2, 4, 9], "wbce")])
    assert (
        comparison.record_differences(records, ["unique"], ["image"], n_replicates=0).loc[0, "difference"] == 2
    )  # of films a and c


@pytest.mark.parametrize(("images", "values"), [("abd", [1, 2, 3]), ("ab", [1, 2]), ("abcd", [1, 2, 3, 4])])
def test_records_of_different_films_are_refused(images, values):
    records = pd.concat([concepts([1, 2, 6], "bce"), concepts(values, "focal", images=images)])
    with pytest.raises(
        ValueError, match="multilabel-tdensenet-focal and its BCE run were evaluated on different films"
    ):
        comparison.record_differences(records, ["unique"], ["image"], n_replicates=0)


# --- predictions


def test_arrays_of_one_run():
    frame = predictions("bce")
    logits, targets, classes, patients = comparison.prediction_arrays(
        frame.sample(frac=1, random_state=1).sort_values("class", ascending=False, kind="stable")
    )
    assert (
        classes == ["Mass", "Edema"]
        and logits.shape == (1, 60, 2)
        and logits.dtype == np.float64
        and targets.dtype == np.int64
    )
    for m, name in enumerate(classes):
        part = frame[frame["class"] == name].sort_values("image")
        assert logits[0, :, m].tolist() == part["logit"].tolist() and targets[:, m].tolist() == part["target"].tolist()
        assert patients.tolist() == part["patient"].tolist()


def test_seeds_are_scored_one_by_one():
    """The mean over seeds of each one's AUROC: that of their mean probability belongs to the ensemble."""
    frames = [predictions("bce", seed) for seed in (0, 1, 2)]
    logits, targets, classes, patients = comparison.prediction_arrays(pd.concat(frames))
    assert logits.shape == (3, 60, 2)
    table = comparison.prediction_metrics(pd.concat(frames), n_replicates=0).set_index("class")
    for m, name in enumerate(classes):
        scores = [roc_auc_score(targets[:, m], seed[:, m]) for seed in logits]
        assert table.loc[name, "auroc"] == pytest.approx(np.mean(scores), abs=1e-12)
        ensemble = roc_auc_score(targets[:, m], expit(logits[:, :, m]).mean(axis=0))
        assert ensemble > table.loc[name, "auroc"] + 0.02
    expected = classification_metrics(logits, targets, classes, patients, 0, 0)
    pd.testing.assert_frame_equal(table.reset_index()[expected.columns], expected)


def test_prediction_differences_of_several_seeds():
    frames = [predictions(loss, seed, shift=shift) for loss, shift in (("bce", 0), ("focal", 1)) for seed in (0, 1, 2)]
    frames = [frame for frame in frames if (frame["loss"][0], frame["seed"][0]) != ("bce", 2)]
    table = comparison.prediction_differences(pd.concat(frames), n_replicates=40).set_index("metric")
    average = [
        comparison.prediction_metrics(frame, n_replicates=0).set_index("class").loc["Average"] for frame in frames
    ]
    for metric in ("auroc", "ap", "mean_probability"):
        means = [np.mean([row[metric] for row in average if row["loss"] == loss]) for loss in ("focal", "bce")]
        assert table.loc[metric, "difference"] == pytest.approx(means[0] - means[1], abs=1e-12)
        assert table.loc[metric, "ci_low"] < table.loc[metric, "difference"] < table.loc[metric, "ci_high"]


def test_prediction_metrics_are_those_of_each_run():
    frames = [predictions("bce"), predictions("focal", shift=1)]
    table = comparison.prediction_metrics(pd.concat(frames), n_replicates=20)
    assert table["loss"].unique().tolist() == ["bce", "focal"]
    for frame in frames:
        logits, targets, classes, patients = comparison.prediction_arrays(frame)
        expected = classification_metrics(logits, targets, classes, patients, 20, 0)
        found = table[table["loss"] == frame["loss"][0]].reset_index(drop=True)
        pd.testing.assert_frame_equal(found[expected.columns], expected)


def test_prediction_differences_by_hand():
    bce, focal = predictions("bce"), predictions("focal", shift=1)
    table = comparison.prediction_differences(pd.concat([focal, bce]), n_replicates=50).set_index("metric")
    assert table["loss"].unique().tolist() == ["focal"]
    metrics = [
        comparison.prediction_metrics(frame, n_replicates=0).set_index("class").loc["Average"] for frame in (focal, bce)
    ]
    for metric in ("auroc", "ap", "mean_probability"):
        assert table.loc[metric, "difference"] == pytest.approx(metrics[0][metric] - metrics[1][metric])
        assert table.loc[metric, "ci_low"] <= table.loc[metric, "difference"] <= table.loc[metric, "ci_high"]
    logits, targets, classes, patients = comparison.prediction_arrays(focal)
    expected = metric_differences(logits, comparison.prediction_arrays(bce)[0], targets, classes, patients, 50, 0)
    expected = expected[expected["class"] == "Average"].set_index("metric")
    assert table["ci_low"].to_dict() == expected["low"].to_dict()


def test_a_run_equal_to_bce_differs_by_nothing():
    bce = predictions("bce")
    table = comparison.prediction_differences(pd.concat([bce, bce.assign(loss="wbce")]), n_replicates=30)
    assert len(table) == 3 and (table[["difference", "ci_low", "ci_high"]] == 0).all(axis=None)


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.assign(
            image=frame["image"].replace({"003": "999"})
        ),  # the same number of films, and the same targets
        lambda frame: frame[frame["image"] != "003"],
        lambda frame: frame[frame["class"] == "Mass"],
        lambda frame: frame.assign(target=1 - frame["target"]),
    ],
)
def test_predictions_of_different_films_are_refused(change):
    with pytest.raises(
        ValueError, match="multilabel-tdensenet-focal and its BCE run were evaluated on different films or classes"
    ):
        comparison.prediction_differences(pd.concat([predictions("bce"), change(predictions("focal"))]), n_replicates=0)


def test_no_bce_run_at_all():
    assert comparison.prediction_differences(predictions("focal"), n_replicates=0).empty
    assert comparison.record_differences(concepts([1, 2, 3], "focal"), ["unique"], ["image"], n_replicates=0).empty

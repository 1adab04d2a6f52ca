import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from lib.analysis import comparison
from lib.analysis.metrics import classification_metrics, metric_differences
from lib.analysis.statistics import patient_replicates


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


# --- effects, with the chance of training


def test_effects_of_records_against_a_loop():
    rng = np.random.default_rng(0)
    images = [f"{i:02d}" for i in range(24)]
    frames = []
    for loss, seeds in (("bce", 3), ("wbce", 2), ("focal", 1)):
        for seed in range(seeds):
            frame = pd.DataFrame({"image": images, "patient": [str(i // 2) for i in range(24)]})
            values = rng.normal(seed / 10 + (loss == "wbce"), 1, 24)
            values[rng.random(24) < 0.1] = np.nan
            frames.append(frame.assign(unique=values, **run(loss, seed)))
    records = pd.concat(frames, ignore_index=True)
    table = comparison.record_effects(records, ["unique"], ["image"], n_replicates=400).set_index("loss")
    assert set(table.index) == {"focal", "wbce"} and table["seeds"].to_dict() == {"wbce": True, "focal": False}

    wide = {
        loss: frame.pivot(index="image", columns="seed", values="unique") for loss, frame in records.groupby("loss")
    }
    patients = np.array([str(i // 2) for i in range(24)])
    replicates = patient_replicates(patients, 400, 0)
    weights = replicates.counts[:, replicates.patient].astype(float)
    for loss in ("wbce", "focal"):
        pairs = [(wide[loss][a] - wide["bce"][b]).to_numpy() for a in wide[loss] for b in wide["bce"]]
        point = np.mean([np.nanmean(pair) for pair in pairs])
        drawn = np.mean(
            [(weights * np.nan_to_num(one)).sum(1) / (weights * ~np.isnan(one)).sum(1) for one in pairs], axis=0
        )
        arms = (wide[loss], wide["bce"])
        seeds = sum(arm.mean().var(ddof=1) / arm.shape[1] for arm in arms) if loss == "wbce" else 0
        assert table.loc[loss, "point"] == pytest.approx(point)
        assert table.loc[loss, "se"] == pytest.approx(np.sqrt(drawn.var(ddof=1) + seeds))
        fewest = min(len(set(patients[~np.isnan(one)])) for one in pairs)
        assert table.loc[loss, ["n_seeds", "n_baseline", "n_patients"]].tolist() == [wide[loss].shape[1], 3, fewest]


def test_scores_of_the_same_networks_are_paired_seed_by_seed():
    rng = np.random.default_rng(3)
    frames = [
        pd.DataFrame({"image": list("abcdef"), "patient": list("aabbcc")}).assign(
            unique=rng.normal(3 * seed, 1, 6) + (loss == "bce") / 2, **run(loss, seed)
        )
        for loss in ("bce", "other_film")
        for seed in (0, 1, 2)
    ]
    records = pd.concat(frames, ignore_index=True)
    given = dict(n_replicates=300, baseline="other_film", paired=True)
    found = comparison.record_effects(records, ["unique"], ["image"], **given).iloc[0]
    wide = records.pivot(index=["patient", "image"], columns=["loss", "seed"], values="unique")
    apart = wide["bce"] - wide["other_film"]
    replicates = patient_replicates(np.repeat(list("abc"), 2), 300, 0)
    weights = replicates.counts[:, replicates.patient]
    drawn = (weights @ apart.to_numpy() / weights.sum(1)[:, None]).mean(axis=1)
    parts = drawn.var(ddof=1), apart.mean().var(ddof=1) / 3
    assert found["point"] == pytest.approx(apart.to_numpy().mean()) and found["se"] == pytest.approx(sum(parts) ** 0.5)
    df = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2)
    assert found["df"] == pytest.approx(min(df, 2)) and found["n_seeds"] == 3
    # The seeds lie far apart, and that is not their difference.
    alone = comparison.record_effects(records, ["unique"], ["image"], n_replicates=300, baseline="other_film")
    assert alone["se"].iloc[0] > 2 * found["se"]


def test_effects_of_predictions_against_scikit_learn():
    losses = [("bce", 0), ("bce", 1), ("wbce", 0), ("wbce", 1)]
    frames = {key: predictions(*key, shift=key[0] == "wbce") for key in losses}
    table = comparison.prediction_effects(pd.concat(frames.values()), n_replicates=60).set_index("metric")
    auroc = {
        key: np.mean([roc_auc_score(part["target"], part["logit"]) for _, part in frame.groupby("class")])
        for key, frame in frames.items()
    }
    by_hand = np.mean([auroc["wbce", s] for s in (0, 1)]) - np.mean([auroc["bce", s] for s in (0, 1)])
    assert table.loc["auroc", "point"] == pytest.approx(by_hand)
    probability = {key: expit(frame["logit"]).mean() for key, frame in frames.items()}
    by_hand = np.mean([probability["wbce", s] for s in (0, 1)]) - np.mean([probability["bce", s] for s in (0, 1)])
    assert table.loc["mean_probability", "point"] == pytest.approx(by_hand)
    between = sum((auroc[loss, 0] - auroc[loss, 1]) ** 2 / 2 for loss in ("bce", "wbce")) / 2
    assert table.loc["auroc", "se"] > np.sqrt(between) and table["seeds"].all() and (table["n_patients"] == 30).all()


def test_a_class_of_one_label_has_a_part_in_the_mean_probability_only():
    frames = [predictions(loss) for loss in ("bce", "wbce")]
    whole = comparison.prediction_effects(pd.concat(frames), n_replicates=20).set_index("metric")
    more = [
        pd.concat([one, one[one["class"] == "Mass"].assign(**{"class": "Hernia", "target": 0, "logit": logit})])
        for one, logit in zip(frames, (-1.0, 1.0))
    ]
    found = comparison.prediction_effects(pd.concat(more), n_replicates=20).set_index("metric")
    assert found.loc["auroc", "point"] == pytest.approx(whole.loc["auroc", "point"])
    rise = (2 * whole.loc["mean_probability", "point"] + expit(1) - expit(-1)) / 3
    assert found.loc["mean_probability", "point"] == pytest.approx(rise)


def test_effects_of_one_seed_and_of_runs_on_other_films():
    records = pd.concat([concepts([1, 2, 6], "focal"), concepts([2, 2, 2], "bce")])
    table = comparison.record_effects(records, ["unique"], ["image"], n_replicates=50)
    assert not table["seeds"].item() and table["se"].item() > 0
    alone = concepts([1, 2, 6], "focal", backbone="resnet50")
    assert not len(comparison.record_effects(alone, ["unique"], ["image"], n_replicates=50))
    other = pd.concat([concepts([1, 2, 6], "focal", images="abd"), concepts([2, 2, 2], "bce")])
    with pytest.raises(ValueError, match="multilabel-tdensenet-focal and its BCE run were evaluated on different"):
        comparison.record_effects(other, ["unique"], ["image"], n_replicates=50)
    other = pd.concat([predictions("bce"), predictions("wbce", n=58)])
    with pytest.raises(ValueError, match="multilabel-tdensenet-wbce and its BCE run were evaluated on different"):
        comparison.prediction_effects(other, n_replicates=5)
    alone = pd.concat([concepts([1, np.nan, np.nan], "focal"), concepts([2, 2, 2], "bce")])
    found = comparison.record_effects(alone, ["unique"], ["image"], n_replicates=50)
    assert found["point"].item() == -1 and np.isnan(found["se"].item()) and found["n_patients"].item() == 1
    empty = pd.concat([concepts([np.nan] * 3, "focal"), concepts([2, 2, 2], "bce")])
    found = comparison.record_effects(empty, ["unique"], ["image"], n_replicates=50)
    assert found[["point", "se"]].isna().all(axis=None)


def test_a_control_in_the_place_of_bce():
    runs = pd.concat([concepts([1, 2, 6], "bce"), concepts([3, 4, 5], "focal")])
    control = pd.concat([concepts([0, 2, 1], "bce"), concepts([9, 9, 9], "focal")])
    frame = comparison.with_control(runs, control, "untrained")
    assert sorted(set(frame["loss"])) == ["bce", "untrained"] and len(frame) == 6
    found = comparison.record_effects(frame, ["unique"], ["image"], n_replicates=50, baseline="untrained")
    assert found["loss"].item() == "bce" and found["point"].item() == pytest.approx(3 - 1)
    other = comparison.with_control(runs, concepts([0, 2, 1], "bce", images="abd"), "untrained")
    with pytest.raises(
        ValueError, match="multilabel-tdensenet-bce and its control untrained were evaluated on different"
    ):
        comparison.record_effects(other, ["unique"], ["image"], n_replicates=50, baseline="untrained")


def test_scores_elsewhere_take_the_place_of_the_scores():
    table = pd.DataFrame(
        {
            "image": ["a"],
            "iobb": [0.2],
            "iobb_other": [0.1],
            "hit": [1.0],
            "hit_other": [0.0],
            "empty": 0,
            "iou_tuned": 0.7,
        }
    )
    found = comparison.elsewhere(table)
    assert found.loc[0, ["iobb", "hit", "empty"]].tolist() == [0.1, 0.0, 0] and table["iobb"].item() == 0.2
    assert np.isnan(found["iou_tuned"].item())  # its threshold is of the film's own boxes


def test_what_chance_alone_changes_is_every_pair_of_bce_seeds():
    frames = {(loss, seed): predictions(loss, seed) for loss in ("bce", "focal") for seed in (0, 1, 2)}
    averages = comparison.seed_records(pd.concat(frames.values()))
    assert len(averages) == 6
    for (loss, seed), frame in frames.items():
        auroc = np.mean([roc_auc_score(part["target"], part["logit"]) for _, part in frame.groupby("class")])
        row = averages[(averages["loss"] == loss) & (averages["seed"] == seed)].iloc[0]
        assert row["auroc"] == pytest.approx(auroc)
        assert row["mean_probability"] == pytest.approx(expit(frame["logit"]).mean())
    null = comparison.seed_differences(averages, ["auroc"])
    assert null[["seed", "other"]].values.tolist() == [[0, 1], [0, 2], [1, 2]]
    bce = averages[averages["loss"] == "bce"].set_index("seed")["auroc"]
    np.testing.assert_allclose(null["difference"], [bce[1] - bce[0], bce[2] - bce[0], bce[2] - bce[1]])
    assert not len(comparison.seed_differences(averages[averages["seed"] == 0], ["auroc"]))

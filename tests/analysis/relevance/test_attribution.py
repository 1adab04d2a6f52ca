import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lib.analysis.pairs import box_pairs
from lib.analysis.relevance import attribution
from lib.analysis.relevance.attribution import (
    conservation_summary,
    iou_by_training,
    iou_differences,
    iou_means,
    pair_heatmaps,
    training_status,
)
from lib.analysis.relevance.heatmaps import conservation
from lib.analysis.statistics import mean_interval, paired_difference
from tests.analysis import reference_localization
from tests.analysis.relevance.small_study import CLASSES, SIZE, N, batches, made_up, slow_map

THRESHOLDS = (0.1, 0.3, 0.5)
COLUMNS = """image patient class method threshold iou_lesion iou_background mean_iou empty_mask_iou box_area mask_area
    logit stable layer cam_method rounding init""".split()


def attribute(*given, **options):
    return attribution.attribute(*given, **options).iou


def unit(signed):
    positive = np.maximum(signed, 0)
    return positive / positive.max() if positive.max() > 0 else positive


# --- IoU


@pytest.mark.parametrize("options", [{}, {"rounding": "trunc", "inclusive": False, "init": "logit"}])
def test_ious_equal_a_loop_over_pairs(study, options):
    model, *_, pairs, _ = study
    table = attribute(model, batches(study), pairs, layer="trunk", image_size=SIZE, thresholds=THRESHOLDS, **options)
    assert list(table.columns) == COLUMNS
    keys = [
        (p.image, p[4], method, t) for p in pairs.itertuples() for method in ("cam", "lrp", "rap") for t in THRESHOLDS
    ]
    assert (
        list(table[["image", "class", "method", "threshold"]].itertuples(index=False, name=None)) == keys
    )  # in the order of the pairs
    rounding, init = options.get("rounding", "outward"), options.get("init", "one")
    assert (table[["layer", "cam_method", "rounding", "init"]] == ["trunk", "cam", rounding, init]).all(axis=None)
    by_key = {(p.image, p[4]): p for p in pairs.itertuples()}
    for row in table.itertuples():
        pair = by_key[row.image, row[3]]
        expected = reference_localization.hard_ious(
            unit(slow_map(study, pair, row.method, init)),
            pair.boxes,
            row.threshold,
            rounding,
            options.get("inclusive", True),
        )
        np.testing.assert_allclose([row.iou_lesion, row.iou_background, row.mean_iou], expected, rtol=1e-12)
        assert (
            row.patient == pair.patient
            and row.box_area == reference_localization.drawn(pair.boxes, SIZE, rounding).mean()
        )
        with torch.no_grad():
            assert row.logit == pytest.approx(
                model(study[1][[study[2].index.get_loc(pair.row)]])[0, pair.output].item(), rel=1e-4, abs=1e-5
            )


@pytest.mark.parametrize("size", [1, 2, N])
def test_ious_do_not_depend_on_batches_or_order(study, size):
    model, *_, pairs, _ = study
    options = {"layer": "trunk", "image_size": SIZE}
    expected = attribute(model, batches(study), pairs, **options)
    found = attribute(model, batches(study, size, np.random.default_rng(size).permutation(N)), pairs, **options)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)
    turned = pairs.iloc[::-1]
    found = attribute(model, batches(study), turned, **options)
    key = ["image", "class", "method", "threshold"]
    pd.testing.assert_frame_equal(
        found.sort_values(key, ignore_index=True), expected.sort_values(key, ignore_index=True), rtol=1e-4
    )
    assert found["image"].iloc[0] == pairs["image"].iloc[-1]


def test_no_more_films_at_once_than_a_batch_has(study, monkeypatch):
    model, *_, pairs, _ = study
    seen = []
    monkeypatch.setattr(
        attribution, "heatmaps", lambda model, films, *a, **k: seen.append(len(films)) or made_up(model, films, *a, **k)
    )
    attribute(model, batches(study, 2), pairs, layer="trunk", image_size=SIZE, methods=["lrp"])
    assert max(seen) == 2 and sum(seen) == len(pairs)


def test_boxes_one_by_one_and_missing_films(study):
    model, _, films, pairs, boxes = study
    single = box_pairs(films, boxes, CLASSES, unit="box")
    options = {"layer": "trunk", "image_size": SIZE, "methods": ["rap"], "thresholds": [0.5]}
    table = attribute(model, batches(study), single, **options)
    assert len(table) == len(boxes) == len(pairs) + 1 and table.columns[3] == "box"
    assert iou_means(table, n_replicates=0)["n"].tolist() == table.groupby("class", sort=False).size().tolist() * 2
    absent = pairs.assign(row=pairs["row"] + 1000)
    assert len(attribute(model, batches(study), absent, **options)) == 0
    assert list(attribute(model, batches(study), absent, **options)) == list(
        attribute(model, batches(study), pairs, **options)
    )


def test_wrong_requests_are_refused_before_the_work(study):
    model, _, films, pairs, boxes = study

    def never():
        raise AssertionError("a batch was asked for")
        yield

    options = {"layer": "trunk", "image_size": SIZE}
    with pytest.raises(ValueError, match="no pair of film and class .*BBox_List_2017.csv"):
        attribute(model, never(), pairs.head(0), **options)
    with pytest.raises(ValueError, match=r"methods are \['cam', 'gradcam'\]; choose from cam, lrp, rap"):
        attribute(model, never(), pairs, methods=["cam", "gradcam"], **options)
    with pytest.raises(ValueError, match="choose from"):
        attribute(model, never(), pairs, methods=[], **options)
    headless = nn.Sequential(model.trunk, nn.Flatten(), nn.Linear(4 * 36, 3))
    with pytest.raises(ValueError, match="Sequential has no linear layer `head` .* choose methods lrp and rap"):
        pair_heatmaps(headless, never(), pairs, **options)
    assert len(attribute(headless, batches(study), pairs, methods=["lrp", "rap"], **options)) == 10 * len(pairs)
    with pytest.raises(ValueError, match="the model has no module 'trunk.last'"):
        attribute(model, batches(study), pairs, layer="trunk.last", image_size=SIZE)
    with pytest.raises(ValueError, match="layer trunk.second is not the one that the head pools"):
        attribute(model, batches(study), pairs, layer="trunk.second", image_size=SIZE)


def test_maps_to_look_at(study):
    model, *_, pairs, _ = study
    chosen = pairs.iloc[[6, 0, 3]]
    maps, probabilities = pair_heatmaps(
        model, batches(study, 3), chosen, layer="trunk", image_size=SIZE, methods=("rap", "cam", "lrp")
    )
    assert (
        maps.shape == (3, 3, SIZE, SIZE)
        and maps.dtype == np.float32
        and (maps[:, 0] < 0).any()
        and (maps[:, 1] >= 0).all()
    )
    for k, pair in enumerate(chosen.itertuples()):
        for m, method in enumerate(("rap", "cam", "lrp")):
            np.testing.assert_allclose(maps[k, m], slow_map(study, pair, method), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            logit = model(study[1][[study[2].index.get_loc(pair.row)]])[0, pair.output].double()
        assert probabilities[k] == pytest.approx(torch.sigmoid(logit).item(), rel=1e-5)
    absent, none = pair_heatmaps(model, batches(study), chosen.assign(row=-1), layer="trunk", image_size=SIZE)
    assert not absent.any() and np.isnan(none).all()


def test_a_refused_map_has_no_value_and_is_counted(study, monkeypatch):
    """A map that `heatmaps` refuses is NaN all over; a map that merely holds a NaN is a fault and stays one."""
    model, images, films, pairs, _ = study
    refused = pairs.iloc[[4, 7]]
    hidden = [images[films.index.get_loc(row)] for row in refused["row"]]

    def some_refused(model, films, classes, method="lrp", **options):
        maps = made_up(model, films, classes, method, **options).detach()
        for k, film in enumerate(films):
            if method == "rap" and any(torch.equal(film, other) for other in hidden):
                maps[k] = torch.nan
        return maps

    options = {"layer": "trunk", "image_size": SIZE, "thresholds": THRESHOLDS}
    whole = attribute(model, batches(study), pairs, **options)
    assert whole["stable"].all() and iou_means(whole, n_replicates=0)["n_unstable"].eq(0).all()
    monkeypatch.setattr(attribution, "heatmaps", some_refused)
    table = attribute(model, batches(study), pairs, **options)
    gone = (table["method"] == "rap") & table["image"].isin(refused["image"])
    assert gone.sum() == 2 * len(THRESHOLDS) and (table["stable"] == ~gone).all()
    of_map = ["iou_lesion", "iou_background", "mean_iou", "mask_area"]
    assert table.loc[gone, of_map].isna().all(axis=None)
    expected = whole.assign(stable=~gone)
    expected.loc[gone, of_map] = np.nan
    pd.testing.assert_frame_equal(table, expected)
    means = iou_means(table, n_replicates=0)
    assert means.loc[means["method"] == "rap", "n_unstable"].sum() == 2 * len(THRESHOLDS) * 2
    assert (means["n_unstable"] <= means["n_skipped"]).all() and (
        means.query("method != 'rap'")["n_unstable"] == 0
    ).all()
    paired = iou_differences(table, n_replicates=0).groupby("method")["n"].sum()
    assert paired["lrp"] - paired["rap"] == 2 * len(THRESHOLDS) * 2
    maps, probabilities = pair_heatmaps(model, batches(study), pairs, layer="trunk", image_size=SIZE)
    expected = np.zeros(maps.shape[:2], bool)
    expected[[4, 7], 2] = True
    assert (np.isnan(maps).all((2, 3)) == expected).all() and (np.isnan(maps).any((2, 3)) == expected).all()
    assert np.isfinite(probabilities).all()

    def with_a_hole(*args, **options):
        maps = made_up(*args, **options).detach()
        maps[0, 0, 0] = torch.nan
        return maps

    monkeypatch.setattr(attribution, "heatmaps", with_a_hole)
    with pytest.raises(ValueError, match=r"map \[0\] holds NaN"):
        attribute(model, batches(study), pairs, **options)


def test_conservation_in_short(study):
    model, *_, pairs, _ = study
    batch = next(iter(batches(study, 4, np.arange(2, N))))
    short = conservation_summary(model, batch, pairs, batchnorm="merge")
    classes = torch.tensor([pairs.loc[pairs["row"] == row, "output"].iloc[0] for row in batch.rows.tolist()])
    assert list(short.index) == ["lrp", "rap"]
    for method, row in short.iterrows():
        frame = conservation(model, batch.images, classes, method, batchnorm="merge")
        assert row.tolist() == [frame["layer"].nunique(), frame["ratio"].min(), frame["ratio"].max()]
    with pytest.raises(ValueError, match="no pair of film and class"):
        conservation_summary(model, batch, pairs.head(0))


def test_films_seen_in_training():
    split = pd.Series({"a": "train", "b": "val", "c": "test", "d": "test"})
    images = pd.Series(["c", "a", "b", "a", "elsewhere"], index=range(5, 10))
    told = training_status(images, split)
    assert told.tolist() == ["not seen", "trained on", "chosen on", "trained on", "not seen"]
    assert told.index.equals(images.index)
    listed = {"chexnet_train_list": ["c"], "chexnet_val_list": {"a"}}
    assert training_status(images, split, listed).tolist() == [
        "trained on",
        "chosen on",
        "not seen",
        "chosen on",
        "not seen",
    ]
    del listed["chexnet_train_list"]  # then nobody knows of the films on neither list
    assert training_status(images, split, listed).tolist() == [
        "unknown",
        "chosen on",
        "unknown",
        "chosen on",
        "unknown",
    ]
    assert training_status(images, split, {}).eq("unknown").all()


def test_means_by_training(records):
    status = records["image"].map(lambda image: "trained on" if int(image[:-4]) < 10 else "not seen")
    found = iou_by_training(records, status, n_replicates=0)
    assert set(found["class"]) == {f"{said}, {name}" for said in ("trained on", "not seen") for name in CLASSES[:2]}
    row = found.query("`class` == 'trained on, Effusion' and method == 'lrp' and threshold == 0.1").set_index("reading")
    part = records[status.eq("trained on") & records["class"].eq("Effusion") & records["method"].eq("lrp")]
    part = part[part["threshold"] == 0.1]
    assert row.loc["iou_lesion", "value"] == pytest.approx(part["iou_lesion"].mean()) and row["n"].tolist() == [5, 5]


def test_with_the_true_relevance(study, monkeypatch):
    monkeypatch.undo()
    model, *_, pairs, _ = study
    options = {"layer": "trunk", "image_size": SIZE}
    maps, _ = pair_heatmaps(model, batches(study), pairs, methods=("lrp", "rap"), **options)
    np.testing.assert_allclose(
        maps.sum(axis=(2, 3)), 1, rtol=1e-3
    )  # relevance 1 at the logit is conserved, whatever the logit's sign
    table = attribute(model, batches(study), pairs, **options)
    assert (table["logit"] < 0).any() and len(table) == 15 * len(pairs) and table["mean_iou"].between(0, 1).all()
    lrp = table[(table["method"] == "lrp") & (table["threshold"] == 0.1)]["mask_area"]
    np.testing.assert_array_equal(
        lrp, [(attribution.positive_part(torch.from_numpy(m)) >= 0.1).double().mean() for m in maps[:, 0]]
    )


# --- means


@pytest.fixture
def records():
    """As of `attribute`, with undefined values: 30 pairs of 12 patients, 2 classes, 3 methods, 2 thresholds."""
    rng = np.random.default_rng(5)
    frames = []
    for k in range(30):
        area = rng.uniform(0.02, 0.3)
        for method in ("cam", "lrp", "rap"):
            for threshold in (0.1, 0.5):
                frames.append(
                    (
                        f"{k}.png",
                        str(k % 12),
                        CLASSES[k % 2],
                        method,
                        threshold,
                        rng.random(),
                        rng.random(),
                        (1 - area) / 2,
                    )
                )
    table = pd.DataFrame(
        frames, columns=["image", "patient", "class", "method", "threshold", "iou_lesion", "mean_iou", "empty_mask_iou"]
    )
    table.loc[[3, 40, 41], "mean_iou"] = np.nan
    return table.assign(stable=table.index != 40)


def test_means_by_class_method_and_threshold(records):
    means = iou_means(records, n_replicates=60, seed=2)
    assert len(means) == 2 * 2 * 3 * 2 and means["n_skipped"].sum() == 3
    assert means.groupby("reading")["n_unstable"].sum().tolist() == [1, 1]  # of both readings: the map has none
    for row in means.itertuples():
        part = records[
            (records["class"] == row[2]) & (records["method"] == row.method) & (records["threshold"] == row.threshold)
        ]
        everyone = records.assign(
            v=records[row.reading].where(records.index.isin(part.index))
        )  # the draws are over all patients
        expected = mean_interval(everyone["v"], everyone["patient"], 60, 2)
        assert (row.value, row.ci_low, row.ci_high, row.n) == pytest.approx(
            (expected.point, expected.low, expected.high, expected.n)
        )
        floor = part.loc[part["mean_iou"].notna(), "empty_mask_iou"].mean() if row.reading == "mean_iou" else 0
        assert row.floor == pytest.approx(floor, abs=1e-12) and row.gain == pytest.approx(row.value - floor)
        gains = mean_interval(
            everyone["v"] - (records["empty_mask_iou"] if row.reading == "mean_iou" else 0), everyone["patient"], 60, 2
        )
        assert (row.gain_low, row.gain_high) == pytest.approx((gains.low, gains.high))
    with pytest.raises(ValueError, match="0.png Atelectasis cam 0.1 is in the table more than once"):
        iou_means(pd.concat([records, records.head(1)]), n_replicates=0)


def test_paired_differences_to_cam(records):
    shuffled = records.sample(frac=1, random_state=0)
    found = iou_differences(shuffled, n_replicates=60, seed=2)
    assert len(found) == 2 * 2 * 2 * 2 and set(found["method"]) == {"lrp", "rap"}
    for row in found.itertuples():

        def values(method, row=row):
            part = records[(records["method"] == method) & (records["threshold"] == row.threshold)]
            return part[row.reading].where(part["class"] == row[2]).to_numpy()

        patients = records[(records["method"] == "cam") & (records["threshold"] == row.threshold)]["patient"]
        expected = paired_difference(values(row.method), values("cam"), patients, 60, 2)
        assert (row.difference, row.ci_low, row.ci_high, row.n) == pytest.approx(
            (expected.point, expected.low, expected.high, expected.n)
        )
    assert found["n"].min() < 15
    with pytest.raises(ValueError, match="no method 'cam'; it has lrp, rap"):
        iou_differences(records[records["method"] != "cam"], n_replicates=0)
    with pytest.raises(ValueError, match="more than once"):
        iou_differences(pd.concat([records, records]), n_replicates=0)
    assert len(iou_differences(records[records["method"] == "cam"], n_replicates=0)) == 0

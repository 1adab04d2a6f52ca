"""Place of the evidence and controls of relevance: against loops over pairs, CAM's own table, and known cases."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from lib.analysis.alignment import align
from lib.analysis.inference import stream
from lib.analysis.pairs import with_other_boxes
from lib.analysis.place import by_chance, iou_columns, place_scores, tuned_iou
from lib.analysis.relevance import attribution, sanity
from lib.analysis.relevance.attribution import attribute, pair_heatmaps
from lib.analysis.statistics import mean_interval
from tests.analysis import reference_cam, reference_localization
from tests.analysis.relevance.small_study import SIZE, N, batches, made_up, slow_map
from tests.toys import quartered

SIGNED = {"layer": "trunk", "image_size": SIZE, "rectify": False}
OPTIONS = {"layer": "trunk", "image_size": SIZE}
METHODS = ("cam", "lrp", "rap")


def signed(study, pair, method):
    """The signed map of one pair at film size, float64; CAM with what the rectifier would cut away."""
    if method != "cam":
        return slow_map(study, pair, method)
    model, images, films, *_ = study
    with torch.no_grad():
        maps = model.trunk(images[[films.index.get_loc(pair.row)]])[0]
    head = reference_cam.pooled_head(model.head.weight.detach(), model.head.bias.detach())
    return reference_localization.resized(reference_cam.raw_map(maps, head, pair.output, "cam"), SIZE)


@pytest.fixture
def tables(study):
    model, *_, pairs, _ = study
    pairs = with_other_boxes(pairs)
    return pairs, attribute(model, batches(study, 2), pairs, **OPTIONS).place


# --- the place of the evidence


def test_place_equals_a_loop_over_pairs(study, tables):
    pairs, place = tables
    columns = (
        "image patient class method box_area empty hit auprc iou_tuned hit_chance auprc_chance hit_other auprc_other"
    )
    assert list(place) == [*columns.split(), "logit", "stable", "layer", "cam_method", "rounding", "init"]
    assert len(place) == 3 * len(pairs) and place["stable"].all()
    rows = iter(place.itertuples())
    for pair in pairs.itertuples():
        for method, row in zip(METHODS, rows, strict=False):
            assert (row.image, row[3], row.method) == (pair.image, pair[4], method)
            map_ = signed(study, pair, method)
            assert row.empty == (map_.max() <= 0)
            for boxes, hit, auprc in ((pair.boxes, row.hit, row.auprc), (pair.other, row.hit_other, row.auprc_other)):
                inside = reference_localization.drawn(boxes, SIZE, "outward").astype(bool)
                top = map_ > map_.max() - 1e-6 * np.ptp(map_)
                assert hit == pytest.approx(inside[top].mean())
                assert auprc == pytest.approx(average_precision_score(inside.ravel(), map_.ravel()), abs=2e-3)
            area = reference_localization.drawn(pair.boxes, SIZE, "outward").mean()
            chance = by_chance((6, 6), [pair.boxes], SIZE).iloc[0] if method == "cam" else (area, area)
            assert row.box_area == area and (row.hit_chance, row.auprc_chance) == pytest.approx(tuple(chance))


def test_the_threshold_is_tuned_by_method(study, tables):
    pairs, place = tables
    for method in ("lrp", "rap"):  # CAM is scaled at its own size, see below
        rows = place[place["method"] == method]
        ious = [
            place_scores(signed(study, pair, method)[None], [pair.boxes], SIZE)[iou_columns()].iloc[0]
            for pair in pairs.itertuples()
        ]
        np.testing.assert_allclose(rows["iou_tuned"], tuned_iou(ious, pairs["patient"]), atol=2e-3)
    assert place.groupby("method")["iou_tuned"].mean().nunique() == 3


def test_cams_place_is_that_of_the_alignment_table(study, tables):
    model, *_ = study
    pairs, place = tables
    found = align(stream(model, batches(study), ["trunk"]), pairs, model.head, **OPTIONS)
    mine = place[place["method"] == "cam"].set_index(["image", "class"])
    other = found.set_index(["image", "class"]).loc[mine.index]
    for column in ("empty", "hit", "auprc", "iou_tuned", "hit_other", "auprc_other"):
        np.testing.assert_allclose(mine[column], other[column], rtol=1e-6, err_msg=column)


def test_an_empty_map_and_a_refused_one(study, monkeypatch):
    model, images, films, pairs, _ = study
    first, second = pairs["row"].unique()[:2]

    def some(model, films_, classes, method="lrp", **options):
        maps = made_up(model, films_, classes, method, **options).detach()
        for k, film in enumerate(films_):
            if torch.equal(film, images[films.index.get_loc(first)]):
                maps[k] = -1 - maps[k].abs()
            if torch.equal(film, images[films.index.get_loc(second)]):
                maps[k] = torch.nan
        return maps

    monkeypatch.setattr(attribution, "heatmaps", some)
    place = attribute(model, batches(study), pairs, methods=["rap"], **OPTIONS).place
    row = place["image"].map(films.reset_index().set_index("image")["index"])
    assert (place["empty"].eq(1) == (row == first)).all() and (place["stable"] == (row != second)).all()
    scores = place[["empty", "hit", "auprc", "iou_tuned"]]
    assert scores[row == second].isna().all(axis=None) and scores[row != second].notna().all(axis=None)
    assert "hit_other" not in place  # no other boxes were given
    assert sanity.place_means(place, n_replicates=0)["n_unstable"].eq((row == second).sum()).all()


# --- means and differences


def test_means_by_method_and_score(tables):
    _, place = tables
    place.loc[[3, 4], "auprc"] = np.nan
    means = sanity.place_means(place, n_replicates=50, seed=1)
    assert len(means) == 12 and means["n_skipped"].sum() == 2
    for row in means.itertuples():
        part = place[place["method"] == row.method]
        expected = mean_interval(part[row.score], part["patient"], 50, 1)
        assert (row.value, row.ci_low, row.ci_high, row.n) == pytest.approx(
            (expected.point, expected.low, expected.high, expected.n)
        )
        chance = part[f"{row.score}_chance"].mean() if row.score in ("hit", "auprc") else np.nan
        assert row.chance == pytest.approx(chance, nan_ok=True)


# --- maps held against each other


def test_signed_maps(study):
    model, *_, pairs, _ = study
    chosen = pairs.iloc[[6, 0, 3]]
    maps, _ = pair_heatmaps(model, batches(study, 3), chosen, methods=("rap", "cam"), **SIGNED)
    assert maps.shape == (3, 2, SIZE, SIZE) and (maps[:, 1] < 0).any()
    for k, pair in enumerate(chosen.itertuples()):
        for m, method in enumerate(("rap", "cam")):
            np.testing.assert_allclose(maps[k, m], signed(study, pair, method), rtol=1e-5, atol=1e-5)


def test_likeness_of_maps_pair_by_pair(study):
    *_, pairs, _ = study
    few = pairs.iloc[:4]
    one, other, third = (np.random.default_rng(k).normal(size=(4, 2, 16, 16)).astype(np.float32) for k in range(3))
    other[1, 0] = np.nan
    found = sanity.map_likeness(one, {"a seed": [other, third], "a backbone": [third]}, few, ("cam", "lrp"))
    assert list(found) == ["against", "method", "image", "class", "patient", "ssim", "rank"] and len(found) == 24
    assert found[["ssim", "rank"]].isna().all(axis=1).tolist() == [False, True] + 22 * [False]
    expected = [
        [spearmanr(one[k, m].ravel(), maps[k, m].ravel())[0] for k in range(4)]
        for maps in (other, third, third)
        for m in range(2)
    ]
    np.testing.assert_allclose(found["rank"], np.ravel(expected), atol=1e-12)
    assert found["image"].tolist() == 6 * few["image"].tolist()
    means = sanity.likeness_means(found, n_replicates=40).set_index(["against", "method"])
    assert means["n"].tolist() == [7, 8, 4, 4] and means["n_skipped"].tolist() == [1, 0, 0, 0]
    part = found[(found["against"] == "a seed") & (found["method"] == "cam")]
    expected = mean_interval(part["rank"], part["patient"], 40)
    row = means.loc[("a seed", "cam")]
    assert (row["rank"], row["rank_low"]) == pytest.approx((expected.point, expected.low))
    expected = mean_interval(part["rank"].abs(), part["patient"], 40)
    assert (row["abs_rank"], row["abs_rank_high"]) == pytest.approx((expected.point, expected.high))
    assert row["ssim"] == pytest.approx(part["ssim"].mean())
    assert not len(sanity.map_likeness(one, {"a seed": []}, few))


def test_randomised_from_the_head_down_to_the_fresh_network(study, monkeypatch):
    monkeypatch.undo()
    model, *_, pairs, _ = study
    fresh, few, films = quartered(4, seed=9), pairs.iloc[:4], batches(study)
    before = copy.deepcopy(model.state_dict())
    maps, alike = sanity.randomised(model, fresh, films, few, **OPTIONS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    np.testing.assert_array_equal(maps, pair_heatmaps(model, films, few, **SIGNED)[0])
    stages = list(dict.fromkeys(alike["against"]))
    assert stages[:2] == ["none", "head"] and len(stages) > 3 and stages[-1] == "another film"
    np.testing.assert_allclose(alike.loc[alike["against"] == "none", ["ssim", "rank"]], 1)
    last = alike[alike["against"] == stages[-2]].reset_index(drop=True)
    random = pair_heatmaps(fresh, films, few, **SIGNED)[0]
    expected = sanity.map_likeness(maps, {stages[-2]: [random]}, few)
    pd.testing.assert_frame_equal(last, expected)
    assert (last["rank"] < 0.999).all()
    elsewhere = alike[alike["against"] == stages[-1]].reset_index(drop=True)
    expected = sanity.map_likeness(maps, {stages[-1]: [random[[3, 0, 1, 2]]]}, few)
    pd.testing.assert_frame_equal(elsewhere, expected)
    _, same = sanity.randomised(model, model, films, few, methods=["cam"], **OPTIONS)
    np.testing.assert_allclose(same.loc[same["against"] != stages[-1], ["ssim", "rank"]], 1)


def test_maps_that_are_turned_over_are_alike_and_cancel():
    """The mean of the signed correlation calls a network's maps forgotten that are the same, red for blue, for half of
    the films."""
    maps = np.random.default_rng(0).normal(size=(4, 1, 16, 16)).astype(np.float32)
    few = pd.DataFrame({"image": list("abcd"), "class": "Mass", "patient": list("abcd")})
    turned = maps * np.array([1, -1, 1, -1], np.float32)[:, None, None, None]
    alike = sanity.map_likeness(maps, {"random": [turned]}, few, ["lrp"])
    means = sanity.likeness_means(alike, n_replicates=20).iloc[0]
    assert means["rank"] == pytest.approx(0, abs=1e-12) and means["abs_rank"] == pytest.approx(1)


def test_no_batch_is_lost(study):
    """The films of a study in more batches than pairs of one."""
    model, *_, pairs, _ = study
    whole = pair_heatmaps(model, batches(study, N), pairs, **SIGNED)[0]
    np.testing.assert_allclose(pair_heatmaps(model, batches(study, 1), pairs, **SIGNED)[0], whole, rtol=1e-4, atol=1e-4)

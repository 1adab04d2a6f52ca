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
from lib.analysis.place import iou_columns, place_scores, tuned_iou
from lib.analysis.relevance import attribution, sanity
from lib.analysis.relevance.attribution import attribute, pair_heatmaps
from lib.analysis.statistics import mean_interval, paired_difference
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
    columns = "image patient class method box_area empty hit auprc iou_tuned hit_other auprc_other logit stable layer"
    assert list(place) == [*columns.split(), "cam_method", "rounding", "init"]
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
            assert row.box_area == reference_localization.drawn(pair.boxes, SIZE, "outward").mean()


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
        chance = part["box_area"].mean() if row.score in ("hit", "auprc") else np.nan
        assert row.chance == pytest.approx(chance, nan_ok=True)


def test_differences_to_cam_to_an_untrained_network_and_to_other_boxes(study, tables):
    pairs, place = tables
    bare = attribute(quartered(4, seed=9), batches(study), pairs.drop(columns="other"), **OPTIONS).place
    place.loc[4, "auprc"] = np.nan
    found = sanity.place_differences(place, bare.sample(frac=1, random_state=0), n_replicates=50, seed=1)
    assert found.groupby("against").size().to_dict() == {"cam": 8, "untrained": 12, "other_film": 6}
    by = {method: place[place["method"] == method].reset_index(drop=True) for method in METHODS}
    for row in found.itertuples():
        mine = by[row.method]
        other = {
            "cam": by["cam"][row.score],
            "untrained": bare[bare["method"] == row.method][row.score],
            "other_film": mine.get(f"{row.score}_other"),
        }[row.against]
        expected = paired_difference(mine[row.score], other, mine["patient"], 50, 1)
        assert (row.difference, row.ci_low, row.ci_high, row.n) == pytest.approx(
            (expected.point, expected.low, expected.high, expected.n), nan_ok=True
        )
    with pytest.raises(ValueError, match="the same pairs and methods"):
        sanity.place_differences(place, bare.iloc[1:], n_replicates=0)
    with pytest.raises(ValueError, match="see with_other_boxes"):
        sanity.place_differences(bare, bare, n_replicates=0)


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
    assert stages[:2] == ["none", "head"] and len(stages) > 2
    np.testing.assert_allclose(alike.loc[alike["against"] == "none", ["ssim", "rank"]], 1)
    last = alike[alike["against"] == stages[-1]].reset_index(drop=True)
    expected = sanity.map_likeness(maps, {stages[-1]: [pair_heatmaps(fresh, films, few, **SIGNED)[0]]}, few)
    pd.testing.assert_frame_equal(last, expected)
    assert (last["rank"] < 0.999).all()
    _, same = sanity.randomised(model, model, films, few, methods=["cam"], **OPTIONS)
    np.testing.assert_allclose(same[["ssim", "rank"]], 1)


# --- the bar


def differences(lows):
    rows = [("untrained", method, "auprc", low + 0.05, low, low + 0.1, 30) for method, low in lows.items()]
    rows += [("untrained", method, "hit", -1, -2, -0.5, 30) for method in lows]
    return pd.DataFrame(rows, columns="against method score difference ci_low ci_high n".split())


def stages(ranks):
    rows = [
        (stage, method, rank)
        for method, values in ranks.items()
        for stage, rank in zip(("none", "head", "trunk.a"), values)
    ]
    return pd.DataFrame(rows, columns=["against", "method", "rank"])


def test_the_bar():
    ranks = {"cam": (1, 0.4, 0.1), "lrp": (1, 0.9, 0.8), "rap": (1, 0.9, 0.5), "none": (1, np.nan, np.nan)}
    lows = {"cam": 0.01, "lrp": 0.01, "rap": 0.0, "none": np.nan}
    bar = sanity.bar(differences(lows), stages(ranks)).set_index("method")
    assert bar["untrained"].to_dict() == {"cam": "passes", "lrp": "passes", "rap": "fails", "none": "unknown"}
    assert bar["random"].to_dict() == {"cam": "passes", "lrp": "fails", "rap": "passes", "none": "unknown"}
    assert bar["fails"].to_dict() == {"cam": False, "lrp": True, "rap": True, "none": False}
    assert bar["forgotten"].to_dict() == {"cam": "head", "lrp": "", "rap": "trunk.a", "none": ""}
    assert bar.loc["cam", ["gain", "gain_low", "gain_high", "n", "rank"]].tolist() == pytest.approx(
        [0.06, 0.01, 0.11, 30, 0.1]
    )


def test_no_batch_is_lost(study):
    """The films of a study in more batches than pairs of one."""
    model, *_, pairs, _ = study
    whole = pair_heatmaps(model, batches(study, N), pairs, **SIGNED)[0]
    np.testing.assert_allclose(pair_heatmaps(model, batches(study, 1), pairs, **SIGNED)[0], whole, rtol=1e-4, atol=1e-4)

import numpy as np
import pandas as pd
import pytest
import torch

from lib.analysis.metrics import classification_metrics
from lib.analysis.relevance import attribution
from lib.analysis.relevance.attribution import pair_heatmaps
from lib.analysis.relevance.heatmaps import heatmaps
from lib.analysis.relevance.regions import (
    agreed_pairs,
    box_gaps,
    film_kinds,
    film_regions,
    heatmaps_by_model,
    intention_pairs,
    model_auroc,
    relevance_shares,
    relevance_shares_by_region,
    resized_masks,
    share_means,
    shares_by_model,
)
from lib.models import both_sides, build_model
from lib.tables import nam_lee
from tests.analysis import reference_localization
from tests.analysis.relevance.small_study import SIZE, batches, made_up, slow_map


def test_shares_equal_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(4, 7, 5)).astype(np.float32)
    maps[2] = -np.abs(maps[2])
    regions = {"first": rng.random(maps.shape) < 0.3, "second": rng.random(maps.shape) < 0.6}
    regions["first"][3] = False
    table = relevance_shares(torch.from_numpy(maps), regions)
    assert list(table.columns) == ["pair", "region", "share", "area", "enrichment"]
    assert table["pair"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and table["region"].tolist() == ["first", "second"] * 4
    for row in table.itertuples():
        inside = total = pixels = 0.0
        for y in range(7):
            for x in range(5):
                value = max(float(maps[row.pair, y, x]), 0.0)
                total += value
                inside += value * regions[row.region][row.pair, y, x]
                pixels += regions[row.region][row.pair, y, x] / 35
        assert row.area == pytest.approx(pixels)
        if total == 0 or pixels == 0:
            assert np.isnan(row.share) and np.isnan(row.enrichment)
        else:
            assert (row.share, row.enrichment) == pytest.approx((inside / total, inside / total / pixels), rel=1e-6)
    assert table["share"].isna().sum() == 3


def test_shares_of_parts_add_up_and_do_not_depend_on_scale():
    rng = np.random.default_rng(1)
    maps = rng.normal(size=(3, 9, 9))
    mask = rng.random(maps.shape) < 0.4
    table = relevance_shares(maps, {"in": mask, "out": ~mask})
    np.testing.assert_allclose(table.groupby("pair")[["share", "area"]].sum(), 1, rtol=1e-12)
    for scale in (1e-12, 1e6):
        np.testing.assert_allclose(
            relevance_shares(maps * scale, {"in": mask, "out": ~mask})["share"], table["share"], rtol=1e-12
        )
    flat = relevance_shares(np.ones((1, 9, 9)), {"in": mask[:1]})
    assert flat["enrichment"][0] == pytest.approx(1)  # a map without preference
    with pytest.raises(ValueError, match=r"region 'in' has shape \(1, 9, 9\), the maps \(3, 9, 9\)"):
        relevance_shares(maps, {"in": mask[:1]})
    with pytest.raises(ValueError, match=r"map \[0\] holds NaN"):
        relevance_shares(maps * np.nan, {"in": mask})
    with pytest.raises(ValueError, match="need maps"):
        relevance_shares(maps[0], {"in": mask})


def test_film_regions():
    lungs = np.zeros((2, 8, 8), bool)
    lungs[:, 2:6, 2:6] = True
    regions = film_regions([np.array([[4, 4, 8, 8.0]]), np.empty((0, 4))], 8, lungs)
    assert list(regions) == ["boxes", "lungs", "outside"]
    assert [mask.sum(axis=(1, 2)).tolist() for mask in regions.values()] == [[16, 0], [16, 16], [64 - 28, 48]]
    assert not (regions["outside"] & (regions["boxes"] | regions["lungs"])).any()
    assert list(film_regions([[]], 8)) == ["boxes", "outside"] and film_regions([[]], 8)["outside"].all()
    with pytest.raises(ValueError, match=r"lungs have shape \(2, 8, 8\); they must be \(1, 8, 8\)"):
        film_regions([[]], 8, lungs)


@pytest.fixture
def films_of_two_kinds(study):
    """Four films, the normal ones without boxes."""
    films = study[2]
    return pd.DataFrame(
        {
            "row": films.index[[8, 0, 2, 5]],
            "image": films["image"].iloc[[8, 0, 2, 5]].to_numpy(),
            "patient": list("abba"),
            "output": 1,
            "kind": ["normal", "normal", "pneumonia", "pneumonia"],
            "boxes": [np.empty((0, 4)), np.empty((0, 4)), np.array([[1, 2, 9, 9.0]]), np.array([[3, 3, 20, 20.0]])],
        }
    )


def test_shares_by_region_keep_the_films_names(study, films_of_two_kinds):
    model, some = study[0], films_of_two_kinds
    table = relevance_shares_by_region(model, batches(study, 4), some, layer="", image_size=SIZE)
    assert list(table.columns) == [
        "row",
        "image",
        "patient",
        "output",
        "kind",
        "method",
        "logit",
        "stable",
        "region",
        "share",
        "area",
        "enrichment",
    ]
    assert len(table) == 4 * 2 * 2 and table["row"].tolist() == np.repeat(some["row"], 4).tolist()
    assert (
        table["method"].tolist() == ["lrp", "lrp", "rap", "rap"] * 4
        and table["region"].tolist() == ["boxes", "outside"] * 8
    )
    for row in table.itertuples():
        pair = next(p for p in some.itertuples() if p.row == row.row)
        positive, mask = (
            np.maximum(slow_map(study, pair, row.method), 0),
            reference_localization.drawn(pair.boxes, SIZE),
        )
        expected = (positive * mask).sum() / positive.sum()
        if row.region == "boxes" and row.kind == "normal":
            assert np.isnan(row.share) and row.area == 0
        else:
            assert row.share == pytest.approx(expected if row.region == "boxes" else 1 - expected, rel=1e-6)
    means = share_means(table, ["kind", "method", "region"], n_replicates=50)
    assert len(means) == 8 and means.query("kind == 'normal' and region == 'boxes'")["n_skipped"].tolist() == [2, 2]
    assert table["stable"].all() and (means["n_unstable"] == 0).all()


def test_lungs_are_those_of_each_film(study, films_of_two_kinds):
    model, some = study[0], films_of_two_kinds
    lungs = np.random.default_rng(0).random((4, SIZE, SIZE)) < [[[0.2]], [[0.4]], [[0.6]], [[0.8]]]
    table = relevance_shares_by_region(model, batches(study, 3), some, lungs, layer="", image_size=SIZE)
    assert table["region"].unique().tolist() == ["boxes", "lungs", "outside"]
    found = table[table["region"] == "lungs"].set_index(["row", "method"])
    for k, pair in enumerate(some.itertuples()):
        for method in ("lrp", "rap"):
            positive = np.maximum(slow_map(study, pair, method), 0)
            row = found.loc[(pair.row, method)]
            assert row["area"] == pytest.approx(lungs[k].mean())
            assert row["share"] == pytest.approx(positive[lungs[k]].sum() / positive.sum(), rel=1e-6)
    with pytest.raises(ValueError, match="one mask a film at its size"):
        relevance_shares_by_region(model, batches(study), some, lungs[:, 1:], layer="", image_size=SIZE)


def test_refused_maps_have_no_share_and_are_counted(study, films_of_two_kinds, monkeypatch):
    model, some = study[0], films_of_two_kinds

    def rap_refused(model, films, classes, method="lrp", **options):
        maps = made_up(model, films, classes, method, **options).detach()
        return maps * (torch.nan if method == "rap" else 1)

    monkeypatch.setattr(attribution, "heatmaps", rap_refused)
    table = relevance_shares_by_region(model, batches(study, 4), some, layer="", image_size=SIZE)
    rap = table["method"] == "rap"
    assert (table["stable"] == ~rap).all() and table.loc[rap, ["share", "enrichment"]].isna().all(axis=None)
    assert table.loc[rap, "area"].tolist() == table.loc[~rap, "area"].tolist()
    means = share_means(table, ["kind", "method"], n_replicates=0).set_index(["kind", "method"])
    assert means.loc[("pneumonia", "rap"), ["n", "n_skipped", "n_unstable"]].tolist() == [0, 4, 4]
    assert means.loc[("normal", "lrp"), ["n", "n_skipped", "n_unstable"]].tolist() == [2, 2, 0]


def test_models_one_by_one(study, films_of_two_kinds):
    model, some = study[0], films_of_two_kinds
    models = {"a": (model, "trunk"), "b": (model, "trunk")}
    options = {"image_size": SIZE, "methods": ("cam", "rap"), "init": "logit"}
    shares = shares_by_model(models, lambda: batches(study, 4), some, **options)
    one = relevance_shares_by_region(model, batches(study, 4), some, layer="trunk", **options)
    for name in models:
        part = shares[shares["model"] == name].drop(columns="model").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, one)
    maps, probabilities = heatmaps_by_model(models, lambda: batches(study, 4), some, **options)
    expected, known = pair_heatmaps(model, batches(study, 4), some, layer="trunk", **options)
    assert maps.shape == (4, 2, 2, SIZE, SIZE) and probabilities.shape == (4, 2)
    for k in range(2):
        assert np.array_equal(maps[:, k], expected) and np.array_equal(probabilities[:, k], known)


# --- the films of the question


def test_what_each_film_is_asked():
    films = pd.DataFrame(
        {
            "image": list("abcde"),
            "patient": list("vwxyz"),
            "labels": ["Pneumonia", "No Finding", "No Finding", "Pneumonia", "No Finding"],
            "detail": ["Lung Opacity", "Normal", "No Lung Opacity / Not Normal", "Lung Opacity", "Normal"],
        },
        index=[7, 3, 4, 1, 0],
    )
    kinds = film_kinds(films)
    assert kinds.tolist() == ["pneumonia", "normal", "No Lung Opacity / Not Normal", "pneumonia", "normal"]
    boxes = pd.DataFrame([("a", 1, 2, 3, 4), ("a", 5, 6, 7, 8)], columns=["image", "x1", "y1", "x2", "y2"])
    pairs = intention_pairs(films.assign(kind=kinds), boxes)
    assert list(pairs) == ["row", "image", "patient", "kind", "output", "boxes"]
    assert pairs["row"].tolist() == [7, 3, 1, 0] and pairs["output"].tolist() == [0, 1, 0, 1]
    assert [part.shape for part in pairs["boxes"]] == [(2, 4), (0, 4), (0, 4), (0, 4)]
    assert pairs["boxes"][0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_films_that_all_models_get_right_come_first():
    pairs = pd.DataFrame({"row": [4, 2, 9, 5, 7, 1], "kind": ["normal", "pneumonia"] * 3})
    rows, targets = [9, 7, 5, 4, 2, 1], np.array([[0], [0], [1], [0], [1], [1]])
    logits = {
        "a": np.array([[-1.0], [1], [1], [-1], [-1], [1]]),  # right on 9, 5, 4, 1
        "b": np.array([[-1.0], [-1], [-1], [-1], [-1], [1]]),  # right on 9, 7, 4, 1
    }
    shown = agreed_pairs(pairs, rows, logits, targets)
    assert shown["kind"].tolist() == ["pneumonia"] * 2 + ["normal"] * 2
    assert shown["row"].tolist() == [1, 5, 4, 9] and shown["agree"].tolist() == [2, 1, 2, 2]
    assert agreed_pairs(pairs, rows, logits, targets, count=1)["row"].tolist() == [1, 4]


def test_auroc_of_each_model_as_table_1_takes_it():
    rng = np.random.default_rng(0)
    targets, patients = rng.integers(0, 2, (60, 1)), np.arange(60) // 2
    logits = {name: rng.normal(size=(60, 1)) + k * targets for k, name in enumerate(("vgg16", "chexnet"))}
    found = model_auroc(logits, targets, ["Pneumonia"], patients, n_replicates=40)
    assert list(found) == ["model", "class", "value", "ci_low", "ci_high", "n"] and found["n"].eq(60).all()
    for row in found.itertuples():
        one = classification_metrics(logits[row.model], targets, ["Pneumonia"], patients, n_replicates=40).iloc[0]
        assert (row.value, row.ci_low, row.ci_high) == (one["auroc"], one["auroc_ci_low"], one["auroc_ci_high"])
    table = nam_lee.table1(found, data_label="made up").set_index("model")
    assert table.loc[["vgg16", "chexnet"], "value"].tolist() == found["value"].tolist()


def test_masks_at_the_models_size():
    mask = np.zeros((8, 8), bool)
    mask[:4, :3] = True  # of the second column of 4 x 4 pixels half, of its right neighbour nothing
    smaller = resized_masks([mask, ~mask], 4)
    assert smaller.dtype == bool and smaller.shape == (2, 4, 4)
    assert smaller[0].tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2
    assert smaller[1].tolist() == [[False, True, True, True]] * 2 + [[True] * 4] * 2  # halves count for both


def test_means_of_shares_against_area():
    rng = np.random.default_rng(0)
    area = rng.uniform(0.1, 0.4, 40)
    shares = pd.DataFrame(
        {"patient": np.arange(40) % 15, "model": ["vgg16", "resnet50"] * 20, "share": area + 0.1, "area": area}
    ).assign(stable=np.arange(40) != 5)
    shares.loc[[0, 5], "share"] = np.nan
    means = share_means(shares, ["model"], n_replicates=80)
    assert (
        means["model"].tolist() == ["vgg16", "resnet50"]
        and means["n"].tolist() == [19, 19]
        and means["n_skipped"].tolist() == [1, 1]
        and means["n_unstable"].tolist() == [0, 1]
    )
    np.testing.assert_allclose(
        means[["gain", "gain_low", "gain_high"]], 0.1, rtol=1e-9
    )  # the same on every film, so no interval
    for row in means.itertuples():
        part = shares[(shares["model"] == row.model)].dropna(subset="share")
        assert (row.value, row.area) == pytest.approx((part["share"].mean(), part["area"].mean()))
        assert row.enrichment == pytest.approx(row.value / row.area) and row.ci_low < row.value < row.ci_high


def test_box_gaps_are_differences_film_by_film():
    rng = np.random.default_rng(0)
    rows = [
        {
            "model": model,
            "kind": "pneumonia",
            "method": "rap",
            "patient": f"p{film // 2}",
            "row": film,
            "region": region,
            "enrichment": rng.uniform(0, 3) if film or region != "boxes" else np.nan,
        }
        for model in ("a", "b")
        for film in range(8)
        for region in ("boxes", "lungs", "outside")
    ]
    shares = pd.DataFrame(rows)
    gaps = box_gaps(shares, ["model", "kind", "method"], n_replicates=40)
    for gap in gaps.itertuples():
        mine = shares[(shares["model"] == gap.model) & (shares["row"] > 0)].set_index(["row", "region"])["enrichment"]
        expected = np.mean([mine[film, "boxes"] - mine[film, "lungs"] for film in range(1, 8)])
        assert np.isclose(gap.gap, expected) and gap.gap_low <= gap.gap <= gap.gap_high and gap.n == 7
    assert len(gaps) == 2
    assert not len(box_gaps(shares[shares["region"] != "lungs"], ["model"], n_replicates=5))


def test_rap_is_the_same_for_both_sides_of_a_logit_and_lrp_is_not():
    """Eq. 4 starts from the absolute contributions; what 08 says of normal films rests on it."""
    model = both_sides(build_model("tdensenet", 1, seed=2).eval())
    films = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sides = {
        method: [heatmaps(model, films, torch.tensor([side]), method) for side in (0, 1)] for method in ("lrp", "rap")
    }
    assert torch.allclose(*sides["rap"], atol=1e-6 * sides["rap"][0].abs().max().item())
    assert (sides["lrp"][0] - sides["lrp"][1]).abs().max() > 0.05 * sides["lrp"][0].abs().max()

from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lib.analysis.pairs import box_pairs
from lib.analysis.relevance import attribution, heatmaps
from lib.analysis.relevance.attribution import (
    attribute,
    box_gaps,
    film_regions,
    iou_differences,
    iou_means,
    look,
    pair_heatmaps,
    relevance_shares,
    share_means,
)
from lib.analysis.statistics import mean_interval, paired_difference
from lib.data.batches import Batch
from tests.analysis import reference_cam, reference_localization

SIZE, CLASSES, N = 24, ["Atelectasis", "Effusion", "Mass"], 9
THRESHOLDS = (0.1, 0.3, 0.5)


class Small(nn.Module):
    """A classifier of 24 px films with 4 maps of 6 x 6."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            OrderedDict(
                first=nn.Conv2d(3, 4, 5, stride=2, padding=2),
                second=nn.Conv2d(4, 4, 3, stride=2, padding=1),
                relu=nn.ReLU(),
            )
        )
        self.head = nn.Linear(4, len(CLASSES))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, films):
        return self.head(self.trunk(films).mean((2, 3)))


def made_up(model, films, classes, method="lrp", *, init="one"):
    """Signed maps that depend on the film, the class, the method and nothing else."""
    assert not model.training and len(films) == len(classes) and init in ("one", "logit")
    weight = {"lrp": 1.0, "rap": -0.7}[method] * (1 + classes.double()) * (2 if init == "logit" else 1)
    return (films.double().sum(1) * weight[:, None, None] + films.double()[:, 0].square() - 1).float().requires_grad_()


@pytest.fixture
def study(monkeypatch):
    """Model, images, films, pairs. Films 0 and 1 have no box; film 2 has several classes and one of two boxes."""
    monkeypatch.setattr(attribution, "heatmaps", made_up)
    rng = np.random.default_rng(3)
    films = pd.DataFrame(
        {"image": [f"{i:08d}_000.png" for i in range(N)], "patient": [str(i // 2) for i in range(N)]},
        index=rng.permutation(50)[:N],
    )
    named = [(2, "Mass"), (2, "Mass"), (2, "Effusion"), (2, "Atelectasis")] + [(k, CLASSES[k % 3]) for k in range(3, N)]
    corner, extent = rng.uniform(-2, 14, (len(named), 2)), rng.uniform(4, 12, (len(named), 2))
    boxes = pd.DataFrame(
        [(films["image"].iloc[k], name, *a, *(a + b)) for (k, name), a, b in zip(named, corner, extent)],
        columns=["image", "class", "x1", "y1", "x2", "y2"],
    )
    images = torch.from_numpy(rng.normal(size=(N, 3, SIZE, SIZE)).astype(np.float32))
    return Small().eval(), images, films, box_pairs(films, boxes, CLASSES), boxes


def batches(study, size=4, order=None):
    _, images, films, *_ = study
    order = np.arange(N) if order is None else order
    for k in range(0, N, size):
        yield Batch(torch.from_numpy(films.index.to_numpy()[order[k : k + size]]), images[order[k : k + size]], None)


def slow_map(study, pair, method, init="one"):
    """The signed map of one pair, float64, at film size."""
    model, images, films, *_ = study
    film = images[[films.index.get_loc(pair.row)]]
    if method != "cam":
        return made_up(model, film, torch.tensor([pair.output]), method, init=init)[0].detach().double().numpy()
    with torch.no_grad():
        maps = model.trunk(film)[0]
    head = reference_cam.pooled_head(model.head.weight.detach(), model.head.bias.detach())
    return reference_localization.resized(np.maximum(reference_cam.raw_map(maps, head, pair.output, "cam"), 0), SIZE)


def unit(signed):
    positive = np.maximum(signed, 0)
    return positive / positive.max() if positive.max() > 0 else positive


# --- IoU


@pytest.mark.parametrize("options", [{}, {"rounding": "trunc", "inclusive": False, "init": "logit"}])
def test_ious_equal_a_loop_over_pairs(study, options):
    model, *_, pairs, _ = study
    table = attribute(model, batches(study), pairs, layer="trunk", image_size=SIZE, thresholds=THRESHOLDS, **options)
    assert list(table.columns) == [
        "image",
        "patient",
        "class",
        "method",
        "threshold",
        "iou_lesion",
        "iou_background",
        "mean_iou",
        "empty_mask_iou",
        "box_area",
        "mask_area",
        "logit",
        "layer",
        "cam_method",
        "rounding",
        "init",
    ]
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
        look(model, never(), pairs, None, methods=[], **options)
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


# --- where the relevance lies


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


def test_look_carries_the_films_names_and_counts_shares(study):
    model, _, films, _, _ = study
    some = pd.DataFrame(
        {
            "row": films.index[[8, 0, 2, 5]],
            "image": films["image"].iloc[[8, 0, 2, 5]].to_numpy(),
            "patient": list("abba"),
            "output": 1,
            "kind": ["normal", "normal", "pneumonia", "pneumonia"],
            "boxes": [np.empty((0, 4)), np.empty((0, 4)), np.array([[1, 2, 9, 9.0]]), np.array([[3, 3, 20, 20.0]])],
        }
    )
    table = look(
        model, batches(study, 4), some, lambda part: film_regions(part["boxes"], SIZE), layer="", image_size=SIZE
    )
    assert list(table.columns) == [
        "row",
        "image",
        "patient",
        "output",
        "kind",
        "method",
        "logit",
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
    return table


def test_means_by_class_method_and_threshold(records):
    means = iou_means(records, n_replicates=60, seed=2)
    assert len(means) == 2 * 2 * 3 * 2 and means["n_skipped"].sum() == 3
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


def test_means_of_shares_against_area():
    rng = np.random.default_rng(0)
    area = rng.uniform(0.1, 0.4, 40)
    shares = pd.DataFrame(
        {"patient": np.arange(40) % 15, "model": ["vgg16", "resnet50"] * 20, "share": area + 0.1, "area": area}
    )
    shares.loc[[0, 5], "share"] = np.nan
    means = share_means(shares, ["model"], n_replicates=80)
    assert (
        means["model"].tolist() == ["vgg16", "resnet50"]
        and means["n"].tolist() == [19, 19]
        and means["n_skipped"].tolist() == [1, 1]
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
    from lib.models import both_sides, build_model

    model = both_sides(build_model("tdensenet", 1, seed=2).eval())
    films = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sides = {
        method: [heatmaps.heatmaps(model, films, torch.tensor([side]), method) for side in (0, 1)]
        for method in ("lrp", "rap")
    }
    assert torch.allclose(*sides["rap"], atol=1e-6 * sides["rap"][0].abs().max().item())
    assert (sides["lrp"][0] - sides["lrp"][1]).abs().max() > 0.05 * sides["lrp"][0].abs().max()

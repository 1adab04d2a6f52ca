import copy

import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
import torch

from lib.analysis.alignment import align, pair_cams, summary
from lib.analysis.dissection.concepts import concept_records, dissect
from lib.analysis.inference import Output, stream
from lib.analysis.localization import METRICS, Metric
from lib.analysis.pairs import box_pairs, with_other_boxes
from lib.analysis.place import by_chance, place_scores
from lib.analysis.statistics import mean_interval, paired_difference
from tests.analysis import reference_cam, reference_localization
from tests.analysis.dissection import reference_dissection
from tests.toys import batches, film_table, quartered

SIZE, CLASSES = 40, ["Atelectasis", "Effusion", "Mass"]
N = 17  # more films than dissect reads back at a time


@pytest.fixture(scope="module")
def study():
    """Model with maps of 10 x 10 whose channel 5 is dead, images, films (rows that are not 0..N-1), boxes in film
    pixels."""
    model = quartered(6, seed=0)
    model.trunk.second.bias.data[5] = -1e3
    rng = np.random.default_rng(3)
    films = film_table(rng, N, 100)
    rows = []
    for image in films["image"]:
        for name in rng.choice(
            [*CLASSES, "Hernia"], 2, replace=True
        ):  # Hernia is no output; a class may have two boxes
            x, y = rng.uniform(-3, 30, 2)
            w, h = rng.uniform(3, 18, 2)
            rows.append((image, name, x, y, x + w, y + h))
    boxes = pd.DataFrame(
        [*rows, ("unknown.png", "Mass", 1, 1, 9, 9)], columns=["image", "class", "x1", "y1", "x2", "y2"]
    )
    return model, torch.from_numpy(rng.normal(size=(N, 3, SIZE, SIZE)).astype(np.float32)), films, boxes


def outputs(study, size=5, order=None, layers=("trunk",)):
    model, images, films, _ = study
    return stream(model, batches(images, size, order, films.index), list(layers))


def shifted(given, bias):
    for output in given:
        yield Output(output.rows, output.logits + bias, output.maps)


def moved(head, bias):
    """The head with another bias."""
    head = copy.deepcopy(head).requires_grad_(False)
    head.bias += bias
    return head


def flipped(head):
    head = copy.deepcopy(head).requires_grad_(False)
    head.weight.copy_(head.weight.flip(0))
    return head


def native(study, position):
    model, images, _, _ = study
    with torch.no_grad():
        return model.trunk(images[position : position + 1])[0]


def scaled(raw):
    raw = np.maximum(raw, 0)
    return (raw - raw.min()) / (raw.max() - raw.min()) if raw.max() > raw.min() else np.zeros_like(raw)


def film_boxes(study):
    _, _, films, boxes = study
    return {
        row: boxes.loc[boxes["image"] == image, ["x1", "y1", "x2", "y2"]].to_numpy()
        for row, image in films["image"].items()
    }


# --- pairs


def test_pairs_are_every_film_and_class_with_boxes(study):
    _, _, films, boxes = study
    pairs = box_pairs(films, boxes, CLASSES)
    expected = {}
    for box in boxes.itertuples(index=False):
        if box[1] in CLASSES and box.image in set(films["image"]):
            expected.setdefault((box.image, box[1]), []).append(list(box[2:]))
    assert {(p.image, p[4]) for p in pairs.itertuples()} == set(expected) and len(pairs) == len(expected)
    for pair in pairs.itertuples():
        name = pair[4]
        assert films.loc[pair.row, "image"] == pair.image and films.loc[pair.row, "patient"] == pair.patient
        assert CLASSES[pair.output] == name and pair.n_boxes == len(pair.boxes)
        assert pair.boxes.tolist() == expected[pair.image, name]
    assert "Hernia" not in set(pairs["class"]) and pairs["n_boxes"].max() == 2
    assert pairs[["row", "output"]].values.tolist() == sorted(pairs[["row", "output"]].values.tolist())


def test_boxes_one_by_one(study):
    model, _, films, boxes = study
    pairs, single = box_pairs(films, boxes, CLASSES), box_pairs(films, boxes, CLASSES, unit="box")
    assert len(single) == pairs["n_boxes"].sum() > len(pairs) and (single["n_boxes"] == 1).all()
    assert not single.duplicated(["image", "class", "box"]).any() and set(single["box"]) == {0, 1}
    for pair in pairs.itertuples():
        mine = single[(single["image"] == pair.image) & (single["class"] == pair[4])]
        np.testing.assert_array_equal(np.concatenate(list(mine["boxes"])), pair.boxes)
        assert mine["box"].tolist() == list(range(pair.n_boxes)) and (mine["output"] == pair.output).all()
    options = {"layer": "trunk", "image_size": SIZE}
    table = align(outputs(study), single, model.head, **options)
    assert table.columns[3] == "box" and len(table) == len(single)
    whole = align(outputs(study), pairs, model.head, **options)
    alone = table.merge(whole, on=["image", "class"], suffixes=("", "_whole"))
    one = alone["n_boxes_whole"] == 1
    for metric in ("iobb", "ior", "box_area", "logit"):
        np.testing.assert_allclose(alone.loc[one, metric], alone.loc[one, f"{metric}_whole"], rtol=1e-6)
    assert (alone.loc[~one, "box_area"] <= alone.loc[~one, "box_area_whole"] + 1e-12).all() and (~one).sum() >= 4
    lone = with_other_boxes(single)
    assert "other" in lone and len(align(outputs(study), lone, model.head, **options)) == len(single)
    assert len(box_pairs(films, boxes.head(0), CLASSES, unit="box")) == 0
    with pytest.raises(ValueError, match="unit must be 'pair' or 'box', got 'film'"):
        box_pairs(films, boxes, CLASSES, unit="film")


def test_only_predicted_pairs(study):
    model, _, films, boxes = study
    pairs, options = with_other_boxes(box_pairs(films, boxes, CLASSES)), {"layer": "trunk", "image_size": SIZE}
    whole = align(outputs(study), pairs, model.head, **options)
    found = align(outputs(study), pairs, model.head, restrict="predicted", **options)
    expected = whole[whole["logit"] > 0].reset_index(drop=True)
    assert 0 < len(expected) < len(whole)
    pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=1e-5)

    none = torch.full((len(CLASSES),), -100.0)
    assert (
        len(align(shifted(outputs(study), none), pairs, moved(model.head, none), restrict="predicted", **options)) == 0
    )
    with pytest.raises(ValueError, match="restrict must be 'predicted' or None, got 'positive'"):
        align(outputs(study), pairs, model.head, restrict="positive", **options)


def test_no_pair_at_all(study):
    _, _, films, boxes = study
    pairs = box_pairs(films, boxes.head(0), CLASSES)
    assert len(pairs) == 0
    assert len(with_other_boxes(pairs)) == 0 and "other" in with_other_boxes(pairs)
    for none in (pairs, with_other_boxes(pairs)):
        with pytest.raises(ValueError, match="no annotated film: .*BBox_List_2017.csv"):
            align(outputs(study), none, study[0].head, layer="trunk", image_size=SIZE)


def test_other_boxes_are_those_of_another_patient_of_the_class(study):
    _, _, films, boxes = study
    lone = pd.DataFrame([(films["image"].iloc[4], "Hernia", 1.0, 2.0, 9.0, 12.5)], columns=boxes.columns)
    boxes = pd.concat([boxes[boxes["class"] != "Hernia"], lone])
    pairs, checked = box_pairs(films, boxes, [*CLASSES, "Hernia"]), 0
    for given in (
        pairs,
        pairs.iloc[3::2],
        pairs.sample(frac=1, random_state=0),
    ):  # also of a part, and in another order
        found = with_other_boxes(given)
        pd.testing.assert_frame_equal(found.drop(columns="other"), given)
        assert "other" not in given
        for _, part in found.groupby("class", sort=False):
            own, other = list(part["boxes"]), list(part["other"])
            moved = [not np.array_equal(a, b) for a, b in zip(own, other, strict=True)]
            assert all(moved) if part["patient"].nunique() > 1 else not any(moved)
            owner = {boxes.tobytes(): patient for boxes, patient in zip(own, part["patient"], strict=True)}
            if len(part) >= 2 * part["patient"].value_counts().max():
                assert all(
                    owner[boxes.tobytes()] != patient for boxes, patient in zip(other, part["patient"], strict=True)
                )
                checked += 1
            assert sorted(box.tolist() for box in own) == sorted(
                box.tolist() for box in other
            )  # each film's boxes are used once
    sizes = pairs["class"].value_counts()
    assert sizes["Hernia"] == 1 and (sizes[CLASSES] > 2).all() and checked >= 4


# --- alignment


@pytest.mark.parametrize(("method", "rounding"), [("cam", "outward"), ("gradpp", "trunc"), ("layer", "outward")])
def test_alignment_equals_a_loop_over_pairs(study, method, rounding):
    model, images, films, boxes = study
    pairs = box_pairs(films, boxes, CLASSES)
    table = align(outputs(study), pairs, model.head, layer="trunk", image_size=SIZE, method=method, rounding=rounding)
    columns = "image patient class n_boxes box_area cam_mass iobb ior iou logit empty cam_mass_minmax iobb_minmax"
    columns += " ior_minmax hit auprc iou_tuned hit_chance auprc_chance layer method rounding"
    assert list(table.columns) == columns.split()
    assert (table[["layer", "method", "rounding"]] == ["trunk", method, rounding]).all(axis=None)
    assert len(table) == len(pairs)
    position = {image: k for k, image in enumerate(films["image"])}
    head = reference_cam.pooled_head(model.head.weight.detach(), model.head.bias.detach())
    for found in table.itertuples(index=False):
        pair = pairs[(pairs["image"] == found.image) & (pairs["class"] == found[2])].iloc[0]
        maps = native(study, position[found.image])
        raw = reference_cam.raw_map(maps, head, pair["output"], method)
        iobb, ior, iou, area, mass = reference_localization.overlap(scaled(raw), pair["boxes"], SIZE, rounding)
        np.testing.assert_allclose(
            [found.iobb, found.ior, found.iou, found.box_area, found.cam_mass],
            [iobb, ior, iou, area, mass],
            rtol=1e-4,
            atol=1e-6,
        )
        assert found.logit == pytest.approx(head(maps[None].double())[0, pair["output"]].item(), rel=1e-4, abs=1e-5)
        assert found.n_boxes == len(pair["boxes"]) and found.patient == pair["patient"]
        assert found.empty == (scaled(raw).max() == 0)
        unit = (raw - raw.min()) / (raw.max() - raw.min()) if raw.max() > raw.min() else np.zeros_like(raw)
        expected = reference_localization.overlap(unit, pair["boxes"], SIZE, rounding)
        signed = [found.iobb_minmax, found.ior_minmax, found.cam_mass_minmax]
        np.testing.assert_allclose(signed, [*expected[:2], expected[4]], rtol=1e-4, atol=1e-6)
        place = place_scores(raw[None], [pair["boxes"]], SIZE, rounding=rounding)
        assert (found.hit, found.auprc) == pytest.approx(tuple(place.loc[0, ["hit", "auprc"]]), abs=1e-4, nan_ok=True)
        chance = by_chance(raw.shape, [pair["boxes"]], SIZE, rounding=rounding).loc[0]
        assert (found.hit_chance, found.auprc_chance) == pytest.approx(tuple(chance), nan_ok=True)


@pytest.mark.parametrize(("method", "rounding"), [("cam", "outward"), ("gradpp", "trunc")])
def test_alignment_with_other_boxes_equals_a_loop_over_pairs(study, method, rounding):
    model, _, films, boxes = study
    plain = box_pairs(films, boxes, CLASSES)
    pairs, options = (
        with_other_boxes(plain),
        {"layer": "trunk", "image_size": SIZE, "method": method, "rounding": rounding},
    )
    table = align(outputs(study), pairs, model.head, **options)
    others = [f"{name}_other" for name in ("iobb", "ior", "iobb_minmax", "ior_minmax", "hit", "auprc")]
    assert list(table.columns[-9:]) == [*others, "layer", "method", "rounding"]
    without = align(outputs(study), plain, model.head, **options)
    pd.testing.assert_frame_equal(table.drop(columns=others), without)
    head = reference_cam.pooled_head(model.head.weight.detach(), model.head.bias.detach())
    position = {image: k for k, image in enumerate(films["image"])}
    other = {
        (image, name): corners
        for image, name, corners in zip(pairs["image"], pairs["class"], pairs["other"], strict=True)
    }
    for found in table.itertuples(index=False):
        raw = reference_cam.raw_map(native(study, position[found.image]), head, CLASSES.index(found[2]), method)
        iobb, ior, *_ = reference_localization.overlap(scaled(raw), other[found.image, found[2]], SIZE, rounding)
        np.testing.assert_allclose([found.iobb_other, found.ior_other], [iobb, ior], rtol=1e-4, atol=1e-6)
    assert not np.allclose(table["iobb"], table["iobb_other"])


def test_a_metric_of_your_own_is_recorded_and_summarised(study, monkeypatch):
    """The area of the box where the map is above a half: one function and one line, here and in the summary."""
    model, _, films, boxes = study
    pairs, options = with_other_boxes(box_pairs(films, boxes, CLASSES)), {"layer": "trunk", "image_size": SIZE}
    before = align(outputs(study), pairs, model.head, **options)

    def marked(overlap):
        above = (overlap.films() > 0.5) & overlap.masks()
        return above.sum((1, 2)) / overlap.area

    metric = Metric("Marked", "share of the box above a half", marked, chance="box_area")
    monkeypatch.setitem(METRICS, "marked", metric)
    table = align(outputs(study), pairs, model.head, **options)
    more = ["marked", "marked_minmax"]
    assert set(table) - set(before) == {*more, *(f"{name}_other" for name in more)}
    pd.testing.assert_frame_equal(table[list(before)], before, check_exact=True)
    position = {image: k for k, image in enumerate(films["image"])}
    head = reference_cam.pooled_head(model.head.weight.detach(), model.head.bias.detach())
    corners = {(image, name): box for image, name, box in zip(pairs["image"], pairs["class"], pairs["boxes"])}
    for found in table.itertuples(index=False):
        maps = native(study, position[found.image])
        cam = scaled(reference_cam.raw_map(maps, head, CLASSES.index(found[2]), "cam"))
        mask = reference_localization.drawn(corners[found.image, found[2]], SIZE)
        expected = (reference_localization.resized(cam, SIZE)[mask] > 0.5).mean() if mask.any() else np.nan
        assert found.marked == pytest.approx(expected, abs=1e-9, nan_ok=True)
    names = ["iobb", "ior", "marked", "iobb_minmax", "ior_minmax", "marked_minmax", "hit", "auprc"]
    assert summary(table, 0).index.tolist() == names


def test_summary_by_hand(study):
    model, _, films, boxes = study
    pairs = with_other_boxes(box_pairs(films, boxes, CLASSES))
    table = align(outputs(study), pairs, model.head, layer="trunk", image_size=SIZE)
    found = summary(table, 50)
    labels = ["IoBB", "IoR", "IoBB, min-max", "IoR, min-max", "Hit rate", "Pixel AUPRC"]
    assert found["metric"].to_list() == labels
    chances = {"iobb": "cam_mass", "iobb_minmax": "cam_mass_minmax", "hit": "hit_chance", "auprc": "auprc_chance"}
    for name, chance in ((name, chances.get(name, "box_area")) for name in found.index):
        row, mean = found.loc[name], mean_interval(table[name], table["patient"], 50)
        assert row[["point", "low", "high", "n", "n_skipped"]].tolist() == [*mean[:4], mean.n_skipped]
        assert row["anywhere"] == table[chance].mean() and row["other_film"] == table[f"{name}_other"].mean()
        gain = paired_difference(table[name], table[f"{name}_other"], table["patient"], 50)
        assert row[["gain_point", "gain_low", "gain_high"]].tolist() == list(gain[:3])


def test_a_shift_is_a_constant_on_maps_and_logits(study):
    """That of a trunk whose maps of one dead channel are 1 everywhere, weighted with the constant."""
    model, _, films, boxes = study
    pairs, shift = with_other_boxes(box_pairs(films, boxes, CLASSES)), np.array([0.7, -0.4, 2.5])
    options = {"layer": "trunk", "image_size": SIZE}
    found = align(outputs(study), pairs, model.head, shift=shift, **options)
    head = moved(model.head, 0)
    head.weight[:, 5] = torch.from_numpy(shift).float()
    ones = []
    for output in outputs(study):
        maps = output.maps["trunk"].clone()
        maps[:, 5] = 1
        ones.append(Output(output.rows, maps.mean((2, 3)) @ head.weight.T + head.bias, {"trunk": maps}))
    expected = align(ones, pairs, head, **options)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3, atol=1e-4)
    plain = align(outputs(study), pairs, model.head, **options)
    place = ["hit", "auprc", "iobb_minmax", "iou_tuned"]
    np.testing.assert_allclose(found[place], plain[place], atol=1e-4)
    assert (found["iobb"] - plain["iobb"]).abs().max() > 0.05


@pytest.mark.parametrize("size", [1, 4, N])
def test_alignment_does_not_depend_on_batches_or_order(study, size):
    model, _, films, boxes = study
    pairs = with_other_boxes(box_pairs(films, boxes, CLASSES))
    expected = align(outputs(study), pairs, model.head, layer="trunk", image_size=SIZE)
    order = np.random.default_rng(size).permutation(N)
    found = align(outputs(study, size, order), pairs, model.head, layer="trunk", image_size=SIZE)
    key = ["image", "class"]
    pd.testing.assert_frame_equal(
        found.sort_values(key, ignore_index=True), expected.sort_values(key, ignore_index=True), rtol=1e-4, atol=1e-6
    )


def test_the_class_of_the_box_is_read_whatever_is_predicted(study):
    model, _, films, boxes = study
    table = align(outputs(study), box_pairs(films, boxes, CLASSES), model.head, layer="trunk", image_size=SIZE)
    assert (table["logit"] < 0).any() and table.loc[table["logit"] < 0, "iobb"].notna().all()


def test_films_without_boxes_change_nothing(study):
    model, _, films, boxes = study
    pairs = box_pairs(films, boxes, CLASSES)
    few = pairs[pairs["row"] == pairs["row"].iloc[0]]
    table = align(outputs(study), few, model.head, layer="trunk", image_size=SIZE)
    assert len(table) == len(few) and set(table["image"]) == set(few["image"])


def test_a_layer_that_the_head_does_not_pool(study):
    model, _, films, boxes = study
    pairs = box_pairs(films, boxes, CLASSES)
    with pytest.raises(
        ValueError, match="layer trunk.first has 4 channels and the head 6: CAM reads the layer that the head pools"
    ):
        align(outputs(study, layers=["trunk.first"]), pairs, model.head, layer="trunk.first", image_size=SIZE)
    with pytest.raises(ValueError, match="layer trunk.first has 4 channels and the head 6"):
        pair_cams(outputs(study, layers=["trunk.first"]), pairs, model.head, layer="trunk.first", size=SIZE)
    with pytest.raises(ValueError, match="no maps of 'trunk'; there are trunk.first"):
        align(outputs(study, layers=["trunk.first"]), pairs, model.head, layer="trunk", image_size=SIZE)


def test_maps_that_do_not_give_the_logits_are_refused(study):
    """A layer as wide as the pooled one, and logits that are not those of these maps."""
    model, _, films, boxes = study
    pairs, head = box_pairs(films, boxes, CLASSES), model.head
    for wrong in ("trunk.second", "trunk.relu"):
        assert next(outputs(study, layers=[wrong])).maps[wrong].shape[1] == head.in_features
    for size in (1, 5):  # a batch of one film too, where no other film shows that the rest is not the bias
        with pytest.raises(ValueError, match="layer trunk.second is not the one that the head pools"):
            align(outputs(study, size, layers=["trunk.second"]), pairs, head, layer="trunk.second", image_size=SIZE)
        with pytest.raises(ValueError, match="layer trunk.second is not the one that the head pools"):
            pair_cams(outputs(study, size, layers=["trunk.second"]), pairs, head, layer="trunk.second", size=SIZE)
    expected = align(outputs(study), pairs, head, layer="trunk", image_size=SIZE)
    found = align(
        outputs(study, layers=["trunk.relu"]), pairs, head, layer="trunk.relu", image_size=SIZE
    )  # the same maps
    pd.testing.assert_frame_equal(found.drop(columns="layer"), expected.drop(columns="layer"))

    bias = torch.tensor([3.0, -40.0, 0.5])
    assert len(align(shifted(outputs(study), bias), pairs, moved(head, bias), layer="trunk", image_size=SIZE)) == len(
        pairs
    )
    one = torch.zeros(N, len(CLASSES))
    one[N // 2, 1] = 0.5
    for given, other in (
        (shifted(outputs(study), bias), head),
        (outputs(study), moved(head, bias)),
        (shifted(outputs(study, N), one), head),
        (outputs(study), flipped(head)),
    ):
        with pytest.raises(ValueError, match="its maps do not give the logits"):
            align(given, pairs, other, layer="trunk", image_size=SIZE)


def test_maps_that_are_not_finite_are_named(study):
    model, _, films, boxes = study
    given = next(outputs(study, N))
    maps = given.maps["trunk"].clone()
    maps[:, 2] = torch.nan
    with pytest.raises(
        ValueError, match="feature maps hold NaN or infinite values, first in film 0 of the batch, channel 2"
    ):
        align(
            [Output(given.rows, given.logits, {"trunk": maps})],
            box_pairs(films, boxes, CLASSES),
            model.head,
            layer="trunk",
            image_size=SIZE,
        )


# --- maps to look at


def test_pair_cams_are_the_maps_that_alignment_scores(study):
    model, _, films, boxes = study
    pairs = box_pairs(films, boxes, CLASSES).sample(9, random_state=0)
    maps, probabilities = pair_cams(outputs(study), pairs, model.head, layer="trunk", size=SIZE)
    assert maps.shape == (9, SIZE, SIZE) and maps.dtype == np.float32 and maps.min() >= 0 and maps.max() <= 1
    head = reference_cam.pooled_head(model.head.weight.detach(), model.head.bias.detach())
    for k, pair in enumerate(pairs.itertuples()):
        film = native(study, films.index.get_loc(pair.row))
        expected = reference_localization.resized(scaled(reference_cam.raw_map(film, head, pair.output, "cam")), SIZE)
        np.testing.assert_allclose(maps[k], expected, atol=2e-5)
        assert probabilities[k] == pytest.approx(
            torch.sigmoid(head(film[None].double()))[0, pair.output].item(), rel=1e-5
        )


def test_pair_cams_of_films_that_never_came(study):
    model, _, films, boxes = study
    pairs = box_pairs(films, boxes, CLASSES).head(2).assign(row=[films.index[0], 12345])
    maps, probabilities = pair_cams(outputs(study), pairs, model.head, layer="trunk", size=SIZE)
    assert np.isfinite(probabilities[0]) and np.isnan(probabilities[1]) and (maps[1] == 0).all()


# --- concepts


def slow_counts(maps, boxes, q, connectivity, rounding="outward"):
    """All maps at once: numpy's quantile of each channel, then scipy's components of each enlarged map."""
    n, channels = maps.shape[:2]
    tau = np.quantile(
        maps.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(channels, -1), 1 - q, axis=1
    ).astype(np.float32)
    low, high = maps.amin(dim=(0, 2, 3)).numpy(), maps.amax(dim=(0, 2, 3)).numpy()
    enlarged = reference_dissection.enlarged(maps, SIZE).numpy()
    structure = np.ones((3, 3)) if connectivity == 8 else None
    counts = np.zeros((n, channels), int)
    for i in range(n):
        inside = reference_localization.drawn(boxes[i], SIZE, rounding)
        for c in range(channels):
            if tau[c] > low[c] and high[c] > low[c]:
                labels, _ = scipy.ndimage.label(enlarged[i, c] >= tau[c], structure)
                counts[i, c] = len(set(labels[inside].tolist()) - {0})
    return counts, tau


@pytest.mark.parametrize(("q", "connectivity"), [(0.05, 8), (0.2, 4), (0.01, 8)])
def test_dissection_equals_holding_all_maps(study, q, connectivity):
    boxes = film_boxes(study)
    maps = torch.cat([output.maps["trunk"] for output in outputs(study, size=N)])
    found = dissect(outputs(study, size=N), boxes, layer="trunk", q=q, image_size=SIZE, connectivity=connectivity)
    expected, tau = slow_counts(maps, list(boxes.values()), q, connectivity)
    np.testing.assert_array_equal(found.thresholds.tau, tau)
    assert not found.thresholds.usable[5] and found.rows.tolist() == study[2].index.tolist()
    np.testing.assert_array_equal(found.counts, expected)
    assert found.counts.sum() > 0 and (found.counts[:, 5] == 0).all()


def test_dissection_rounds_the_boxes_as_asked(study):
    boxes = {row: corners + np.array([0.4, 0.4, 0, 0]) for row, corners in film_boxes(study).items()}
    maps = torch.cat([output.maps["trunk"] for output in outputs(study, size=N)])
    options = {"layer": "trunk", "q": 0.1, "image_size": SIZE}
    found = {
        rounding: dissect(outputs(study, size=N), boxes, **options, rounding=rounding).counts
        for rounding in ("outward", "trunc")
    }
    for rounding, counts in found.items():
        np.testing.assert_array_equal(counts, slow_counts(maps, list(boxes.values()), 0.1, 8, rounding)[0])
    np.testing.assert_array_equal(found["outward"], dissect(outputs(study, size=N), boxes, **options).counts)
    assert (found["outward"] >= found["trunc"]).all() and (found["outward"] > found["trunc"]).any()
    with pytest.raises(ValueError, match="rounding must be 'outward' or 'trunc', got 'up'"):
        dissect(outputs(study, size=N), boxes, **options, rounding="up")


@pytest.mark.parametrize("resolution", ["image", "native"])
def test_dissection_does_not_depend_on_batches_or_order(study, resolution):
    """Of the same maps: a model's own may differ in the last bit between batch sizes."""
    rows = study[2].index.to_numpy()
    maps = torch.cat([output.maps["trunk"] for output in outputs(study, size=N)])
    boxes = film_boxes(study)
    options = {"layer": "trunk", "q": 0.05, "image_size": SIZE, "resolution": resolution}
    expected = dissect([Output(rows, None, {"trunk": maps})], boxes, **options)
    for size in (1, 4, N):
        order = np.random.default_rng(size).permutation(N)
        parts = [
            Output(rows[order[k : k + size]], None, {"trunk": maps[order[k : k + size]]}) for k in range(0, N, size)
        ]
        found = dissect(iter(parts), boxes, **options)
        np.testing.assert_array_equal(found.thresholds.tau, expected.thresholds.tau)
        assert found.rows.tolist() == rows[order].tolist()
        np.testing.assert_array_equal(found.counts, expected.counts[order])


def test_films_without_boxes_are_passed_over(study):
    boxes = film_boxes(study)
    some = {row: boxes[row] for row in list(boxes)[::2]}
    maps = torch.cat([output.maps["trunk"] for output in outputs(study, size=N)])
    found = dissect(outputs(study, size=N), some, layer="trunk", q=0.05, image_size=SIZE)
    assert set(found.rows) == set(some)
    np.testing.assert_array_equal(found.counts, slow_counts(maps[::2], list(some.values()), 0.05, 8)[0])


def test_dissection_refuses_what_it_cannot_count(study):
    with pytest.raises(ValueError, match="no annotated film: .*BBox_List_2017.csv"):
        dissect(outputs(study), {}, layer="trunk", q=0.05, image_size=SIZE)
    with pytest.raises(ValueError, match="announced"):
        dissect(outputs(study), {**film_boxes(study), 12345: np.zeros((1, 4))}, layer="trunk", q=0.05, image_size=SIZE)
    with pytest.raises(ValueError, match="no maps of 'relu'; there are trunk"):
        dissect(outputs(study), film_boxes(study), layer="relu", q=0.05, image_size=SIZE)
    bad = torch.zeros(1, 2, 4, 4)
    bad[0, 1, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="block: NaN or infinite activation in channel 1"):
        dissect(
            [Output(np.array([3]), None, {"block": bad})],
            {3: np.array([[0, 0, 9, 9.0]])},
            layer="block",
            q=0.05,
            image_size=SIZE,
        )


def test_concept_records(study):
    _, _, films, _ = study
    found = dissect(outputs(study), film_boxes(study), layer="trunk", q=0.1, image_size=SIZE)
    table = concept_records(found, films)
    assert list(table.columns) == ["image", "patient", "disjoint", "unique"]
    for k, row in enumerate(found.rows):
        assert table.loc[k, ["image", "patient"]].tolist() == films.loc[row].tolist()
        assert table.loc[k, "disjoint"] == sum(found.counts[k]) and table.loc[k, "unique"] == sum(
            count > 0 for count in found.counts[k]
        )

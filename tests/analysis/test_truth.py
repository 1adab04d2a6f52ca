import numpy as np
import pytest
import torch

from lib.analysis.dissection.components import count_concepts
from lib.analysis.dissection.concepts import concept_totals
from lib.analysis.dissection.quantile import StreamingQuantile
from lib.analysis.localization import soft_overlap
from lib.analysis.pairs import box_pairs
from lib.analysis.truth import UNHEALTHY, lesion_maps, planted_channels, planted_concepts, ruler
from lib.data.nih import read_release
from lib.data.phantom.films import read_lesion_masks
from lib.data.release import CLASSES, film_boxes, task_boxes
from tests.analysis import reference_localization

SIZE, NATIVE, N = 112, 28, 40
BOXED = ("Mass", "Nodule")


@pytest.fixture(scope="module")
def films():
    """Masks with one round lesion of a boxed class each (and one of a class without boxes), and the tight box of the
    boxed one."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    masks, classes, boxes = [], [], []
    for i in range(N):
        radius, (cy, cx) = rng.uniform(9, 14), rng.uniform(16, SIZE - 16, 2)
        lesion = (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
        classes.append(BOXED[i % 2])
        masks.append({classes[-1]: lesion, "Fibrosis": np.roll(lesion, SIZE // 2, 1)})
        rows, columns = np.nonzero(lesion)
        boxes.append(np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], float))
    return masks, classes, boxes


def scaled(boxes, size):
    """Boxes of the films at SIZE in pixels of films of another side."""
    return [box * size / SIZE for box in boxes]


def whole(n, size):
    return [np.array([[0, 0, size, size]], float)] * n


@pytest.mark.parametrize("shift", [0, 5, 9.3])
def test_maps_are_cell_averages_of_the_lesion_inside_the_box(films, shift):
    """Also where the box cuts the lesion, at a pixel or within one."""
    masks, classes, boxes = films
    moved = [box + shift for box in boxes]
    maps, attainable = lesion_maps(masks, classes, BOXED, scaled(moved, NATIVE), NATIVE)
    assert (
        maps.shape == (N, NATIVE, NATIVE)
        and maps.dtype == np.float32
        and attainable.shape == (N,)
        and attainable.dtype == np.float64
    )
    for k in range(N):
        lesion, box = masks[k][classes[k]], reference_localization.drawn(moved[k], SIZE)
        np.testing.assert_allclose(maps[k], (lesion & box).reshape(NATIVE, 4, NATIVE, 4).mean((1, 3)), atol=1e-6)
        assert attainable[k] == pytest.approx((lesion & box).sum() / box.sum())
        assert ((lesion & box) == lesion).all() == (shift == 0)


@pytest.mark.parametrize("size", [5, 9, 14, 17, 27, 28, 55, 112, 130])
def test_maps_stay_in_0_1_at_any_size(films, size):
    masks, classes, boxes = films
    full = [{"Mass": np.ones((SIZE, SIZE), bool)}]
    maps, attainable = lesion_maps(full, ["Mass"], BOXED, whole(1, size), size)
    assert maps.min() > 0.999 and maps.max() <= 1 and attainable.tolist() == [1]
    soft_overlap(lesion_maps(full * 3, ["Mass"] * 3, BOXED, whole(3, size), size)[0], boxes[:3], SIZE)
    maps, attainable = lesion_maps(masks, classes, BOXED, scaled(boxes, size), size)
    assert maps.min() >= 0 and maps.max() <= 1 and (attainable > 0).all() and (attainable <= 1).all()
    own = soft_overlap(maps, scaled(boxes, size), size)
    assert own["ior"].to_numpy() == pytest.approx(1)  # at the maps' own size nothing is left outside
    cut = scaled([box + 5.3 for box in boxes], size)
    assert soft_overlap(lesion_maps(masks, classes, BOXED, cut, size)[0], cut, size)["ior"].to_numpy() == pytest.approx(
        1
    )
    if SIZE % size == 0:  # cells of whole pixels: the box may only grow to whole cells
        assert (own["iobb"] <= attainable + 1e-6).all()


def test_unhealthy_is_the_union_of_the_boxed_classes():
    one, two, three = (np.zeros((8, 8), bool) for _ in range(3))
    one[:2], two[-2:], three[:, 3] = True, True, True
    lesions = {"Mass": one, "Nodule": two, "Fibrosis": three}
    maps, attainable = lesion_maps(
        [lesions, lesions, {}, lesions], [UNHEALTHY, "Fibrosis", UNHEALTHY, "Hernia"], BOXED, whole(4, 8), 8
    )
    np.testing.assert_allclose(attainable, [4 / 8, 1 / 8, np.nan, np.nan])
    assert (maps[0] == (one | two)).all() and (maps[1] == three).all() and not maps[2].any() and not maps[3].any()


def filled(masks, classes, boxes, size):
    """Share of the boxes on the lesion, from its definition."""
    drawn = [reference_localization.drawn(box, size) for box in boxes]
    return np.array(
        [(mask[name] & box).sum() / box.sum() for mask, name, box in zip(masks, classes, drawn, strict=True)]
    )


def test_exact_maps_score_exactly_at_full_resolution(films):
    masks, classes, boxes = films
    maps, attainable = lesion_maps(masks, classes, BOXED, boxes, SIZE)
    np.testing.assert_allclose(attainable, filled(masks, classes, boxes, SIZE))
    assert attainable.min() > 0.7 and attainable.max() < 0.85  # a disc fills pi / 4 of its box
    exact = soft_overlap(maps, boxes, SIZE)
    np.testing.assert_allclose(exact["ior"], 1, rtol=1e-9)
    np.testing.assert_allclose(exact["iobb"], attainable, rtol=1e-9)
    # The lesion itself, uncut, lies in its own boxes and not in those of the other films: this the cut cannot feign.
    uncut = np.stack([mask[name] for mask, name in zip(masks, classes, strict=True)]).astype(np.float32)
    assert np.array_equal(maps, uncut)
    elsewhere = lesion_maps(masks, classes, BOXED, boxes[1:] + boxes[:1], SIZE)[1]
    assert elsewhere.mean() < 0.2 * attainable.mean()


def test_parts_outside_the_boxes_do_not_count(films):
    masks, classes, boxes = films
    corner = np.zeros((SIZE, SIZE), bool)
    corner[:6, :6] = True
    more = [{**mask, name: mask[name] | corner} for mask, name in zip(masks, classes, strict=True)]
    for size in (NATIVE, SIZE):
        (maps, attainable), (expected, share) = (
            lesion_maps(m, classes, BOXED, scaled(boxes, size), size) for m in (more, masks)
        )
        assert np.array_equal(maps, expected) and np.array_equal(attainable, share)
    beside = [np.array([[0, 0, 6, 6]], float)] * N
    maps, attainable = lesion_maps(masks, classes, BOXED, beside, SIZE)
    assert not maps.any() and (attainable == 0).all() and soft_overlap(maps, beside, SIZE)["ior"].isna().all()
    two = [np.concatenate([box, beside[0]]) for box in boxes]  # the union of a pair's boxes counts
    maps, attainable = lesion_maps(more, classes, BOXED, two, SIZE)
    np.testing.assert_allclose(attainable, filled(more, classes, two, SIZE))
    np.testing.assert_allclose(
        soft_overlap(maps, two, SIZE)[["iobb", "ior"]], np.stack([attainable, np.ones(N)], axis=1), rtol=1e-9
    )
    assert maps[:, :6, :6].min() == 1


def test_exact_masks_fill_their_exact_boxes(films):
    masks, classes, boxes = films
    exact = soft_overlap(lesion_maps(masks, classes, BOXED, scaled(boxes, NATIVE), NATIVE)[0], boxes, SIZE)
    # A disc fills pi / 4 of its box, less what the cells at its border lose; nearly all of its map lies inside.
    assert exact["iobb"].between(np.pi / 4 - 0.12, np.pi / 4 + 0.01).all()
    assert exact["ior"].min() > 0.88
    squares = [{name: _filled(box[0])} for name, box in zip(classes, boxes, strict=True)]
    worst = []
    for size in (NATIVE, 2 * NATIVE, SIZE):
        maps, attainable = lesion_maps(squares, classes, BOXED, scaled(boxes, size), size)
        assert (attainable == 1).all()
        worst.append(soft_overlap(maps, boxes, SIZE)[["iobb", "ior"]].min().min())
    assert (
        worst[0] > 0.8 and worst[1] > 0.9 and worst[2] == pytest.approx(1)
    )  # only the cells at the border of the box are shared


def test_the_ruler_is_straight(films):
    """Exact masks have the filled share where they were drawn, and where the boxes grow to whole pixels of a smaller
    film; the cells of a model's maps cost IoR; IoBB alone is won by a map that is 1 everywhere."""
    masks, classes, boxes = films
    for size in (SIZE, 45, 30):
        own = scaled(boxes, size)
        found = ruler(masks, classes, BOXED, own, own[1:] + own[:1], size, 7)
        assert list(found.columns) == ["iobb", "ior", "filled"] and len(found) == 5
        drawn, film, cells, other, everywhere = (row for _, row in found.iterrows())
        assert drawn["filled"] == pytest.approx(filled(masks, classes, boxes, SIZE).mean(), rel=1e-12)
        assert drawn["iobb"] == pytest.approx(drawn["filled"], rel=1e-9) and drawn["ior"] == pytest.approx(1, rel=1e-9)
        # Each lesion covers as much of the film as before; its box is that of whole pixels.
        whole = [reference_localization.drawn(box, size).mean() for box in own]
        lesions = [mask[name].mean() for mask, name in zip(masks, classes, strict=True)]
        assert film["filled"] == pytest.approx(np.mean(np.divide(lesions, whole)), rel=1e-5)
        assert film["iobb"] == pytest.approx(film["filled"], rel=1e-6) and film["ior"] == pytest.approx(1, rel=1e-6)
        assert (film["filled"] < drawn["filled"] - 0.02) == (size < SIZE)
        assert cells["ior"] < 0.75 and np.isnan(cells["filled"])
        assert other["iobb"] < 0.2 * drawn["iobb"] and other["ior"] < 0.2
        assert everywhere["iobb"] == pytest.approx(1) and everywhere["ior"] == pytest.approx(np.mean(whole))
    finer = ruler(masks, classes, BOXED, own, own, size, 15).loc["exact mask, cells of the model's maps", "ior"]
    assert cells["ior"] + 0.1 < finer < 1


def test_the_ruler_in_the_cells_of_the_maps_by_hand():
    """One lesion of 2 x 2 pixels in the middle of a cell of 4 x 4, in its own box, on a film of 8 pixels."""
    lesion = np.zeros((8, 8), bool)
    lesion[1:3, 1:3] = True
    box = np.array([[1, 1, 3, 3]], float)
    found = ruler([{"Mass": lesion}], ["Mass"], BOXED, [box], [box + 4], 8, 2)
    cell = reference_localization.overlap(np.array([[1, 0], [0, 0]]), box, 8)  # a quarter of a cell, scaled to 1
    np.testing.assert_allclose(found.loc["exact mask, cells of the model's maps", ["iobb", "ior"]], cell[:2])
    assert found.loc["exact mask, boxes of another film", ["iobb", "ior"]].tolist() == [0, 0]
    assert found.loc["1 everywhere", ["iobb", "ior"]].tolist() == [1, 4 / 64]


def _filled(box):
    mask = np.zeros((SIZE, SIZE), bool)
    x1, y1, x2, y2 = box.astype(int)
    mask[y1:y2, x1:x2] = True
    return mask


@pytest.mark.parametrize("size", [NATIVE, SIZE])
def test_shuffled_masks_score_as_chance(films, size):
    masks, classes, boxes = films
    maps, _ = lesion_maps(masks, classes, BOXED, scaled(boxes, size), size)
    means = []
    for shift in range(1, N):
        table = soft_overlap(maps[np.roll(np.arange(N), shift)], boxes, SIZE)
        means.append(table.mean())
    found = {name: np.mean([mean[name] for mean in means]) for name in ("iobb", "ior", "cam_mass", "box_area")}
    # Lesions keep off the border, so chance lies somewhat above the plain shares of the film.
    assert found["cam_mass"] < found["iobb"] < 3 * found["cam_mass"]
    assert found["box_area"] < found["ior"] < 3 * found["box_area"]
    assert found["iobb"] < 0.15 and found["ior"] < 0.15


@pytest.mark.parametrize(("size", "chosen"), [(NATIVE, 0.01), (NATIVE, None), (SIZE, None)])
def test_a_planted_detector_is_counted_and_the_others_are_not(films, size, chosen):
    masks, classes, boxes = films
    maps, names, q = planted_channels(masks, BOXED, size, np.random.default_rng(0))
    assert maps.shape == (N, 4, size, size) and maps.dtype == torch.float32
    step = SIZE // size
    on = np.stack(
        [
            mask[name].reshape(size, step, size, step).mean((1, 3)) >= 0.5
            for mask, name in zip(masks, classes, strict=True)
        ]
    )
    assert isinstance(q, float) and q == pytest.approx(on.mean())
    q = chosen or q
    quantile = StreamingQuantile(q, N, "planted")
    quantile.update(maps)
    thresholds = quantile.result()
    counts = count_concepts(maps, thresholds.tau, boxes, SIZE, usable=thresholds.usable)
    share = dict(zip(names, (counts > 0).mean(axis=0), strict=True))
    if (size, chosen) == (SIZE, None):
        assert planted_concepts(masks, BOXED, boxes, SIZE).to_dict() == share
    assert share["lesion detector"] == 1  # found on every film, as one region
    assert (counts[:, names.index("lesion detector")] == 1).all()
    assert share["detector, films shuffled"] < 0.5
    if chosen is None:  # at the lesions' own share the threshold cuts out the lesions, no more and no less
        assert np.mean((maps[:, 0].numpy() >= thresholds.tau[0]) == on) > (0.9999 if size == SIZE else 0.995)
    assert share["dead"] == 0 and not thresholds.usable[names.index("dead")]
    totals = concept_totals(counts)
    assert (totals["unique"] >= 1).all() and (totals["disjoint"] >= totals["unique"]).all()


def test_noise_is_counted_as_often_as_boxes_are_large(films):
    """Noise has about q h w regions a film, and a share of them as large as the box falls in it."""
    masks, _, boxes = films
    maps, names, _ = planted_channels(masks, BOXED, NATIVE, np.random.default_rng(1))
    quantile = StreamingQuantile(0.01, N, "planted")
    quantile.update(maps)
    thresholds = quantile.result()
    counts = count_concepts(maps, thresholds.tau, boxes, SIZE, resolution="native", usable=thresholds.usable)
    noise = counts[:, names.index("noise")].sum()
    everywhere = count_concepts(
        maps,
        thresholds.tau,
        [np.array([[0, 0, SIZE, SIZE]], float)] * N,
        SIZE,
        resolution="native",
        usable=thresholds.usable,
    )[:, names.index("noise")].sum()
    # A native cell counts where a pixel of the box lies in it: each box reaches up to a cell further.
    area = (
        np.mean([(np.ceil(b[0, 2] / 4) - b[0, 0] // 4) * (np.ceil(b[0, 3] / 4) - b[0, 1] // 4) for b in boxes])
        / NATIVE**2
    )
    assert everywhere == pytest.approx(0.01 * NATIVE**2 * N, rel=0.1)
    assert noise / everywhere == pytest.approx(area, rel=0.4)


def test_planted_channels_follow_from_the_generator(films):
    masks, _, _ = films
    one, two = (planted_channels(masks, BOXED, NATIVE, np.random.default_rng(5))[0] for _ in range(2))
    assert torch.equal(one, two)
    exact = torch.from_numpy(lesion_maps(masks, [UNHEALTHY] * N, BOXED, whole(N, NATIVE), NATIVE)[0])
    assert torch.equal(one[:, 0], exact) and (one[:, 3] == 0).all()
    shuffled = {tuple(film.flatten().tolist()) for film in one[:, 1]}
    assert shuffled == {tuple(film.flatten().tolist()) for film in exact} and not torch.equal(one[:, 1], exact)


@pytest.mark.parametrize(
    ("lesion", "q"), [({}, 1e-6), ({"Mass": np.ones((8, 8), bool)}, 0.5), ({"Fibrosis": np.ones((8, 8), bool)}, 1e-6)]
)
def test_q_can_always_be_a_quantile(lesion, q):
    maps, names, found = planted_channels([lesion] * 3, BOXED, 8, np.random.default_rng(0))
    assert found == q and len(names) == maps.shape[1] == 4 and bool(maps[:, 0].any()) == ("Mass" in lesion)
    StreamingQuantile(found, 3).update(maps)


# --- the same on a phantom, with its own masks and boxes

PHANTOM_SIZE = 64


@pytest.fixture(scope="module")
def release(small_phantom):
    return read_release(small_phantom)


def phantom_pairs(release, task):
    """Pairs with the boxes as the lenses read them, the lesion masks of each pair's film, and the classes that are
    boxed."""
    boxes = task_boxes(film_boxes(release.boxes, PHANTOM_SIZE), task)
    pairs = box_pairs(release.films, boxes, [*CLASSES, UNHEALTHY])
    assert len(pairs) >= 15 and len(pairs) == len(boxes.drop_duplicates(["image", "class"]))
    return pairs, [read_lesion_masks(release.root, image) for image in pairs["image"]], set(release.boxes["class"])


@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_exact_masks_of_a_phantom_score_what_is_attainable(release, task):
    pairs, masks, boxed = phantom_pairs(release, task)
    boxes, classes = list(pairs["boxes"]), list(pairs["class"])
    maps, attainable = lesion_maps(masks, classes, boxed, boxes, PHANTOM_SIZE)
    own = soft_overlap(maps, boxes, PHANTOM_SIZE)
    np.testing.assert_allclose(own["ior"], 1, rtol=1e-9)
    np.testing.assert_allclose(own["iobb"], attainable, rtol=1e-9)
    lesions = [
        {name: mask[name] if task == "multilabel" else np.any([mask[key] for key in mask if key in boxed], axis=0)}
        for mask, name in zip(masks, classes, strict=True)
    ]
    np.testing.assert_allclose(attainable, filled(lesions, classes, boxes, PHANTOM_SIZE))
    # The maps are cut at the boxes, so IoR is 1 in a wrong frame too. What a wrong frame cannot give: whole lesions in
    # their boxes.
    drawn = np.stack([mask[name] for mask, name in zip(lesions, classes, strict=True)]).astype(np.float32)
    uncut = soft_overlap(drawn, boxes, PHANTOM_SIZE)
    np.testing.assert_allclose(uncut["iobb"], attainable, rtol=1e-9)
    assert (
        uncut["ior"].mean() > 0.85 and uncut["ior"].min() > 0.4 and attainable.min() > 0.1 and attainable.mean() > 0.35
    )


@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_exact_masks_of_a_phantom_miss_the_boxes_of_other_films(release, task):
    pairs, masks, boxed = phantom_pairs(release, task)
    boxes, image = list(pairs["boxes"]), pairs["image"].to_numpy()
    maps, attainable = lesion_maps(masks, pairs["class"], boxed, boxes, PHANTOM_SIZE)
    here, there = np.nonzero(image[:, None] != image[None])
    other = soft_overlap(maps[here], [boxes[k] for k in there], PHANTOM_SIZE)
    assert other["iobb"].mean() < attainable.mean() / 3 and other["ior"].mean() < 1 / 3
    found = lesion_maps(
        [masks[k] for k in here], pairs["class"].iloc[here], boxed, [boxes[k] for k in there], PHANTOM_SIZE
    )[1]
    assert found.mean() < attainable.mean() / 2.5


@pytest.mark.parametrize("size", [PHANTOM_SIZE, PHANTOM_SIZE // 2, PHANTOM_SIZE // 4])
def test_a_planted_detector_is_counted_on_the_films_of_a_phantom(release, size):
    pairs, masks, boxed = phantom_pairs(release, "binary")
    maps, names, q = planted_channels(masks, boxed, size, np.random.default_rng(0))
    assert len(maps) == pairs["image"].nunique()
    if size == PHANTOM_SIZE:
        assert q == pytest.approx(
            np.mean([np.any([mask[key] for key in mask if key in boxed], axis=0) for mask in masks])
        )
    quantile = StreamingQuantile(q, len(maps), "planted")
    quantile.update(maps)
    thresholds = quantile.result()
    for resolution in ("image", "native"):
        counts = count_concepts(
            maps, thresholds.tau, list(pairs["boxes"]), PHANTOM_SIZE, resolution=resolution, usable=thresholds.usable
        )
        share = dict(zip(names, (counts > 0).mean(axis=0), strict=True))
        assert share["lesion detector"] >= 0.95
        assert share["detector, films shuffled"] < share["lesion detector"] - 0.15
        assert share["dead"] == 0 and not thresholds.usable[names.index("dead")]

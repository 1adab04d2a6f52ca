import numpy as np
import pytest
import torch

from lib.analysis.calibration import UNHEALTHY, lesion_maps, planted_channels
from lib.analysis.dissection import StreamingQuantile, concept_totals, count_concepts
from lib.analysis.localization import soft_overlap

SIZE, NATIVE, N = 112, 28, 40
BOXED = ("Mass", "Nodule")


@pytest.fixture(scope="module")
def films():
    """Masks with one round lesion of a boxed class each (and one of a class without boxes), and the tight box of the boxed one."""
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


def test_maps_are_cell_averages_of_the_lesion(films):
    masks, classes, _ = films
    maps = lesion_maps(masks, classes, BOXED, NATIVE)
    assert maps.shape == (N, NATIVE, NATIVE) and maps.dtype == np.float32
    for k in range(N):
        expected = masks[k][classes[k]].reshape(NATIVE, 4, NATIVE, 4).mean((1, 3))
        np.testing.assert_allclose(maps[k], expected, atol=1e-6)


@pytest.mark.parametrize("size", [5, 9, 14, 17, 27, 28, 55, 112, 130])
def test_maps_stay_in_0_1_at_any_size(films, size):
    masks, classes, boxes = films
    full = [{"Mass": np.ones((SIZE, SIZE), bool)}]
    assert lesion_maps(full, ["Mass"], BOXED, size).max() <= 1
    soft_overlap(lesion_maps(full * 3, ["Mass"] * 3, BOXED, size), boxes[:3], SIZE)
    maps = lesion_maps(masks, classes, BOXED, size)
    assert maps.min() >= 0 and maps.max() <= 1


def test_unhealthy_is_the_union_of_the_boxed_classes():
    one, two, three = (np.zeros((8, 8), bool) for _ in range(3))
    one[:2], two[-2:], three[:, 3] = True, True, True
    lesions = {"Mass": one, "Nodule": two, "Fibrosis": three}
    maps = lesion_maps([lesions, lesions, {}, lesions], [UNHEALTHY, "Fibrosis", UNHEALTHY, "Hernia"], BOXED, 8)
    assert (maps[0] == (one | two)).all() and (maps[1] == three).all() and not maps[2].any() and not maps[3].any()


def test_exact_masks_fill_their_exact_boxes(films):
    masks, classes, boxes = films
    exact = soft_overlap(lesion_maps(masks, classes, BOXED, NATIVE), boxes, SIZE)
    # A disc fills pi / 4 of its box, less what the cells at its border lose; nearly all of its map lies inside.
    assert exact["iobb"].between(np.pi / 4 - 0.12, np.pi / 4 + 0.01).all()
    assert exact["ior"].min() > 0.88
    squares = [{name: _filled(box[0])} for name, box in zip(classes, boxes, strict=True)]
    worst = [soft_overlap(lesion_maps(squares, classes, BOXED, size), boxes, SIZE)[["iobb", "ior"]].min().min() for size in (NATIVE, 2 * NATIVE, SIZE)]
    assert worst[0] > 0.8 and worst[1] > 0.9 and worst[2] == pytest.approx(1)  # only the cells at the border of the box are shared


def _filled(box):
    mask = np.zeros((SIZE, SIZE), bool)
    x1, y1, x2, y2 = box.astype(int)
    mask[y1:y2, x1:x2] = True
    return mask


def test_shuffled_masks_score_as_chance(films):
    masks, classes, boxes = films
    maps = lesion_maps(masks, classes, BOXED, NATIVE)
    means = []
    for shift in range(1, N):
        table = soft_overlap(maps[np.roll(np.arange(N), shift)], boxes, SIZE)
        means.append(table.mean())
    found = {name: np.mean([mean[name] for mean in means]) for name in ("iobb", "ior", "cam_mass", "box_area")}
    # Lesions keep off the border, so chance lies somewhat above the plain shares of the film.
    assert found["cam_mass"] < found["iobb"] < 3 * found["cam_mass"]
    assert found["box_area"] < found["ior"] < 3 * found["box_area"]
    assert found["iobb"] < 0.15 and found["ior"] < 0.15


def test_a_planted_detector_is_counted_and_the_others_are_not(films):
    masks, _, boxes = films
    maps, names = planted_channels(masks, BOXED, NATIVE, np.random.default_rng(0))
    assert maps.shape == (N, 4, NATIVE, NATIVE) and maps.dtype == torch.float32
    q = 0.01
    quantile = StreamingQuantile(q, N, "planted")
    quantile.update(maps)
    thresholds = quantile.result()
    counts = count_concepts(maps, thresholds.tau, boxes, SIZE, usable=thresholds.usable)
    share = dict(zip(names, (counts > 0).mean(axis=0), strict=True))
    assert share["lesion detector"] == 1  # found on every film, as one region
    assert (counts[:, names.index("lesion detector")] == 1).all()
    assert share["detector, films shuffled"] < 0.5
    assert share["dead"] == 0 and not thresholds.usable[names.index("dead")]
    totals = concept_totals(counts)
    assert (totals["unique"] >= 1).all() and (totals["disjoint"] >= totals["unique"]).all()


def test_noise_is_counted_as_often_as_boxes_are_large(films):
    """Noise has about q h w regions a film, and a share of them as large as the box falls in it."""
    masks, _, boxes = films
    maps, names = planted_channels(masks, BOXED, NATIVE, np.random.default_rng(1))
    quantile = StreamingQuantile(0.01, N, "planted")
    quantile.update(maps)
    thresholds = quantile.result()
    counts = count_concepts(maps, thresholds.tau, boxes, SIZE, resolution="native", usable=thresholds.usable)
    noise = counts[:, names.index("noise")].sum()
    everywhere = count_concepts(maps, thresholds.tau, [np.array([[0, 0, SIZE, SIZE]], float)] * N, SIZE, resolution="native",
                                usable=thresholds.usable)[:, names.index("noise")].sum()
    # A native cell counts where a pixel of the box lies in it: each box reaches up to a cell further.
    area = np.mean([(np.ceil(b[0, 2] / 4) - b[0, 0] // 4) * (np.ceil(b[0, 3] / 4) - b[0, 1] // 4) for b in boxes]) / NATIVE**2
    assert everywhere == pytest.approx(0.01 * NATIVE**2 * N, rel=0.1)
    assert noise / everywhere == pytest.approx(area, rel=0.4)


def test_planted_channels_follow_from_the_generator(films):
    masks, _, _ = films
    one, two = (planted_channels(masks, BOXED, NATIVE, np.random.default_rng(5))[0] for _ in range(2))
    assert torch.equal(one, two)
    exact = torch.from_numpy(lesion_maps(masks, [UNHEALTHY] * N, BOXED, NATIVE))
    assert torch.equal(one[:, 0], exact) and (one[:, 3] == 0).all()
    shuffled = {tuple(film.flatten().tolist()) for film in one[:, 1]}
    assert shuffled == {tuple(film.flatten().tolist()) for film in exact} and not torch.equal(one[:, 1], exact)

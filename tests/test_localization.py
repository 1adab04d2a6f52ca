import numpy as np
import pytest
import torch

from lib.analysis.cam import normalise, resize
from lib.analysis.localization import COLUMNS, box_mask, disjoint_rectangles, pixel_boxes, soft_overlap
from tests import reference_localization as reference

BOXES = [
    [(3.2, 4.9, 17.1, 11.0)],
    [(0, 0, 40, 40)],
    [(5, 5, 20, 20), (10, 12, 30, 33.5)],
    [(5, 5, 20, 20), (5, 5, 20, 20), (8, 1, 9, 39), (30, 30, 35, 36), (0, 18, 40, 19.2)],
    [(-10, -5, 7.5, 12), (35, 30, 60, 50)],
    [(6, 6, 6.4, 6.2)],
    [(12, 0, 16, 40), (16, 0, 20, 40)],
]


def cams(n, shape=(5, 5), seed=0):
    return normalise(torch.from_numpy(np.random.default_rng(seed).standard_normal((n, *shape))))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 5), (7, 5), (40, 40), (64, 47)])
@pytest.mark.parametrize("rounding", ["outward", "trunc"])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_equals_resize_and_sum(shape, rounding, threshold):
    maps = cams(len(BOXES), shape) if shape != (1, 1) else torch.full((len(BOXES), 1, 1), 0.4, dtype=torch.float64)
    ours = soft_overlap(maps, BOXES, 40, rounding=rounding, threshold=threshold)
    assert list(ours.columns) == COLUMNS
    for pair, boxes in enumerate(BOXES):
        expected = reference.overlap(maps[pair].numpy(), boxes, 40, rounding, threshold)
        np.testing.assert_allclose(ours.iloc[pair], expected, rtol=1e-9, atol=1e-12, err_msg=str(boxes))


def test_equals_torch_resize_at_224_in_float32():
    generator = np.random.default_rng(1)
    corner, extent = generator.uniform(0, 180, (20, 2)), generator.uniform(2, 44, (20, 2))
    boxes = [[(*a, *(a + b))] for a, b in zip(corner, extent, strict=True)]
    for side in (7, 14, 28):
        maps = cams(20, (side, side)).float()
        ours = soft_overlap(maps, boxes, 224)
        full = resize(maps, 224)
        for pair in range(20):
            mask = torch.from_numpy(box_mask(boxes[pair], 224))
            inside, mass = full[pair][mask].double().sum(), full[pair].double().sum()
            expected = [inside / mask.sum(), inside / mass, inside / (mask.sum() + mass - inside), mask.double().mean(), mass / 224**2]
            np.testing.assert_allclose(ours.iloc[pair], torch.stack(expected), rtol=1e-6)


def test_undefined_cases_and_zero_policy():
    maps = torch.zeros(4, 5, 5)
    maps[1:3] = cams(2).float()
    boxes = [[(3, 3, 9, 9)], [], [(50, 3, 60, 9), (4, 4, 4, 9), (9, 9, 3, 3)], []]
    ours = soft_overlap(maps, boxes, 40)
    assert ours.loc[0, ["iobb", "iou"]].tolist() == [0, 0] and np.isnan(ours.loc[0, "ior"])
    assert ours.loc[1:, ["iobb", "ior", "iou"]].isna().all(axis=None)
    assert ours["box_area"].tolist() == pytest.approx([36 / 1600, 0, 0, 0])
    assert (ours.loc[1:2, "cam_mass"] > 0).all()
    filled = soft_overlap(maps, boxes, 40, zero_policy="zero")
    assert (filled[["iobb", "ior", "iou"]] == 0).all(axis=None)
    assert len(soft_overlap(torch.zeros(0, 5, 5), [], 40)) == 0


def test_perfect_and_disjoint_maps():
    mask = torch.from_numpy(box_mask([(8, 8, 24, 32)], 40)).double()
    ours = soft_overlap(torch.stack([mask, 1 - mask, torch.ones(40, 40)]), [[(8, 8, 24, 32)]] * 3, 40)
    assert ours.loc[0].tolist() == pytest.approx([1, 1, 1, 0.24, 0.24])
    assert ours.loc[1].tolist() == pytest.approx([0, 0, 0, 0.24, 0.76])
    assert ours.loc[2].tolist() == pytest.approx([1, 0.24, 0.24, 0.24, 1])
    assert (ours <= 1).all(axis=None) and (ours >= 0).all(axis=None)


def test_exact_lesion_masks_calibrate_the_measures():
    """Maps made from the lesions themselves score near 1; paired with other films' boxes they score what area alone gives."""
    generator = np.random.default_rng(2)
    size, boxes, maps = 224, [], []
    for _ in range(300):
        width, height = generator.integers(40, 90, 2)
        x, y = generator.integers(0, size - width), generator.integers(0, size - height)
        boxes.append([(x, y, x + width, y + height)])
        lesion = torch.from_numpy(box_mask(boxes[-1], size)).float()
        maps.append(torch.nn.functional.avg_pool2d(lesion[None, None], 8)[0, 0])
    maps = torch.stack(maps)
    true = soft_overlap(maps, boxes, size)
    assert true["iobb"].mean() > 0.85 and true["ior"].mean() > 0.85 and true["iou"].mean() > 0.75     # the edges are blurred over one cell
    exact = soft_overlap(torch.stack([torch.from_numpy(box_mask(b, size)).float() for b in boxes[:20]]), boxes[:20], size)
    np.testing.assert_allclose(exact[["iobb", "ior", "iou"]], 1, rtol=1e-12)
    free = [[(x, y, x + b[0][2] - b[0][0], y + b[0][3] - b[0][1])] for b in boxes
            for x, y in [generator.integers(0, (size - b[0][2] + b[0][0], size - b[0][3] + b[0][1]))]]
    noise = normalise(torch.from_numpy(generator.random((300, 28, 28))))
    chance = soft_overlap(noise, free, size)
    assert chance["iobb"].mean() == pytest.approx(chance["cam_mass"].mean(), abs=0.01)
    assert chance["ior"].mean() == pytest.approx(chance["box_area"].mean(), abs=0.01)
    shuffled = soft_overlap(maps, boxes[1:] + boxes[:1], size)
    assert shuffled["iobb"].mean() < 0.25 and shuffled["ior"].mean() < 0.25


def test_order_and_grouping_do_not_matter():
    maps = cams(len(BOXES))
    whole = soft_overlap(maps, BOXES, 40)
    parts = [soft_overlap(maps[i:i + 1], BOXES[i:i + 1], 40).iloc[0] for i in reversed(range(len(BOXES)))]
    np.testing.assert_allclose(whole, np.stack(parts[::-1]), rtol=1e-12)
    turned = soft_overlap(maps, [boxes[::-1] for boxes in BOXES], 40)
    np.testing.assert_allclose(whole, turned, rtol=1e-12)


def test_pixel_boxes_rounding():
    assert pixel_boxes([(1.2, 2.0, 3.0, 4.1)], 10).tolist() == [[1, 2, 3, 5]]
    assert pixel_boxes([(1.2, 2.0, 3.9, 4.1)], 10, rounding="trunc").tolist() == [[1, 2, 3, 4]]
    assert pixel_boxes([(1.2, 2.2, 1.4, 2.3)], 10).tolist() == [[1, 2, 2, 3]]
    assert pixel_boxes([(1.2, 2.2, 1.4, 2.3)], 10, rounding="trunc").tolist() == []
    assert pixel_boxes([(1 - 1e-12, 0, 3 + 1e-12, 4)], 10).tolist() == [[1, 0, 3, 4]]
    assert pixel_boxes([(3 - 1e-9, 0, 3 + 1e-9, 4)], 10).tolist() == [[3, 0, 4, 4]]
    assert pixel_boxes([(-4, -4, -1, 3), (10, 0, 12, 4), (2, 2, 2, 8)], 10).tolist() == []
    assert pixel_boxes(np.empty((0, 4)), 10).shape == (0, 4)


def test_disjoint_rectangles_tile_the_union():
    generator = np.random.default_rng(0)
    for n in (1, 2, 3, 6, 12):
        low = generator.integers(0, 30, (n, 2))
        boxes = np.concatenate([low, low + generator.integers(1, 11, (n, 2))], axis=1)
        drawn = np.zeros((40, 40), dtype=int)
        for x1, y1, x2, y2 in disjoint_rectangles(boxes):
            drawn[y1:y2, x1:x2] += 1
        np.testing.assert_array_equal(drawn, box_mask(boxes, 40).astype(int))


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"map 1 leaves \[0, 1\]"):
        soft_overlap(torch.tensor([[[0.5]], [[1.5]]]), [[], []], 40)
    with pytest.raises(ValueError, match="map 0 leaves"):
        soft_overlap(torch.tensor([[[float("nan")]]]), [[]], 40)
    with pytest.raises(ValueError, match="2 lists"):
        soft_overlap(torch.zeros(1, 3, 3), [[], []], 40)
    with pytest.raises(ValueError, match="a box at 0 holds NaN"):
        soft_overlap(torch.zeros(1, 3, 3), [[(0, 0, float("nan"), 4)]], 40)
    with pytest.raises(ValueError, match=r"boxes must be \(K, 4\)"):
        soft_overlap(torch.zeros(1, 3, 3), [[(0, 0, 4)]], 40)
    for options in ({"rounding": "nearest"}, {"zero_policy": "nan"}, {"threshold": 0.0}, {"threshold": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            soft_overlap(torch.zeros(1, 3, 3), [[(0, 0, 4, 4)]], 40, **options)

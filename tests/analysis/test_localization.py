import numpy as np
import pandas as pd
import pytest
import torch

from lib.analysis.cam import normalise, resize
from lib.analysis.localization import (
    METRICS,
    THRESHOLDS,
    Metric,
    box_mask,
    box_masks,
    disjoint_rectangles,
    empty_mask_iou,
    pixel_boxes,
    positive_part,
    soft_overlap,
    threshold_iou,
)
from tests.analysis import reference_localization as reference

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
    assert list(ours.columns) == [*METRICS, "box_area", "cam_mass"] == ["iobb", "ior", "iou", "box_area", "cam_mass"]
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
            expected = [
                inside / mask.sum(),
                inside / mass,
                inside / (mask.sum() + mass - inside),
                mask.double().mean(),
                mass / 224**2,
            ]
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


def test_a_value_at_the_threshold_reaches_it():
    maps = torch.tensor([[[0.5, 0.25], [0.5, 0.25]], [[0.25, 0.25], [0.25, 0.25]]])
    for dtype in (torch.float32, torch.float64):
        at, above = (soft_overlap(maps.to(dtype), [[(0, 0, 1, 2)]] * 2, 2, threshold=t) for t in (0.5, 0.500001))
        assert at["iobb"].tolist() == [1, 0] and at["cam_mass"].tolist() == [0.5, 0]
        assert (above["cam_mass"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_maps_of_half_precision(dtype, threshold):
    maps = cams(len(BOXES)).to(dtype)
    ours = soft_overlap(maps, BOXES, 40, threshold=threshold)
    pd.testing.assert_frame_equal(ours, soft_overlap(maps.float(), BOXES, 40, threshold=threshold), check_exact=True)


def hit(overlap):
    """The pointing game: 1 where the map's largest value lies in a box; where several are largest, the share."""
    films, masks = overlap.films(), overlap.masks()
    largest = films == films.max(axis=(1, 2), keepdims=True)
    return (largest & masks).sum(axis=(1, 2)) / largest.sum(axis=(1, 2))


def test_a_metric_of_your_own_is_one_function_and_one_line(monkeypatch):
    before = soft_overlap(cams(len(BOXES)), BOXES, 40)
    monkeypatch.setitem(METRICS, "hit", Metric("Hit rate", "the peak lies in the box", hit, chance="box_area"))
    maps = cams(len(BOXES))
    maps[1] = 0
    table = soft_overlap(maps, BOXES, 40, zero_policy="skip")
    assert list(table.columns) == ["iobb", "ior", "iou", "hit", "box_area", "cam_mass"]
    pd.testing.assert_frame_equal(table.drop(columns="hit").drop(index=1), before.drop(index=1), check_exact=True)
    for pair, boxes in enumerate(BOXES):
        film, mask = reference.resized(maps[pair].numpy(), 40), reference.drawn(boxes, 40)
        at = np.argwhere(np.isclose(film, film.max(), rtol=1e-12, atol=0))
        assert table["hit"][pair] == pytest.approx(np.mean([mask[y, x] for y, x in at]))
    assert table["hit"].nunique() > 1 and table["hit"][1] == 1  # the box of pair 1 is the whole film
    assert np.isnan(soft_overlap(maps[:1], [[]], 40)["hit"][0])


def test_perfect_and_disjoint_maps():
    mask = torch.from_numpy(box_mask([(8, 8, 24, 32)], 40)).double()
    ours = soft_overlap(torch.stack([mask, 1 - mask, torch.ones(40, 40)]), [[(8, 8, 24, 32)]] * 3, 40)
    assert ours.loc[0].tolist() == pytest.approx([1, 1, 1, 0.24, 0.24])
    assert ours.loc[1].tolist() == pytest.approx([0, 0, 0, 0.24, 0.76])
    assert ours.loc[2].tolist() == pytest.approx([1, 0.24, 0.24, 0.24, 1])
    assert (ours <= 1).all(axis=None) and (ours >= 0).all(axis=None)


def test_exact_lesion_masks_calibrate_the_measures():
    """Maps made from the lesions themselves score near 1; paired with other films' boxes they score what area alone
    gives."""
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
    assert (
        true["iobb"].mean() > 0.85 and true["ior"].mean() > 0.85 and true["iou"].mean() > 0.75
    )  # the edges are blurred over one cell
    exact = soft_overlap(
        torch.stack([torch.from_numpy(box_mask(b, size)).float() for b in boxes[:20]]), boxes[:20], size
    )
    np.testing.assert_allclose(exact[["iobb", "ior", "iou"]], 1, rtol=1e-12)
    free = [
        [(x, y, x + b[0][2] - b[0][0], y + b[0][3] - b[0][1])]
        for b in boxes
        for x, y in [generator.integers(0, (size - b[0][2] + b[0][0], size - b[0][3] + b[0][1]))]
    ]
    noise = normalise(torch.from_numpy(generator.random((300, 28, 28))))
    chance = soft_overlap(noise, free, size)
    assert chance["iobb"].mean() == pytest.approx(chance["cam_mass"].mean(), abs=0.01)
    assert chance["ior"].mean() == pytest.approx(chance["box_area"].mean(), abs=0.01)
    shuffled = soft_overlap(maps, boxes[1:] + boxes[:1], size)
    assert shuffled["iobb"].mean() < 0.25 and shuffled["ior"].mean() < 0.25


def test_order_and_grouping_do_not_matter():
    maps = cams(len(BOXES))
    whole = soft_overlap(maps, BOXES, 40)
    parts = [soft_overlap(maps[i : i + 1], BOXES[i : i + 1], 40).iloc[0] for i in reversed(range(len(BOXES)))]
    np.testing.assert_allclose(whole, np.stack(parts[::-1]), rtol=1e-12)
    turned = soft_overlap(maps, [boxes[::-1] for boxes in BOXES], 40)
    np.testing.assert_allclose(whole, turned, rtol=1e-12)


def test_pixel_boxes_rounding():
    def pixels(boxes, rounding="outward"):
        return pixel_boxes([boxes], 10, rounding=rounding)[0].tolist()

    assert pixels([(1.2, 2.0, 3.0, 4.1)]) == [[1, 2, 3, 5]]
    assert pixels([(1.2, 2.0, 3.9, 4.1)], "trunc") == [[1, 2, 3, 4]]
    assert pixels([(1.2, 2.2, 1.4, 2.3)]) == [[1, 2, 2, 3]]
    assert pixels([(1.2, 2.2, 1.4, 2.3)], "trunc") == []
    assert pixels([(1 - 1e-12, 0, 3 + 1e-12, 4)]) == [[1, 0, 3, 4]]
    assert pixels([(3 - 1e-9, 0, 3 + 1e-9, 4)]) == [[3, 0, 4, 4]]
    assert pixels([(-4, -4, -1, 3), (10, 0, 12, 4), (2, 2, 2, 8)]) == []
    assert pixel_boxes([np.empty((0, 4))], 10)[0].shape == (0, 4)
    boxes, owner = pixel_boxes([[], [(0, 0, 2, 2), (3, 3, 3, 9)], [(1, 1, 4, 4), (5, 5, 6, 6)]], 10)
    assert owner.tolist() == [1, 2, 2] and boxes[0].tolist() == [0, 0, 2, 2]


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


# --- IoU by threshold


def unit_maps(dtype, size=40, seed=3):
    """Maps in [0, 1] of which about a third of the pixels hold a threshold exactly; the last is zero, the one before
    reaches no threshold."""
    generator = np.random.default_rng(seed)
    maps = generator.random((len(BOXES), size, size)).astype(dtype)
    tied = generator.choice(np.asarray([*THRESHOLDS, 0, 1], dtype), maps.shape)
    maps = np.where(generator.random(maps.shape) < 0.3, tied, maps)
    maps[-1], maps[-2] = 0, maps[-2] * dtype(0.05)
    return maps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("rounding", ["outward", "trunc"])
def test_iou_by_threshold_equals_a_loop_over_pixels(dtype, inclusive, rounding):
    maps = unit_maps(dtype)
    table = threshold_iou(torch.from_numpy(maps), BOXES, 40, rounding=rounding, inclusive=inclusive)
    assert table["pair"].tolist() == np.repeat(range(len(BOXES)), 5).tolist() and table["threshold"].tolist() == [
        *THRESHOLDS
    ] * len(BOXES)
    for row in table.itertuples():
        expected = reference.hard_ious(maps[row.pair], BOXES[row.pair], dtype(row.threshold), rounding, inclusive)
        np.testing.assert_allclose(
            [row.iou_lesion, row.iou_background, row.mean_iou], expected, rtol=1e-14, err_msg=str(row)
        )
        marked = maps[row.pair] >= dtype(row.threshold) if inclusive else maps[row.pair] > dtype(row.threshold)
        assert row.mask_area == marked.mean() and row.box_area == reference.drawn(BOXES[row.pair], 40, rounding).mean()
    both = [threshold_iou(torch.from_numpy(maps), BOXES, 40, inclusive=flag)["mask_area"] for flag in (True, False)]
    assert (
        (both[0] - both[1]).to_numpy().reshape(-1, 5)[:-2] > 0.02
    ).all()  # the ties are there, and fall on the two sides


def test_empty_masks_get_what_an_empty_mask_gets():
    boxes = [[(8, 8, 24, 32)], [(0, 0, 40, 40)], [(5, 5, 20, 20), (10, 12, 30, 33)], []]
    table = threshold_iou(torch.zeros(4, 40, 40), boxes, 40, [0.5])
    assert table["iou_lesion"].tolist()[:3] == [0, 0, 0] and np.isnan(
        table["iou_lesion"][3]
    )  # nothing marked, nothing to mark
    np.testing.assert_array_equal(table["mean_iou"], table["empty_mask_iou"])
    np.testing.assert_array_equal(table["empty_mask_iou"], empty_mask_iou(table["box_area"]))
    assert table["mean_iou"].tolist()[:2] == [(1 - 0.24) / 2, 0] and table["iou_background"].tolist() == [
        0.76,
        0,
        1 - table["box_area"][2],
        1,
    ]
    assert empty_mask_iou(0.1) == 0.45 and np.isnan(empty_mask_iou(0))


def test_box_over_the_whole_film():
    table = threshold_iou(
        torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]), [[(-1, -1, 3, 3)]] * 2, 2, [0.5]
    )
    assert table["iou_lesion"].tolist() == [0.25, 1]
    assert (
        table["iou_background"][0] == 0 and np.isnan(table["iou_background"][1]) and np.isnan(table["mean_iou"][1])
    )  # no background at all


def test_perfect_whole_and_complementary_masks():
    mask = box_masks([[(8, 8, 24, 32)]] * 3, 40).astype(np.float32)
    mask[1], mask[2] = 1 - mask[1], 1
    table = threshold_iou(mask, [[(8, 8, 24, 32)]] * 3, 40, [0.3])
    assert table["mean_iou"].tolist() == pytest.approx([1, 0, 0.12]) and table["iou_lesion"].tolist() == pytest.approx(
        [1, 0, 0.24]
    )
    assert (
        len(threshold_iou(np.zeros((0, 4, 4), np.float32), [], 4)) == 0
        and len(threshold_iou(mask, [[]] * 3, 40, [])) == 0
    )


def test_positive_part_is_not_min_max():
    maps = torch.tensor(
        [[[2.0, 4.0], [1.0, 3.0]], [[-2.0, 0.0], [1.0, -8.0]], [[-1.0, -2.0], [-3.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    )
    expected = [[[0.5, 1], [0.25, 0.75]], [[0, 0], [1, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert positive_part(maps).tolist() == expected
    for scale in (1e-42, 1e-30, 1e30):
        unit = positive_part(maps * scale)
        assert unit.amax() == 1 and unit.amin() == 0 and not unit[2:].any()
    assert (maps < 0).any()  # not in place
    maps[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"map \[1\] holds NaN"):
        positive_part(maps)


def test_threshold_iou_refuses_wrong_maps():
    with pytest.raises(ValueError, match=r"need maps \(P, 40, 40\), resized to the film, .* got \(1, 5, 5\)"):
        threshold_iou(torch.zeros(1, 5, 5), [[]], 40)
    with pytest.raises(ValueError, match="and 2 lists"):
        threshold_iou(torch.zeros(1, 4, 4), [[], []], 4)
    for bad in (-0.1, 1.01, torch.nan):
        maps = torch.zeros(2, 4, 4)
        maps[1, 2, 2] = bad
        with pytest.raises(ValueError, match=r"map 1 leaves \[0, 1\] or holds NaN; see positive_part"):
            threshold_iou(maps, [[], []], 4)
    with pytest.raises(ValueError, match="rounding"):
        threshold_iou(torch.zeros(1, 4, 4), [[(0, 0, 1, 1)]], 4, rounding="nearest")

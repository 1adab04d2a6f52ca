"""Scores of place: against slow references from their definitions, and against constants and scales."""

import numpy as np
import pandas as pd
import pytest
import torch

from lib.analysis.cam import resize
from lib.analysis.localization import box_mask
from lib.analysis.place import DRAWS, SHARES, by_chance, iou_columns, place_scores, tuned_iou

BOXES = [[(3, 4, 20, 31)], [(0, 0, 9, 9), (5, 5, 30, 12.5)], [(30.2, 1.7, 39.9, 38.1)], [(-5, 10, 60, 30)]]


def maps(n=4, size=5, seed=0):
    return torch.randn(n, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def by_definition(signed, boxes, size):
    """Hit, AUPRC and IoU of one map by loops over pixels and thresholds."""
    film, mask = resize(signed[None], size)[0].numpy(), box_mask(boxes, size)
    top = [mask[y, x] for y in range(size) for x in range(size) if film[y, x] == film.max()]
    order = np.argsort(-film.ravel(), kind="stable")
    found, precision = 0, []
    for rank, pixel in enumerate(order, start=1):
        if mask.ravel()[pixel]:
            found += 1
            precision.append(found / rank)
    unit = resize(((signed - signed.min()) / (signed.max() - signed.min()))[None], size)[0].numpy()
    ious = [((unit >= share) & mask).sum() / ((unit >= share) | mask).sum() for share in SHARES]
    return np.mean(top), np.mean(precision), ious


def test_scores_against_their_definitions():
    signed = maps()
    found = place_scores(signed, BOXES, 40)
    for row, (one, boxes) in enumerate(zip(signed, BOXES)):
        hit, auprc, ious = by_definition(one, boxes, 40)
        assert found.loc[row, "hit"] == pytest.approx(hit)
        assert found.loc[row, "auprc"] == pytest.approx(auprc, abs=0.02)  # ties at the rim: sklearn takes them at once
        np.testing.assert_allclose(found.loc[row, iou_columns()].to_numpy(float), ious, atol=1e-12)


def test_auprc_is_exact_where_nothing_ties():
    generator = np.random.default_rng(1)
    signed = torch.from_numpy(generator.permutation(1600).reshape(1, 40, 40).astype(float))
    _, auprc, _ = by_definition(signed[0], BOXES[0], 40)
    assert place_scores(signed, BOXES[:1], 40)["auprc"][0] == pytest.approx(auprc, abs=1e-12)


@pytest.mark.parametrize(("scale", "constant"), [(1, 5.0), (3.7, 0), (0.01, -2.9)])
def test_neither_a_constant_nor_a_scale_moves_a_score(scale, constant):
    moved = place_scores(scale * maps() + constant, BOXES, 40)
    pd.testing.assert_frame_equal(moved, place_scores(maps(), BOXES, 40), rtol=1e-9)


def test_a_map_that_is_the_lesion_and_one_that_is_all_but_the_lesion():
    mask = torch.from_numpy(box_mask(BOXES[0], 40)).double()
    found = place_scores(torch.stack([mask, -mask]), [BOXES[0]] * 2, 40)
    assert found.loc[0, ["hit", "auprc", "iou_0.5"]].tolist() == [1, 1, 1]
    area = float(mask.mean())
    assert found.loc[1, "hit"] == 0 and found.loc[1, "auprc"] == pytest.approx(area) and found.loc[1, "iou_0.5"] == 0


def test_a_constant_map_has_the_scores_of_chance():
    found = place_scores(torch.full((1, 5, 5), -3.0), BOXES[:1], 40)
    area = box_mask(BOXES[0], 40).mean()
    assert found["hit"][0] == pytest.approx(area) and found["auprc"][0] == pytest.approx(area)
    assert (found[iou_columns()] == 0).all(axis=None)


@pytest.mark.parametrize(("grid", "rounding"), [((4, 4), "outward"), ((3, 5), "trunc"), ((1, 1), "outward")])
def test_chance_is_the_mean_over_maps_that_know_nothing(grid, rounding):
    """One map for each cell that may be the largest, and the very maps that are drawn; their ties count as they do in
    the scores."""
    found = by_chance(grid, [*BOXES, []], 40, rounding=rounding)
    cells = torch.eye(grid[0] * grid[1]).reshape(-1, *grid)
    drawn = torch.from_numpy(np.random.default_rng(0).standard_normal((DRAWS, *grid)))
    for row, boxes in enumerate(BOXES):
        hits = place_scores(cells, [boxes] * len(cells), 40, rounding=rounding)["hit"]
        precisions = place_scores(drawn, [boxes] * DRAWS, 40, rounding=rounding)["auprc"]
        assert found.loc[row].tolist() == pytest.approx([hits.mean(), precisions.mean()], abs=1e-12)
        if grid == (1, 1):
            assert found.loc[row].tolist() == pytest.approx([box_mask(boxes, 40).mean()] * 2, abs=1e-12)
    assert found.loc[len(BOXES)].isna().all() and len(by_chance(grid, [], 40)) == 0


def test_other_random_maps_reach_the_chance_that_is_stated_and_not_the_share_of_the_film():
    rng, size = np.random.default_rng(5), 66
    corners = rng.uniform(0, 44, (60, 2))
    boxes = [[(x, y, x + width, y + height)] for (x, y), (width, height) in zip(corners, rng.uniform(8, 22, (60, 2)))]
    stated, n = by_chance((4, 4), boxes, size).mean(), 24
    draws = (torch.from_numpy(rng.normal(size=(60, 4, 4))) for _ in range(n))
    reached = [place_scores(maps, boxes, size)[["hit", "auprc"]].mean() for maps in draws]
    reached, area = np.array(reached), np.mean([box_mask(one, size).mean() for one in boxes])
    error = reached.std(axis=0, ddof=1) / np.sqrt(n)
    assert abs(reached[:, 0].mean() - stated["hit_chance"]) < 4 * error[0]
    assert abs(reached[:, 1].mean() - stated["auprc_chance"]) < 0.006 < 0.02 < stated["auprc_chance"] - area


def test_boxes_without_area_have_no_score_and_no_pairs_no_rows():
    found = place_scores(maps(2), [[], [(50, 50, 60, 60)]], 40)
    assert found.isna().all(axis=None)
    assert len(place_scores(torch.zeros(0, 5, 5), [], 40)) == 0


def test_maps_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        place_scores(torch.full((1, 5, 5), torch.nan), BOXES[:1], 40)
    with pytest.raises(ValueError, match="one list of boxes a map"):
        place_scores(maps(2), BOXES[:1], 40)


def test_a_threshold_is_tuned_on_other_patients_only():
    rng = np.random.default_rng(3)
    patients = np.array([f"p{i // 2}" for i in range(20)])
    ious = rng.random((20, 6))
    tuned = tuned_iou(ious, patients)
    names = sorted(set(patients))
    half = {names[i] for i in np.random.default_rng(0).permutation(10)[:5]}
    for pair in range(20):
        others = [row for row in range(20) if (patients[row] in half) != (patients[pair] in half)]
        assert tuned[pair] == ious[pair, np.mean(ious[others], axis=0).argmax()]
    # What a pair scores elsewhere does not choose its own threshold, nor does the order of the pairs.
    turned = rng.permutation(20)
    np.testing.assert_array_equal(tuned_iou(ious[turned], patients[turned]), tuned[turned])


def test_undefined_pairs_are_left_out_of_the_tuning():
    ious, patients = np.array([[0.1, 0.9], [np.nan, np.nan], [0.8, 0.2], [0.7, 0.1]]), np.array(list("abcd"))
    tuned = tuned_iou(ious, patients)
    assert np.isnan(tuned[1]) and not np.isnan(tuned[[0, 2, 3]]).any()
    assert np.isnan(tuned_iou(ious[:1], patients[:1])).all()  # nobody else to tune on
    with pytest.raises(ValueError, match="the patient of each pair"):
        tuned_iou(ious, patients[:3])

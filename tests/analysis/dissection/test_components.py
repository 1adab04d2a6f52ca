import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from lib.analysis.dissection.components import count_concepts
from lib.analysis.localization import box_mask
from tests.analysis.dissection import reference_dissection as reference
from tests.analysis.dissection.reference_dissection import BOXES, channels, features


def box_masks(size, side):
    """Of `BOXES`, at both resolutions."""
    return {
        "image": [box_mask(b, size) for b in BOXES],
        "native": [reference.box_cells(b, size, side, side) for b in BOXES],
    }


@pytest.mark.parametrize("side, q", [(28, 0.01), (14, 0.04), (7, 0.04), (17, 0.1), (3, 0.2), (1, 0.3)])
def test_counts_equal_flood_fill(side, q):
    maps, masks = features((5, 3, side, side), seed=side), box_masks(96, side)
    for tau in (reference.quantiles(maps, q), np.zeros(3, np.float32)):
        for resolution, connectivity, clip in itertools.product(("image", "native"), (8, 4), (False, True)):
            ours = count_concepts(maps, tau, BOXES, 96, resolution=resolution, connectivity=connectivity, clip=clip)
            np.testing.assert_array_equal(
                ours, reference.count(maps, tau, masks[resolution], 96, resolution, connectivity, clip)
            )
            assert ours.dtype == np.int32 and (ours[[2, 4]] == 0).all()


def labelled(mask, boxes, connectivity):
    labels, _ = ndimage.label(mask, np.ones((3, 3)) if connectivity == 8 else None)
    return len(np.setdiff1d(labels[boxes], 0))


@pytest.mark.parametrize("shape", [(28, 28), (14, 14), (7, 7), (56, 56), (10, 13)])
@pytest.mark.parametrize("size", [224, 227])
def test_counts_equal_scipy_on_torch_maps(shape, size):
    generator = np.random.default_rng(0)
    corner = generator.uniform(-20, 200, (8, 2))
    boxes = [[(*c, *(c + generator.uniform(1, 90, 2)))] for c in corner]
    maps = features((8, 12, *shape), seed=1, sparse=False)
    tau = np.quantile(channels(maps).numpy(), [0.99, 0.96, 0.8, 0.5] * 3, axis=1)[np.arange(12), np.arange(12)].astype(
        np.float32
    )
    up = reference.enlarged(maps, size).numpy()
    for connectivity in (8, 4):
        ours = count_concepts(maps, tau, boxes, size, connectivity=connectivity)
        expected = [
            [labelled(up[b, f] >= tau[f], box_mask(boxes[b], size), connectivity) for f in range(12)] for b in range(8)
        ]
        np.testing.assert_array_equal(ours, expected)


def test_ties_at_tau():
    """Whole-number maps meet tau in many pixels, on flat plateaus too; '>=' keeps them."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(-2, 3, (6, 8, 9, 9), generator=generator).float()
    maps[:, 4:] = (maps[:, 4:] + 3) / 3
    tau = np.array([1, 2, 0, -1, 1, 4 / 3, 5 / 3, 2 / 3], dtype=np.float32)
    boxes = [[(0, 0, 50, 70)]] * 6
    for resolution in ("image", "native"):
        masks = [box_mask(b, 144) if resolution == "image" else reference.box_cells(b, 144, 9, 9) for b in boxes]
        ours = count_concepts(maps, tau, boxes, 144, resolution=resolution)
        np.testing.assert_array_equal(ours, reference.count(maps, tau, masks, 144, resolution))


def test_plateaus_one_rounding_step_around_tau():
    """Where a plateau lies within rounding of tau, the pixels are those of torch's kernel; its other kernels differ by
    at most 2 ulp."""
    tau = np.float32(1.7)
    below, above = np.nextafter(tau, np.float32(0)), np.nextafter(tau, np.float32(2))
    generator = np.random.default_rng(0)
    levels = np.array([below, tau, above, 0.3], np.float32)
    maps = torch.from_numpy(generator.choice(levels, (10, 6, 7, 7), p=[0.4, 0.2, 0.2, 0.2]))
    boxes = [[(0, 0, 224, 224)]] * 10
    up = reference.enlarged(maps, 224)
    ours = count_concepts(maps, np.full(6, tau), boxes, 224)
    expected = [[labelled(m >= tau, np.ones((224, 224), bool), 8) for m in film] for film in up.numpy()]
    np.testing.assert_array_equal(ours, expected)
    other = F.interpolate(
        maps.to(memory_format=torch.channels_last), size=(224, 224), mode="bilinear", align_corners=False
    )
    assert (up - other).abs().max() <= 2 * np.spacing(np.float32(1.7))


def one(mask, boxes, **options):
    """Count on a drawn mask: native resolution, one cell a pixel."""
    maps = torch.tensor(mask.copy(), dtype=torch.float32)[None, None]
    return int(count_concepts(maps, np.array([0.5]), [boxes], maps.shape[-1], resolution="native", **options)[0, 0])


def test_ring_is_one_component():
    ring = np.zeros((9, 9))
    ring[2:7, 2:7], ring[3:6, 3:6] = 1, 0
    assert one(ring, [(0, 0, 9, 9)]) == 1
    assert one(ring, [(4, 4, 5, 5)]) == 0  # inside the hole
    ring[4, 4] = 1
    assert one(ring, [(0, 0, 9, 9)]) == 2


@pytest.mark.parametrize("side", [14, 7, 17, 1])
def test_contours_count_holes_too(side):
    maps, masks = features((5, 3, side, side), seed=side + 1), box_masks(40, side)
    for tau in (reference.quantiles(maps, 0.2), np.zeros(3, np.float32)):
        for resolution, clip in itertools.product(("image", "native"), (False, True)):
            options = {"resolution": resolution, "clip": clip}
            ours = count_concepts(maps, tau, BOXES, 40, counting="contours", **options)
            np.testing.assert_array_equal(
                ours, reference.count(maps, tau, masks[resolution], 40, resolution, 8, clip, "contours")
            )
            assert (ours >= count_concepts(maps, tau, BOXES, 40, **options)).all() and (ours[[2, 4]] == 0).all()


def test_contours_of_drawn_masks():
    target = np.zeros((15, 15))
    for inset, value in ((1, 1), (3, 0), (5, 1), (6, 0), (7, 1)):  # ring in ring around a dot
        target[inset : 15 - inset, inset : 15 - inset] = value
    everywhere, outer_only, dot = [(0, 0, 15, 15)], [(0, 0, 2, 15)], [(7, 7, 8, 8)]
    assert [one(target, boxes) for boxes in (everywhere, outer_only, dot)] == [3, 1, 1]
    assert [one(target, boxes, counting="contours") for boxes in (everywhere, outer_only, dot)] == [5, 2, 1]
    assert one(target, outer_only, counting="contours", clip=True) == 1  # cut to a bar, the ring has no hole
    gap = np.ones((3, 3))
    gap[1, 1] = 0
    assert one(gap, [(0, 0, 3, 3)], counting="contours") == 2  # against the margin of the film
    gap[0, 1] = 0
    assert one(gap, [(0, 0, 3, 3)], counting="contours") == 1
    assert one(1 - np.eye(5), [(0, 0, 5, 5)], counting="contours") == 4  # holes do not join at corners; two are open
    assert one(np.zeros((4, 4)), [(0, 0, 4, 4)], counting="contours") == 0


def test_contours_of_many_channels():
    """Maps are enlarged a block of channels at a time; unusable ones are left out, a dead one is a film full."""
    maps = features((2, 150, 7, 7), seed=3)
    maps[:, 140] = 0
    tau = reference.quantiles(maps, 0.1)
    usable = np.arange(150) % 3 > 0
    boxes = [[(10, 5, 30, 35)]] * 2
    whole = count_concepts(maps, tau, boxes, 40, counting="contours")
    expected = reference.count(maps, tau, [box_mask(b, 40) for b in boxes], 40, "image", counting="contours")
    np.testing.assert_array_equal(whole, expected)
    assert (whole[:, 140] == 1).all()
    np.testing.assert_array_equal(
        count_concepts(maps, tau, boxes, 40, counting="contours", usable=usable), whole * usable
    )


def test_diagonal_components():
    assert one(np.eye(6), [(0, 0, 6, 6)]) == 1
    assert one(np.eye(6), [(0, 0, 6, 6)], connectivity=4) == 6
    assert one(np.fliplr(np.eye(6)), [(0, 0, 6, 6)]) == 1
    assert one(np.fliplr(np.eye(6)), [(0, 0, 2, 6)], connectivity=4) == 2
    checker = np.indices((8, 8)).sum(axis=0) % 2
    assert one(checker, [(0, 0, 8, 8)]) == 1
    assert one(checker, [(0, 0, 8, 8)], connectivity=4) == 32


def test_component_that_a_box_cuts_counts_once():
    comb = np.zeros((8, 8))
    comb[0, :] = 1
    comb[:, ::2] = 1  # teeth joined above the box
    box = [(0, 4, 8, 8)]
    assert one(comb, box) == 1
    assert one(comb, box, clip=True) == 4
    assert one(comb, [(0, 4, 1, 8), (4, 4, 5, 8)]) == 1  # one component, two boxes
    u_shape = np.array([[1, 0, 1], [1, 0, 1], [1, 1, 1]])
    assert one(u_shape, [(0, 0, 3, 1)]) == 1
    assert one(u_shape, [(0, 0, 3, 1)], clip=True) == 2


def test_spirals_and_full_maps():
    spiral = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    assert one(spiral, [(2, 2, 3, 3)], connectivity=4) == 1
    assert one(np.ones((5, 5)), [(4, 4, 5, 5)]) == 1
    assert one(np.zeros((5, 5)), [(0, 0, 5, 5)]) == 0


def test_a_box_touches_every_cell_it_covers_a_part_of():
    corner = np.zeros((7, 7))
    corner[3, 3] = 1
    maps = torch.as_tensor(corner, dtype=torch.float32)[None, None]

    def count(box, resolution):
        return int(count_concepts(maps, np.array([0.5]), [[box]], 224, resolution=resolution)[0, 0])

    assert count((0, 0, 96.2, 96.2), "native") == 1  # cell 3 starts at pixel 96
    assert count((0, 0, 96, 96), "native") == 0
    assert count((127.9, 127.9, 224, 224), "native") == 1
    assert count((128, 128, 224, 224), "native") == 0
    assert count((0, 0, 98, 98), "image") == 0  # enlarged, the blob is about the diamond around (112, 112)
    assert count((0, 0, 112, 112), "image") == 1


def test_extreme_values():
    maps = features((2, 6, 7, 7), sparse=False)
    scale = torch.tensor([1e-38, 1e38, 1e-44, 3e37, 1.0, 1e-20]).reshape(1, 6, 1, 1)
    maps = maps * scale
    maps[0, 4, 3, 3], maps[1, 4, 2, 2] = 3.4e38, -3.4e38
    tau = np.quantile(channels(maps).numpy().astype(np.float64), 0.9, axis=1).astype(np.float32)
    boxes = [[(30, 30, 150, 180)]] * 2
    for resolution in ("image", "native"):
        masks = [box_mask(b, 224) if resolution == "image" else reference.box_cells(b, 224, 7, 7) for b in boxes]
        np.testing.assert_array_equal(
            count_concepts(maps, tau, boxes, 224, resolution=resolution),
            reference.count(maps, tau, masks, 224, resolution),
        )


def test_counts_do_not_depend_on_batches_order_or_layout():
    maps = features((5, 6, 14, 14))
    tau = reference.quantiles(maps, 0.04)
    whole = count_concepts(maps, tau, BOXES, 96)
    assert whole.sum() > 0
    parts = [count_concepts(maps[i : i + 1], tau, BOXES[i : i + 1], 96) for i in range(5)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    np.testing.assert_array_equal(whole[::-1], count_concepts(maps.flip(0), tau, BOXES[::-1], 96))
    np.testing.assert_array_equal(whole, count_concepts(maps.to(memory_format=torch.channels_last), tau, BOXES, 96))
    assert count_concepts(maps[:0], tau, [], 96).shape == (0, 6)
    assert count_concepts(maps[:0], tau, [], 96, resolution="native").shape == (0, 6)


def test_count_refuses_wrong_input():
    maps, tau = features((5, 3, 7, 7)), np.ones(3)
    with pytest.raises(ValueError, match="5 films, 4 lists"):
        count_concepts(maps, tau, BOXES[:4], 96)
    with pytest.raises(ValueError, match="3 channels"):
        count_concepts(maps, tau[:2], BOXES, 96)
    with pytest.raises(ValueError, match="tau of channel 1 is NaN"):
        count_concepts(maps, np.array([1, np.nan, 1]), BOXES, 96)
    with pytest.raises(ValueError, match="connectivity"):
        count_concepts(maps, tau, BOXES, 96, connectivity=6)
    with pytest.raises(ValueError, match="resolution"):
        count_concepts(maps, tau, BOXES, 96, resolution="film")
    with pytest.raises(ValueError, match="counting must be 'components' or 'contours', got 'blobs'"):
        count_concepts(maps, tau, BOXES, 96, counting="blobs")
    with pytest.raises(ValueError, match="connectivity must be 8"):
        count_concepts(maps, tau, BOXES, 96, counting="contours", connectivity=4)
    with pytest.raises(ValueError, match="full precision"):
        count_concepts(maps.half(), tau, BOXES, 96)
    for value in (float("nan"), float("inf")):
        maps[3, 2, 1, 1] = value
        for resolution in ("image", "native"):
            for counting in ("components", "contours"):
                with pytest.raises(ValueError, match="channel 2 of film 3"):
                    count_concepts(maps, tau, BOXES, 96, resolution=resolution, counting=counting)


def test_works_without_a_writable_cache_folder():
    """numba refuses to cache where neither the source folder nor the user's can be written; the functions must be
    compiled all the same."""
    code = (
        "import numba.core.caching as c\nc.CacheImpl._locator_classes = []\n"
        "import numpy as np, torch\nfrom lib.analysis.dissection.components import count_concepts\n"
        "print(count_concepts(torch.ones(1, 1, 3, 3), np.array([0.5]), [[(0, 0, 9, 9)]], 9, resolution='native')[0, 0])"
    )
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from lib.analysis.dissection import StreamingQuantile, concept_means, concept_totals, count_concepts
from lib.analysis.localization import box_mask
from tests import reference_dissection as reference

BOXES = [[(10.3, 20.2, 60.7, 80.1)], [(5, 5, 30, 30), (20, 20, 70, 50.5)], [], [(-10, -10, 106, 20), (90, 90, 200, 200)],
         [(40, 40, 40, 60)]]


def features(shape, seed=0, sparse=True):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    smooth = F.avg_pool2d(noise, 3, 1, 1) + 0.2 * noise
    return smooth.relu() if sparse else smooth


def thresholds(maps, q, batch=3):
    stream = StreamingQuantile(q, len(maps), "layer3")
    for i in range(0, len(maps), batch):
        stream.update(maps[i:i + batch])
    return stream.result()


def channels(maps):
    return maps.transpose(0, 1).flatten(1)


# --- thresholds


@pytest.mark.parametrize("q", [0.01, 0.04, 0.3, 0.999, 1e-9])
@pytest.mark.parametrize("shape", [(23, 5, 7, 7), (9, 3, 28, 28), (1, 2, 1, 1), (2, 3, 1, 2), (40, 2, 14, 13)])
@pytest.mark.parametrize("sparse", [True, False])
def test_quantile_is_exact(q, shape, sparse):
    maps = features(shape, sparse=sparse)
    result = thresholds(maps, q)
    flat = channels(maps).numpy()
    expected = np.quantile(flat.astype(np.float64), 1 - q, axis=1).astype(np.float32)
    np.testing.assert_array_equal(result.tau, expected)
    np.testing.assert_array_max_ulp(result.tau, np.array([reference.quantile(f, q) for f in flat]), 1)
    np.testing.assert_array_equal(result.low, flat.min(axis=1))
    np.testing.assert_array_equal(result.high, flat.max(axis=1))
    assert result.tau.dtype == np.float32


def test_quantile_selects_the_share_q():
    maps = features((30, 4, 28, 28), sparse=False)
    tau = thresholds(maps, 0.01).tau
    share = (channels(maps).numpy() >= tau[:, None]).mean(axis=1)
    np.testing.assert_allclose(share, 0.01, atol=1e-4)


def test_quantile_against_torch():
    """torch rounds the rank to float32: its answer lies between the same two neighbours as long as the rank is below 2^24."""
    maps = features((30, 4, 28, 28), sparse=False)
    flat = channels(maps)
    ours, peer = thresholds(maps, 0.01).tau, torch.quantile(flat, 0.99, dim=1).numpy()
    ordered = np.sort(flat.numpy(), axis=1)
    at = [np.searchsorted(o, p) for o, p in zip(ordered, peer, strict=True)]
    gap = np.array([o[min(i + 1, len(o) - 1)] - o[i - 1] for o, i in zip(ordered, at, strict=True)])
    assert (np.abs(ours - peer) <= 0.01 * gap + np.spacing(peer)).all()


def test_quantile_does_not_depend_on_batches_or_order():
    maps = features((37, 6, 14, 14))
    maps[3, 2] *= 100
    one = thresholds(maps, 0.02, 1)
    for batch, order in [(37, range(37)), (5, range(36, -1, -1)), (16, np.random.default_rng(0).permutation(37))]:
        other = thresholds(maps[list(order)], 0.02, batch)
        for name in ("tau", "low", "high", "usable"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    strided = thresholds(maps.to(memory_format=torch.channels_last), 0.02, 8)
    np.testing.assert_array_equal(one.tau, strided.tau)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_quantile_of_sorted_streams(order):
    values = torch.arange(50 * 64, dtype=torch.float32)
    maps = (values if order == "rising" else values.flip(0)).reshape(50, 1, 8, 8)
    result = thresholds(maps, 0.1, 7)
    assert result.tau[0] == np.float32(np.quantile(values.numpy().astype(np.float64), 0.9))


def test_quantile_memory_is_a_share_of_the_maps():
    stream = StreamingQuantile(0.01, 880)
    stream.update(features((1, 16, 28, 28)))
    assert stream._kept.nbytes < 0.0126 * 880 * 16 * 28 * 28 * 4


def test_degenerate_channels_are_not_usable():
    maps = features((20, 7, 14, 14), sparse=False)
    maps[:, 1] = 0                                              # dead
    maps[:, 2] = 3.7                                            # constant
    maps[:, 3] = 3.7 * (1 + 1e-7 * maps[:, 3])                  # constant up to rounding
    maps[:, 4] = 0
    maps[0, 4, :3, :3] = 5                                      # 9 of 3920 values: fewer than q active, tau is the minimum
    maps[:, 5] = -2.0
    maps[:, 6] = maps[:, 6].relu()
    result = thresholds(maps, 0.01)
    assert result.usable.tolist() == [True, False, False, False, False, False, True]
    assert result.tau[4] == result.low[4] == 0
    boxes = [[(20, 20, 60, 60)]] * 20
    excluded = count_concepts(maps, result.tau, boxes, 96, usable=result.usable)
    assert (excluded[:, 1:6] == 0).all() and excluded[:, 0].sum() > 0 and excluded[:, 6].sum() > 0
    counted = count_concepts(maps, result.tau, boxes, 96, resolution="native")
    assert (counted[:, [1, 2, 4, 5]] == 1).all()                # '>=' selects the whole film


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_quantile_names_what_is_not_finite(value):
    maps = features((8, 3, 5, 5))
    maps[6, 2, 1, 1] = value
    with pytest.raises(ValueError, match="layer3: NaN or infinite activation in channel 2 of film 6"):
        thresholds(maps, 0.1)


def test_quantile_refuses_wrong_input():
    stream = StreamingQuantile(0.1, 3, "layer3")
    stream.update(features((2, 3, 5, 5)))
    with pytest.raises(ValueError, match="2 films were seen, 3 announced"):
        stream.result()
    with pytest.raises(ValueError, match="one quantile needs one shape"):
        stream.update(features((1, 3, 5, 6)))
    with pytest.raises(ValueError, match="more than the 3 films"):
        stream.update(features((2, 3, 5, 5)))
    with pytest.raises(ValueError, match="float32"):
        stream.update(features((1, 3, 5, 5)).bfloat16())
    for q in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            StreamingQuantile(q, 3)
    with pytest.raises(ValueError, match="at least one film"):
        StreamingQuantile(0.1, 0)
    with pytest.raises(ValueError, match="0 films were seen, 3 announced"):
        StreamingQuantile(0.1, 3).result()


def test_quantile_of_extreme_values():
    values = torch.tensor([-3.4e38, 3.4e38, 1e-45, -1e-45, 0.0, 1e30, -1e30, 5.0]).reshape(1, 1, 2, 4)
    for q in (0.05, 0.2, 0.9):
        assert thresholds(values, q).tau[0] == reference.quantile(values.numpy(), q)


# --- components


@pytest.mark.parametrize("connectivity", [8, 4])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("side, q", [(28, 0.01), (14, 0.04), (7, 0.04), (17, 0.1), (3, 0.2), (1, 0.3)])
def test_counts_equal_flood_fill(side, q, connectivity, clip):
    maps = features((5, 3, side, side), seed=side)
    for tau in (thresholds(maps, q).tau, np.zeros(3, np.float32)):
        for resolution in ("image", "native"):
            masks = [box_mask(b, 96) if resolution == "image" else reference.box_cells(b, 96, side, side) for b in BOXES]
            ours = count_concepts(maps, tau, BOXES, 96, resolution=resolution, connectivity=connectivity, clip=clip)
            np.testing.assert_array_equal(ours, reference.count(maps, tau, masks, 96, resolution, connectivity, clip))
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
    tau = np.quantile(channels(maps).numpy(), [0.99, 0.96, 0.8, 0.5] * 3, axis=1)[np.arange(12), np.arange(12)].astype(np.float32)
    up = reference.enlarged(maps, size).numpy()
    for connectivity in (8, 4):
        ours = count_concepts(maps, tau, boxes, size, connectivity=connectivity)
        expected = [[labelled(up[b, f] >= tau[f], box_mask(boxes[b], size), connectivity) for f in range(12)] for b in range(8)]
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
    """Where a plateau lies within rounding of tau, the pixels are those of torch's kernel; its other kernels differ by at most 2 ulp."""
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
    other = F.interpolate(maps.to(memory_format=torch.channels_last), size=(224, 224), mode="bilinear", align_corners=False)
    assert (up - other).abs().max() <= 2 * np.spacing(np.float32(1.7))


def one(mask, boxes, **options):
    """Count on a drawn mask: native resolution, one cell a pixel."""
    maps = torch.tensor(mask.copy(), dtype=torch.float32)[None, None]
    return int(count_concepts(maps, np.array([0.5]), [boxes], maps.shape[-1], resolution="native", **options)[0, 0])


def test_ring_is_one_component():
    ring = np.zeros((9, 9))
    ring[2:7, 2:7], ring[3:6, 3:6] = 1, 0
    assert one(ring, [(0, 0, 9, 9)]) == 1
    assert one(ring, [(4, 4, 5, 5)]) == 0                       # inside the hole
    ring[4, 4] = 1
    assert one(ring, [(0, 0, 9, 9)]) == 2


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
    comb[:, ::2] = 1                                            # teeth joined above the box
    box = [(0, 4, 8, 8)]
    assert one(comb, box) == 1
    assert one(comb, box, clip=True) == 4
    assert one(comb, [(0, 4, 1, 8), (4, 4, 5, 8)]) == 1         # one component, two boxes
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

    assert count((0, 0, 96.2, 96.2), "native") == 1             # cell 3 starts at pixel 96
    assert count((0, 0, 96, 96), "native") == 0
    assert count((127.9, 127.9, 224, 224), "native") == 1
    assert count((128, 128, 224, 224), "native") == 0
    assert count((0, 0, 98, 98), "image") == 0                  # enlarged, the blob is about the diamond around (112, 112)
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
        np.testing.assert_array_equal(count_concepts(maps, tau, boxes, 224, resolution=resolution),
                                      reference.count(maps, tau, masks, 224, resolution))


def test_counts_do_not_depend_on_batches_order_or_layout():
    maps = features((5, 6, 14, 14))
    tau = thresholds(maps, 0.04).tau
    whole = count_concepts(maps, tau, BOXES, 96)
    assert whole.sum() > 0
    parts = [count_concepts(maps[i:i + 1], tau, BOXES[i:i + 1], 96) for i in range(5)]
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
    with pytest.raises(ValueError, match="full precision"):
        count_concepts(maps.half(), tau, BOXES, 96)
    for value in (float("nan"), float("inf")):
        maps[3, 2, 1, 1] = value
        for resolution in ("image", "native"):
            with pytest.raises(ValueError, match="channel 2 of film 3"):
                count_concepts(maps, tau, BOXES, 96, resolution=resolution)


# --- totals


def test_totals_and_means():
    counts = np.array([[2, 0, 1], [0, 0, 0], [5, 1, 1]])
    totals = concept_totals(counts)
    assert totals["disjoint"].tolist() == [3, 0, 7] and totals["unique"].tolist() == [2, 0, 3]
    assert concept_means(totals).tolist() == pytest.approx([10 / 3, 5 / 3])
    assert concept_means(totals, np.array([1, 1, 2])).tolist() == pytest.approx([17 / 4, 8 / 4])    # a film with two boxes counts twice


@pytest.mark.parametrize("resolution", ["image", "native"])
def test_planted_detectors_are_counted_and_noise_is_not(resolution):
    generator = np.random.default_rng(4)
    n, size, side = 60, 96, 12
    boxes, lesions = [], []
    for _ in range(n):
        extent = generator.integers(12, 20, 2)
        corner = generator.integers(0, size - extent)
        boxes.append([(*corner, *(corner + extent))])
        lesions.append(box_mask(boxes[-1], size))
    lesion = F.avg_pool2d(torch.from_numpy(np.stack(lesions)).float()[:, None], size // side)[:, 0]
    noise = torch.from_numpy(generator.random((n, side, side)).astype(np.float32))
    maps = torch.stack([lesion + 0.05 * noise,                  # detector of the lesion
                        noise,                                  # anywhere
                        torch.zeros_like(noise),                # dead
                        torch.full_like(noise, 0.3),            # constant
                        lesion.roll(side // 2, dims=2)], dim=1)     # fires, but always beside the lesion
    result = thresholds(maps, 0.01)
    assert result.usable.tolist() == [True, True, False, False, True]
    counts = count_concepts(maps, result.tau, boxes, size, resolution=resolution, usable=result.usable)
    share = (counts > 0).mean(axis=0)
    fires = (channels(maps).numpy() >= result.tau[:, None]).reshape(5, n, -1).any(axis=2).mean(axis=1)
    assert 0.95 * fires[0] < share[0] <= fires[0] and share[0] > 0.3    # where it fires it is on the lesion; enlarging lowers a few peaks
    assert share[1] < 0.2 * fires[1] and share[4] < 0.1 * fires[4]
    assert share[2] == share[3] == 0
    shuffled = count_concepts(maps, result.tau, boxes[1:] + boxes[:1], size, resolution=resolution, usable=result.usable)
    assert (shuffled[:, 0] > 0).mean() < 0.3 * share[0]


def test_works_without_a_writable_cache_folder():
    """numba refuses to cache where neither the source folder nor the user's can be written; the functions must be compiled all the same."""
    code = ("import numba.core.caching as c\nc.CacheImpl._locator_classes = []\n"
            "import numpy as np, torch\nfrom lib.analysis.dissection import count_concepts\n"
            "print(count_concepts(torch.ones(1, 1, 3, 3), np.array([0.5]), [[(0, 0, 9, 9)]], 9, resolution='native')[0, 0])")
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from lib.analysis.dissection.components import count_concepts
from lib.analysis.dissection.concepts import Dissection, concept_records, concept_totals
from lib.analysis.dissection.quantile import StreamingQuantile, batch_thresholds
from lib.analysis.localization import box_mask
from tests.analysis.dissection import reference_dissection as reference
from tests.analysis.dissection.reference_dissection import channels, features


def thresholds(maps, q, batch=3, image_size=None):
    stream = StreamingQuantile(q, len(maps), "layer3", image_size)
    for i in range(0, len(maps), batch):
        stream.update(maps[i : i + batch])
    return stream.result()


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
    """torch rounds the rank to float32: its answer lies between the same two neighbours as long as the rank is below
    2^24."""
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
    maps[:, 1] = 0  # dead
    maps[:, 2] = 3.7  # constant
    maps[:, 3] = 3.7 * (1 + 1e-7 * maps[:, 3])  # constant up to rounding
    maps[:, 4] = 0
    maps[0, 4, :3, :3] = 5  # 9 of 3920 values: fewer than q active, tau is the minimum
    maps[:, 5] = -2.0
    maps[:, 6] = maps[:, 6].relu()
    result = thresholds(maps, 0.01)
    assert result.usable.tolist() == [True, False, False, False, False, False, True]
    assert result.tau[4] == result.low[4] == 0
    boxes = [[(20, 20, 60, 60)]] * 20
    excluded = count_concepts(maps, result.tau, boxes, 96, usable=result.usable)
    assert (excluded[:, 1:6] == 0).all() and excluded[:, 0].sum() > 0 and excluded[:, 6].sum() > 0
    counted = count_concepts(maps, result.tau, boxes, 96, resolution="native")
    assert (counted[:, [1, 2, 4, 5]] == 1).all()  # '>=' selects the whole film


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


# --- other readings


@pytest.mark.parametrize("q", [0.01, 0.04, 0.3])
@pytest.mark.parametrize(
    "shape, size",
    [((6, 3, 7, 7), 40), ((4, 2, 14, 14), 224), ((3, 70, 5, 9), 32), ((2, 2, 1, 1), 16), ((2, 2, 8, 8), 8)],
)
def test_quantile_of_enlarged_maps(q, shape, size):
    maps = features(shape, seed=5, sparse=False)
    up = reference.enlarged(maps, size)
    expected = np.quantile(channels(up).numpy().astype(np.float64), 1 - q, axis=1).astype(np.float32)
    for batch in (1, 4):
        result = thresholds(maps, q, batch, size)
        np.testing.assert_array_equal(result.tau, expected)
        np.testing.assert_array_equal(result.low, channels(maps).numpy().min(axis=1))
        np.testing.assert_array_equal(result.high, channels(maps).numpy().max(axis=1))
    share = (channels(up).numpy() >= result.tau[:, None]).mean(axis=1)
    if shape[2:] != (1, 1):
        np.testing.assert_allclose(
            share, q, atol=2e-3 + 1 / channels(up).shape[1]
        )  # ties: the margin of an enlarged map is flat
    if shape[2:] == (7, 7):
        assert (result.tau != thresholds(maps, q).tau).all()


def test_enlarging_does_not_bring_dead_channels_to_life():
    """A constant is not exactly constant after interpolation; what is a little above its minimum there is still the
    whole film."""
    maps = torch.full((20, 5, 7, 7), 3.7)
    maps[:, 1] = 0
    maps[:, 2] = -2.3
    maps[0, 2, 3, 3] = 5  # too sparse for q
    maps[:, 3] = 0.1
    maps[:, 3, 2:4, 2:4] = 0.7
    maps[:, 4] = features((20, 7, 7), sparse=False)
    up = reference.enlarged(maps, 45)
    assert up[:, 0].min() < up[:, 0].max()  # the trap is there
    assert thresholds(maps, 0.01, image_size=45).usable.tolist() == [False, False, False, True, True]


def test_quantile_of_each_batch():
    maps = features((12, 6, 7, 7), seed=2)
    maps[6:] *= 3
    boxes = reference.BOXES[:2] * 6
    whole = thresholds(maps, 0.05)
    for first in (0, 6):
        part = maps[first : first + 6]
        for size in (None, 30):
            result = batch_thresholds(part, 0.05, "layer3", size)
            np.testing.assert_array_equal(
                result.tau, reference.quantiles(part if size is None else reference.enlarged(part, size), 0.05)
            )
            assert (result.tau != whole.tau).all() and result.usable.all()
        tau = batch_thresholds(part, 0.05).tau
        counts = count_concepts(part, tau, boxes[first : first + 6], 96, resolution="native")
        masks = [reference.box_cells(b, 96, 7, 7) for b in boxes[first : first + 6]]
        np.testing.assert_array_equal(counts, reference.count(part, tau, masks, 96, "native"))
    with pytest.raises(ValueError, match="layer3: NaN"):
        batch_thresholds(torch.full((1, 1, 2, 2), torch.nan), 0.1, "layer3")
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel, got 0"):
        batch_thresholds(maps, 0.1, image_size=0)


# --- totals


def test_totals():
    counts = np.array([[2, 0, 1], [0, 0, 0], [5, 1, 1]])
    totals = concept_totals(counts)
    assert totals["disjoint"].tolist() == [3, 0, 7] and totals["unique"].tolist() == [2, 0, 3]


def test_records_of_films_or_of_pairs():
    counts, rows = np.array([[2, 0, 1], [5, 1, 1]]), np.array([7, 3])
    films = pd.DataFrame({"image": ["a", "b", "c"], "patient": ["1", "1", "2"]}, index=[3, 5, 7])
    found = Dissection(rows, counts, None)
    assert concept_records(found, films).values.tolist() == [["c", "2", 3, 2], ["a", "1", 7, 3]]
    pairs = pd.DataFrame({"image": ["a", "c", "a"], "class": ["Mass", "Mass", "Edema"], "n_boxes": 1})
    table = concept_records(found, films, pairs)  # the other reading: a film counts once for every pair
    assert table.values.tolist() == [["c", "2", 3, 2, "Mass"], ["a", "1", 7, 3, "Mass"], ["a", "1", 7, 3, "Edema"]]
    assert table["disjoint"].mean() == pytest.approx(17 / 3)


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
    maps = torch.stack(
        [
            lesion + 0.05 * noise,  # detector of the lesion
            noise,  # anywhere
            torch.zeros_like(noise),  # dead
            torch.full_like(noise, 0.3),  # constant
            lesion.roll(side // 2, dims=2),
        ],
        dim=1,
    )  # fires, but always beside the lesion
    result = thresholds(maps, 0.01)
    assert result.usable.tolist() == [True, True, False, False, True]
    counts = count_concepts(maps, result.tau, boxes, size, resolution=resolution, usable=result.usable)
    share = (counts > 0).mean(axis=0)
    fires = (channels(maps).numpy() >= result.tau[:, None]).reshape(5, n, -1).any(axis=2).mean(axis=1)
    assert (
        0.95 * fires[0] < share[0] <= fires[0] and share[0] > 0.3
    )  # where it fires it is on the lesion; enlarging lowers a few peaks
    assert share[1] < 0.2 * fires[1] and share[4] < 0.1 * fires[4]
    assert share[2] == share[3] == 0
    shuffled = count_concepts(
        maps, result.tau, boxes[1:] + boxes[:1], size, resolution=resolution, usable=result.usable
    )
    assert (shuffled[:, 0] > 0).mean() < 0.3 * share[0]

"""Do counted channels answer to the lesion? Against loops in float64, and on channels whose answer is known."""

import cv2
import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from lib.analysis.cam import resize
from lib.analysis.dissection.causal import RESPONDS, Readings, causal_summary, channel_readings, responses
from lib.analysis.dissection.quantile import Thresholds
from lib.analysis.inference import Output

SIZE, GRID, LAYER = 24, 6, "trunk"


def thresholds(tau, usable=None):
    tau = np.asarray(tau, np.float32)
    usable = np.ones(len(tau), bool) if usable is None else np.asarray(usable)
    return Thresholds(tau, tau - 1, tau + 1, usable)


def outputs(maps, batch=4):
    maps = torch.as_tensor(np.asarray(maps, np.float32))
    parts = [maps[k : k + batch] for k in range(0, len(maps), batch)]
    return [Output(np.arange(len(part)), torch.zeros(len(part), 1), {LAYER: part}) for part in parts]


def lesions_and_boxes(n, seed=0):
    rng, lesions, boxes = np.random.default_rng(seed), [], []
    for _ in range(n):
        x, y = rng.integers(0, 16, 2)
        w, h = rng.integers(2, 9, 2)
        lesion = np.zeros((SIZE, SIZE), bool)
        lesion[y : y + h, x : x + w] = True
        lesions.append(lesion)
        boxes.append(np.array([[x, y, min(x + w, SIZE), min(y + h, SIZE)]], float))
    return lesions, boxes


def read(maps, lesions, boxes, limits, **options):
    options = {"layer": LAYER, "image_size": SIZE} | options
    return channel_readings(outputs(maps), lesions, boxes, limits, **options)


def test_readings_against_loops():
    """Shares of the cells that a lesion covers are exact where pixels fill cells; a count is a region in the box."""
    maps, (lesions, boxes) = np.random.default_rng(1).normal(size=(9, 5, GRID, GRID)), lesions_and_boxes(9)
    limits = thresholds([0.5, 0.8, 1.1, 0.2, 0.0], [True, True, True, True, False])
    found, cell = read(maps, lesions, boxes, limits), SIZE // GRID
    for p, (lesion, box) in enumerate(zip(lesions, boxes, strict=True)):
        inside = np.zeros((SIZE, SIZE), bool)
        x1, y1, x2, y2 = box[0].astype(int)
        inside[y1:y2, x1:x2] = True
        for c in range(5):
            total = weight = 0.0
            for y in range(SIZE):
                for x in range(SIZE):
                    total += lesion[y, x] * float(np.float32(maps[p, c, y // cell, x // cell]))
                    weight += lesion[y, x]
            assert found.activation[p, c] == pytest.approx(total / weight, abs=1e-12)
            large = resize(torch.from_numpy(maps[p : p + 1, c].astype(np.float32)), SIZE)[0].numpy()
            _, labels = cv2.connectedComponents((large >= limits.tau[c]).astype(np.uint8), connectivity=8)
            assert found.counted[p, c] == (bool(np.setdiff1d(labels[inside], 0).size) and limits.usable[c])


def test_a_pair_for_every_film():
    maps, (lesions, boxes) = np.zeros((4, 2, GRID, GRID)), lesions_and_boxes(4)
    with pytest.raises(ValueError, match="4 pairs, but 3 films"):
        read(maps[:3], lesions, boxes, thresholds([1, 1]))
    with pytest.raises(ValueError, match="every film must have a pair of its own"):
        read(maps, lesions[:3], boxes, thresholds([1, 1]))
    with pytest.raises(ValueError, match="every pair a lesion with a pixel"):
        read(maps, [*lesions[:3], np.zeros((SIZE, SIZE), bool)], boxes, thresholds([1, 1]))


def summary_by_loops(present, absent):
    pairs, channels = present.activation.shape
    counts = survive = 0
    groups, often, far = {True: [], False: []}, [], []
    for c in range(channels):
        before = [absent.activation[p, c] for p in range(pairs)]
        mean = sum(before) / pairs
        spread = (sum((value - mean) ** 2 for value in before) / (pairs - 1)) ** 0.5
        counts += present.counted[:, c].sum()
        survive += (present.counted[:, c] & absent.counted[:, c]).sum()
        if spread == 0:
            continue
        z = [(present.activation[p, c] - absent.activation[p, c]) / spread for p in range(pairs)]
        for p in range(pairs):
            groups[bool(present.counted[p, c])].append(abs(z[p]) >= RESPONDS)
        often.append(present.counted[:, c].mean())
        far.append(sum(map(abs, z)) / pairs)
    return {
        "concepts": counts / pairs,
        "survive": survive / counts,
        "responds_counted": np.mean(groups[True]),
        "responds_uncounted": np.mean(groups[False]),
        "agreement": np.corrcoef(rankdata(often), rankdata(far))[0, 1],
    }


def test_the_summary_against_loops():
    rng = np.random.default_rng(2)
    present, absent = (Readings(rng.normal(size=(30, 8)), rng.random((30, 8)) < 0.4) for _ in range(2))
    absent.activation[:, 3] = 0.25  # the same everywhere: its response has no unit
    assert np.isnan(responses(present, absent)[:, 3]).all()
    found, expected = causal_summary(present, absent), summary_by_loops(present, absent)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_a_channel_that_sees_the_lesion_and_one_that_is_busy_everywhere():
    lesions, boxes = lesions_and_boxes(40)
    rng = np.random.default_rng(0)
    busy = 2 + 0.1 * rng.normal(size=(40, GRID, GRID))
    quiet = 0.1 * rng.normal(size=(40, GRID, GRID))
    seen = np.stack(
        [cv2.resize(lesion.astype(np.float32), (GRID, GRID), interpolation=cv2.INTER_AREA) for lesion in lesions]
    )
    limits = thresholds([0.5, 1.0])
    absent = read(np.stack([quiet, busy], 1), lesions, boxes, limits)
    present = read(np.stack([quiet + 3 * (seen > 0), busy], 1), lesions, boxes, limits)
    for channel, stands, answers in ((0, 0, 1), (1, 1, 0)):
        one = [Readings(part.activation[:, [channel]], part.counted[:, [channel]]) for part in (present, absent)]
        found = causal_summary(*one)
        assert found["concepts"] == 1 and found["survive"] == stands and found["responds_counted"] == answers
    both = causal_summary(present, absent)
    assert both["survive"] == 0.5 and both["responds_counted"] == 0.5 and np.isnan(both["responds_uncounted"])
    assert np.isnan(both["agreement"])  # both are counted on every film


def test_nothing_counted_is_undefined_and_not_zero():
    none = Readings(np.arange(6.0).reshape(3, 2), np.zeros((3, 2), bool))
    found = causal_summary(none, none)
    assert found["concepts"] == 0 and np.isnan(found["survive"]) and found["responds_uncounted"] == 0

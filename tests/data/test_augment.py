import math

import numpy as np
import pytest
import torch

from lib.data.augment import ATTEMPTS, DRAWS, _crop_windows, augmented_crops, cut_holes
from lib.data.batches import film_draws

SIDE = 48
# Where each step's draws begin.
CROP, PLACE, TRANSPOSE, FLIP, AFFINE, TONE, HOLES, PLACES = 0, 20, 22, 23, 24, 29, 32, 34


def smooth_films(n, side=SIDE, seed=0):
    """Waves of a few periods, so that half a step of interpolation moves a pixel by little; uint8 (n, side, side)."""
    y, x = np.mgrid[:side, :side] / side
    waves = np.random.default_rng(seed).uniform(0, 2 * np.pi, (n, 2))
    films = [127 + 60 * np.sin(3 * x + 2 * y + a) + 50 * np.cos(4 * y - 2 * x + b) for a, b in waves]
    return np.stack(films).astype(np.uint8)


def still(n=1):
    """Draws that leave a film as it is."""
    draws = np.full((n, DRAWS), 0.75)
    draws[:, CROP : CROP + ATTEMPTS], draws[:, CROP + ATTEMPTS : PLACE] = 1 - 1e-12, 0.5
    return draws


def augmented(film, draws, size=None, jitter=0.1):
    return augmented_crops(film[None], np.array([0]), draws, size or film.shape[0], jitter)[0]


# ---- the whole recipe, slowly: one pixel at a time, in float64


def bilinear(film, y, x, outside):
    y0, x0 = math.floor(y), math.floor(x)
    total = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - abs(y - y0 - dy)) * (1 - abs(x - x0 - dx))
            total += weight * film[outside(y0 + dy, len(film)), outside(x0 + dx, len(film[0]))]
    return total


def nearest_inside(i, n):
    return min(max(i, 0), n - 1)


def reflected(i, n):
    """... 2 1 | 0 1 2 ... n-1 | n-2 n-3 ..."""
    while not 0 <= i < n:
        i = -i if i < 0 else 2 * (n - 1) - i
    return i


def slow_window(draws, side):
    for k in range(ATTEMPTS):
        area = (0.08 + 0.92 * draws[k]) * side * side
        ratio = math.exp(math.log(3 / 4) + draws[ATTEMPTS + k] * 2 * math.log(4 / 3))
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if height <= side and width <= side:
            break
    else:
        height = width = side
    return int(draws[PLACE] * (side - height + 1)), int(draws[PLACE + 1] * (side - width + 1)), height, width


def slow_film(film, draws, size, jitter):
    top, left, height, width = slow_window(draws, len(film))
    crop = film[top : top + height, left : left + width].astype(float)
    y, x = ((np.arange(size) + 0.5) * side / size - 0.5 for side in (height, width))
    out = np.array([[bilinear(crop, y[i], x[j], nearest_inside) for j in range(size)] for i in range(size)])
    if draws[TRANSPOSE] < 0.5:
        out = np.array([[out[j, i] for j in range(size)] for i in range(size)])
    if draws[FLIP] < 0.5:
        out = np.array([[out[i, size - 1 - j] for j in range(size)] for i in range(size)])
    if draws[AFFINE] < 0.5:
        angle, scale, dx, dy = (2 * draws[AFFINE + 1 : AFFINE + 5] - 1) * (45, 0.1, size / 16, size / 16)
        cos, sin, centre = math.cos(math.radians(angle)), math.sin(math.radians(angle)), (size - 1) / 2
        back = []
        for i in range(size):
            for j in range(size):
                x, y = (j - centre - dx) / (1 + scale), (i - centre - dy) / (1 + scale)  # where the pixel came from
                back.append(bilinear(out, centre + sin * x + cos * y, centre + cos * x - sin * y, reflected))
        out = np.array(back).reshape(size, size)
    if jitter and draws[TONE] < 0.5:
        brightness, contrast = jitter * (2 * draws[TONE + 1 : TONE + 3] - 1)
        out = np.clip((1 + contrast) * out / 255 + brightness, 0, 1) * 255
    return out


@pytest.mark.parametrize("size, jitter", [(40, 0.1), (48, 0.3), (25, 0)])
def test_equals_the_recipe_pixel_by_pixel(size, jitter):
    images, rows = smooth_films(12), np.array([5, 0, 11, 3, 8, 9, 2])
    draws = film_draws(3, 1, rows, DRAWS)
    # Most combinations of the steps occur.
    assert len(np.unique(draws[:, [TRANSPOSE, FLIP, AFFINE, TONE]] < 0.5, axis=0)) >= 5
    ours = augmented_crops(images, rows, draws, size, jitter)
    assert ours.shape == (7, size, size) and ours.dtype == np.uint8
    for film, row, numbers in zip(ours, rows, draws, strict=True):
        # cv2 rounds to whole levels after each step, and places to 1/32 of a pixel.
        np.testing.assert_allclose(film, slow_film(images[row], numbers, size, jitter), atol=2.5)


# ---- single steps


def test_the_still_film():
    film = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    np.testing.assert_array_equal(augmented(film, still()), film)


def test_transpose_then_mirror():
    film = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    for transpose, flip, expected in ((0.49, 0.5, film.T), (0.5, 0.49, film[:, ::-1]), (0.0, 0.0, film.T[:, ::-1])):
        draws = still()
        draws[0, [TRANSPOSE, FLIP]] = transpose, flip
        np.testing.assert_array_equal(augmented(film, draws), expected)


def test_a_shift_reflects_what_comes_in():
    film = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    draws = still()
    draws[0, AFFINE : AFFINE + 5] = 0, 0.5, 0.5, 5 / 6, 1 / 6  # 2 to the right and 2 up, of at most 3
    rows, columns = ([reflected(i + shift, SIDE) for i in range(SIDE)] for shift in (2, -2))
    expected = film[np.ix_(rows, columns)]
    np.testing.assert_array_equal(augmented(film, draws), expected)


def test_rotation_and_scale_about_the_centre():
    dot = np.zeros((49, 49), np.uint8)
    dot[22:27, 22:27] = 200
    bar = np.zeros((49, 49), np.uint8)
    bar[24, 28:37] = 200
    for angle, scale in ((0, 0.5), (1 - 1e-9, 0.5), (0.5, 0), (0.5, 1 - 1e-9)):
        draws = still()
        draws[0, AFFINE : AFFINE + 5] = 0, angle, scale, 0.5, 0.5
        turned = augmented(dot, draws)
        np.testing.assert_allclose(turned, turned[::-1, ::-1], atol=1)  # still about the centre
        assert turned[24, 24] == 200
        y, x = np.nonzero(augmented(bar, draws) > 60)
        assert math.hypot(y.mean() - 24, x.mean() - 24) == pytest.approx(8 * (0.9 + 0.2 * scale), abs=0.4)
        assert math.degrees(math.atan2(24 - y.mean(), x.mean() - 24)) == pytest.approx(90 * angle - 45, abs=3)


def test_tone_is_rounded_to_the_nearest_level():
    film = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for brightness, contrast in ((0, 0.5), (0.9, 0.1), (0.5, 0), (0.25, 1 - 1e-9)):
        draws = still()
        draws[0, TONE : TONE + 3] = 0.2, brightness, contrast
        exact = np.clip((1 + 0.2 * (2 * contrast - 1)) * film.astype(float) + 255 * 0.2 * (2 * brightness - 1), 0, 255)
        assert np.abs(augmented(film, draws, jitter=0.2) - exact).max() <= 0.5
        np.testing.assert_array_equal(augmented(film, draws, jitter=0), film)


def test_crop_windows():
    draws = film_draws(0, 0, np.arange(3000), DRAWS)
    draws[0, :ATTEMPTS], draws[0, ATTEMPTS:PLACE] = 0.999, 0  # far too wide each time: the whole film
    draws[1, :ATTEMPTS], draws[1, ATTEMPTS:PLACE] = 0.999, 0.999
    draws[1, 9], draws[1, 19] = 0.1, 0.5  # only the last attempt fits
    for side in (256, 61):
        windows = np.stack(_crop_windows(draws[:, :PLACE], draws[:, PLACE:TRANSPOSE], side), axis=1)
        assert [tuple(window) for window in windows] == [slow_window(numbers, side) for numbers in draws]
        top, left, height, width = windows.T
        assert (windows >= 0).all() and (top + height <= side).all() and (left + width <= side).all()
        assert windows[0].tolist() == [0, 0, side, side] and windows[1, 2] < side / 2
        share, shape = height * width / side**2, width / height
        assert 0.07 < share.min() < 0.09 and share.max() > 0.95 and 0.72 < shape.min() < 0.78
        assert 1.28 < shape.max() < 1.38
        assert 0.45 < np.median(share) < 0.55 and np.median(np.log(shape[share < 0.5])) == pytest.approx(0, abs=0.02)
        small = height < side / 2
        free = top[small] / (side - height[small])
        assert free.min() < 0.02 and free.max() > 0.98 and free.mean() == pytest.approx(0.5, abs=0.04)
    assert all(window[0] == 1 for window in _crop_windows(draws[:1, :PLACE], draws[:1, PLACE:TRANSPOSE], 1)[2:])


# ---- holes


@pytest.mark.parametrize("size, side", [(224, 20), (66, 6), (8, 1)])
def test_holes(size, side):
    n = 40
    draws = film_draws(1, 2, np.arange(n), DRAWS)
    images = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last)
    expected, numbers = images.clone(), []
    for film, those in zip(expected, draws, strict=True):
        numbers.append(2 + int(7 * those[HOLES + 1]) if those[HOLES] < 0.5 else 0)
        for k in range(numbers[-1]):
            y, x = (int(those[PLACES + 2 * k + axis] * (size - side + 1)) for axis in (0, 1))
            film[:, y : y + side, x : x + side] = 0
    cut_holes(images, draws)
    assert torch.equal(images, expected) and images.is_contiguous(memory_format=torch.channels_last)
    assert set(numbers) == {0, *range(2, 9)} and 10 < numbers.count(0) < 30


def test_extreme_draws_stay_inside_the_film():
    for value in (0.0, 1 - 2**-53):
        draws = np.full((1, DRAWS), value)
        draws[:, [TRANSPOSE, FLIP, AFFINE, TONE, HOLES]] = 0
        film = smooth_films(1)
        assert augmented_crops(film, np.array([0]), draws, 32, 0.1).shape == (1, 32, 32)
        images = torch.ones(1, 3, 224, 224)
        cut_holes(images, draws)
        corner = images[0, :, -20:, -20:] if value else images[0, :, :20, :20]
        assert (corner == 0).all() and images.sum() == 3 * (224**2 - 400)


# ---- draws


def test_a_film_does_not_depend_on_its_batch_and_the_store_is_not_touched(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE), np.uint8)
    images.tofile(tmp_path / "films")
    mapped = np.memmap(tmp_path / "films", np.uint8, "r", shape=images.shape)
    rows = np.arange(20)
    together = augmented_crops(mapped, rows, film_draws(5, 1, rows, DRAWS), 40, 0.1)
    for order in (rows[::-1], np.array([7, 3]), np.array([12])):
        alone = augmented_crops(images, order, film_draws(5, 1, order, DRAWS), 40, 0.1)
        np.testing.assert_array_equal(alone, together[order])
    assert (augmented_crops(images, rows, film_draws(5, 2, rows, DRAWS), 40, 0.1) != together).any(axis=(1, 2)).all()
    assert augmented_crops(images, rows[:0], film_draws(5, 1, rows[:0], DRAWS), 40, 0.1).shape == (0, 40, 40)
    np.testing.assert_array_equal(mapped, np.fromfile(tmp_path / "films", np.uint8).reshape(images.shape))


def test_too_few_draws():
    with pytest.raises(ValueError, match=rf"draws are \(1, 5\); they must be \(B, {DRAWS}\)"):
        augmented_crops(smooth_films(1), np.array([0]), np.zeros((1, 5)), 32, 0.1)
    with pytest.raises(ValueError, match="draws are"):
        cut_holes(torch.zeros(1, 3, 8, 8), np.zeros((1, 5)))

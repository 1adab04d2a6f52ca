import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from lib.data import batches as batches_module
from lib.data.batches import MEAN, STD, count_batches, evaluation_batches, film_draws, gather_crops, training_batches
from lib.data.store import Store

N, SIZE, CROP = 50, 40, 32
TARGETS = np.random.default_rng(1).integers(0, 2, (N, 3)).astype(np.uint8)
ROWS = np.arange(3, 47)


def make_store(size: int = SIZE) -> Store:
    images = np.random.default_rng(0).integers(0, 256, (N, size, size), np.uint8)
    films = pd.DataFrame({"image": [f"{i}.png" for i in range(N)], "split": "train"})
    return Store(images, films, size, "fingerprint", [], np.zeros(N, np.uint64))


STORE = make_store()


def training(store=STORE, rows=ROWS, **changes):
    parameters = {"image_size": CROP, "batch_size": 8, "seed": 5, "epoch": 2} | changes
    return training_batches(store, rows, TARGETS, **parameters)


def by_film(batches) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    films = [film for batch in batches for film in zip(batch.rows, batch.images, batch.targets, strict=True)]
    return {int(row): (image, target) for row, image, target in films}


def order(batches) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist()]


# ---- draws


def splitmix64_by_hand(x: int) -> int:
    wrap = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & wrap
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
    return x ^ (x >> 31)


def test_splitmix64_against_published_values_and_python_integers():
    # The first outputs of the generator with seed 1234567: its state advances by the golden gamma before each.
    gamma = np.uint64(0x9E3779B97F4A7C15)
    states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * gamma
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert batches_module._splitmix64(states).tolist() == published
    x = np.random.default_rng(0).integers(0, 2**64, 100, np.uint64)
    assert batches_module._splitmix64(x).tolist() == [splitmix64_by_hand(int(i)) for i in x]


def test_draws_are_functions_of_seed_epoch_and_film():
    draws = film_draws(7, 3, np.arange(1000), 5)
    assert draws.shape == (1000, 5) and draws.dtype == np.float64
    assert (film_draws(7, 3, np.array([999, 4]), 5) == draws[[999, 4]]).all()
    for row in (0, 999):
        film_key = splitmix64_by_hand(splitmix64_by_hand(splitmix64_by_hand(7) ^ 3) ^ splitmix64_by_hand(row))
        expected = [(splitmix64_by_hand(film_key + k & 2**64 - 1) >> 11) / 2**53 for k in range(1, 6)]
        assert draws[row].tolist() == expected
    for seed, epoch in ((8, 3), (7, 4), (3, 7)):
        assert not (film_draws(seed, epoch, np.arange(1000), 5) == draws).any()


def test_draws_are_uniform_and_unrelated():
    draws = np.stack([film_draws(seed, epoch, np.arange(4000), 5) for seed in range(3) for epoch in range(3)])
    flat = draws.reshape(-1, 5)
    assert flat.min() >= 0 and flat.max() < 1
    for column in flat.T:
        share = np.histogram(column, 20, (0, 1))[0] / len(column)
        assert np.abs(share - 0.05).max() < 5 * np.sqrt(0.05 * 0.95 / len(column))
    assert np.abs(np.corrcoef(flat.T) - np.eye(5)).max() < 0.03  # among the draws of a film
    assert np.abs(np.corrcoef(draws[..., 0]) - np.eye(9)).max() < 0.08  # among seeds and epochs
    assert abs(np.corrcoef(flat[:-1, 0], flat[1:, 0])[0, 1]) < 0.03  # among neighbouring films


# ---- crops


def test_gather_crops_against_a_loop():
    rng = np.random.default_rng(3)
    rows, top, left, flip = rng.integers(0, N, 20), rng.integers(0, 9, 20), rng.integers(0, 9, 20), rng.random(20) < 0.5
    crops = gather_crops(STORE.images, rows, top, left, flip, CROP)
    assert crops.shape == (20, CROP, CROP) and crops.dtype == np.uint8
    for i in range(20):
        for y in (0, 7, CROP - 1):
            for x in (0, 5, CROP - 1):
                column = left[i] + (CROP - 1 - x if flip[i] else x)
                assert crops[i, y, x] == STORE.images[rows[i], top[i] + y, column]


def test_gather_crops_reads_a_memory_map_and_no_film(tmp_path):
    np.save(tmp_path / "images.npy", STORE.images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    one = np.array([4])
    assert (gather_crops(mapped, one, one, one, one > 9, 8)[0] == STORE.images[4, 4:12, 4:12]).all()
    none = np.empty(0, np.int64)
    assert gather_crops(mapped, none, none, none, none, 8).shape == (0, 8, 8)


# ---- training


def test_a_training_film_from_the_formula():
    """Crop, flip, jitter and normalisation in float64, from the documented formula and the film's draws."""
    for row, (image, target) in by_film(training(jitter=0.3)).items():
        u = film_draws(5, 2, np.array([row]), 5)[0]
        top, left = (int(d * (SIZE - CROP + 1)) for d in u[:2])
        x = STORE.images[row, top : top + CROP, left : left + CROP].astype(float) / 255
        x = x[:, ::-1] if u[2] < 0.5 else x
        b, c = 0.3 * (2 * u[3] - 1), 1 + 0.3 * (2 * u[4] - 1)
        x = np.clip(c * (x - x.mean()) + x.mean() + b, 0, 1)
        expected = np.stack([(x - m) / s for m, s in zip(MEAN, STD, strict=True)])
        assert np.abs(image.numpy() - expected).max() < 5e-6
        assert target.tolist() == TARGETS[row].tolist()


def film_by_film(image: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """The image (3, S, S) of one uint8 crop: the operations of a whole batch at once, which must stay."""
    total = image.sum(1, dtype=torch.int32).sum(0, dtype=torch.int64)
    mean = (total.double() / (255 * image.numel())).float()
    offset = mean * (1 - contrast) + brightness
    grey = torch.addcmul(offset[None, None], image.float(), (contrast / 255)[None, None]).clamp_(0, 1)
    scale, offset = torch.tensor([1 / s for s in STD]), torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    return torch.addcmul(offset, grey[..., None], scale).permute(2, 0, 1)


@pytest.mark.parametrize("batch_size", [5, 8, 44])
def test_training_films_to_the_last_bit(batch_size):
    for row, (image, _) in by_film(training(batch_size=batch_size, jitter=0.3)).items():
        u = film_draws(5, 2, np.array([row]), 5)
        top, left = (u[:, :2] * (SIZE - CROP + 1)).astype(int).T
        crop = gather_crops(STORE.images, np.array([row]), top, left, u[:, 2] < 0.5, CROP)[0]
        shifts = torch.from_numpy((0.3 * (2 * u[0, 3:] - 1)).astype(np.float32))
        assert torch.equal(image, film_by_film(torch.from_numpy(crop), shifts[0], 1 + shifts[1]))


def test_without_flip_no_film_is_mirrored_and_nothing_else_changes():
    flipped, straight = by_film(training(jitter=0.3)), by_film(training(jitter=0.3, flip=False))
    mirrored = film_draws(5, 2, np.array(list(straight)), 3)[:, 2] < 0.5
    assert 0 < mirrored.sum() < len(mirrored) == len(ROWS)
    for (row, (image, _)), turned in zip(straight.items(), mirrored, strict=True):
        assert torch.equal(image, flipped[row][0].flip(2) if turned else flipped[row][0])
    assert order(training(flip=False)) == order(training())


def test_types_and_memory_format():
    for batch in (next(training()), next(evaluation_batches(STORE, ROWS, TARGETS, image_size=CROP, batch_size=8))):
        assert batch.rows.dtype == torch.int64 and batch.rows.shape == (8,)
        assert batch.images.shape == (8, 3, CROP, CROP) and batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.targets.shape == (8, 3) and batch.targets.dtype == torch.float32


def test_every_film_once_in_an_order_of_the_epoch():
    first, again = order(training()), order(training())
    assert first == again and sorted(first) == ROWS.tolist() and first != ROWS.tolist()
    assert order(training(epoch=3)) != first != order(training(seed=6))


def test_films_do_not_depend_on_batch_size_company_or_history():
    reference = by_film(training(batch_size=8))
    epochs = [by_film(training(epoch=epoch)) for epoch in range(3)]  # epoch 2 after 0 and 1
    for other in (
        by_film(training(batch_size=44)),
        by_film(training(batch_size=3)),
        epochs[2],
        by_film(training(rows=ROWS[::2])),
    ):
        for row, (image, _) in other.items():
            assert torch.equal(image, reference[row][0])
    assert order(training(batch_size=8)) == order(training(batch_size=44))
    assert not any(torch.equal(epochs[0][row][0], epochs[1][row][0]) for row in ROWS.tolist())


def test_films_do_not_depend_on_global_random_state():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state()
    first = by_film(training())
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(9)
    assert all(torch.equal(first[row][0], image) for row, (image, _) in by_film(training()).items())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_each_global_batch(world_size):
    whole = list(training(batch_size=12))
    ranks = [list(training(batch_size=12, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {count_batches(len(ROWS), 12, world_size)}
    for i in range(len(ranks[0])):
        parts = [batches[i].rows.tolist() for batches in ranks]
        assert len({len(part) for part in parts}) == 1
        together = [row for group in zip(*parts, strict=True) for row in group]
        assert together == whole[i].rows.tolist()[: len(together)] and len(whole[i].rows) - len(together) < world_size
    images = by_film(whole)
    for batches in ranks:
        assert all(torch.equal(image, images[row][0]) for row, (image, _) in by_film(batches).items())


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size", "sizes"),
    [
        (16, 8, 1, [8, 8]),
        (17, 8, 1, [8, 8]),
        (18, 8, 1, [8, 8, 2]),
        (5, 8, 1, [5]),
        (19, 8, 2, [4, 4]),
        (20, 8, 2, [4, 4, 2]),
        (21, 8, 2, [4, 4, 2]),
    ],
)
def test_the_last_batch(n, batch_size, world_size, sizes):
    for rank in range(world_size):
        batches = list(training(rows=np.arange(n), batch_size=batch_size, rank=rank, world_size=world_size))
        assert [len(batch.rows) for batch in batches] == sizes
        assert count_batches(n, batch_size, world_size) == len(sizes)


def test_crops_reach_every_corner_and_half_of_the_films_are_mirrored():
    draws = film_draws(0, 0, np.arange(5000), 3)
    top = (draws[:, 0] * 9).astype(int)
    assert set(top) == set(range(9)) and abs((draws[:, 2] < 0.5).mean() - 0.5) < 0.03


def test_a_crop_of_the_whole_film_without_jitter():
    film = by_film(training(image_size=SIZE, jitter=0))
    for row, (image, _) in film.items():
        pixels = STORE.images[row] / 255
        grey = image[0].double().numpy() * STD[0] + MEAN[0]
        assert min(np.abs(grey - pixels).max(), np.abs(grey - pixels[:, ::-1]).max()) < 1e-6


def test_jitter_stays_within_the_range_of_films():
    for batch in training(jitter=0.9):
        grey = batch.images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        assert grey.min() >= -1e-6 and grey.max() <= 1 + 1e-6
        assert torch.allclose(grey[:, 0], grey[:, 1], atol=1e-6) and torch.allclose(grey[:, 0], grey[:, 2], atol=1e-6)


# ---- evaluation


def test_evaluation_keeps_order_and_every_film():
    rows = ROWS[::-1].copy()
    batches = list(evaluation_batches(STORE, rows, TARGETS, image_size=CROP, batch_size=43))
    assert [len(batch.rows) for batch in batches] == [43, 1] and order(batches) == rows.tolist()
    assert all((batch.targets.numpy() == TARGETS[batch.rows]).all() for batch in batches)
    assert list(evaluation_batches(STORE, np.array([], int), TARGETS, image_size=CROP, batch_size=4)) == []


@pytest.mark.parametrize("image_size", [SIZE, CROP, 20, 17, 64])
def test_evaluation_does_not_depend_on_the_batch_size(image_size):
    reference = by_film(evaluation_batches(STORE, ROWS, TARGETS, image_size=image_size, batch_size=44))
    for batch_size in (1, 7):
        other = by_film(evaluation_batches(STORE, ROWS[::-1], TARGETS, image_size=image_size, batch_size=batch_size))
        assert all(torch.equal(image, reference[row][0]) for row, (image, _) in other.items())


def test_evaluation_at_the_size_of_the_store_changes_no_pixel():
    for row, (image, _) in by_film(evaluation_batches(STORE, ROWS, TARGETS, image_size=SIZE, batch_size=9)).items():
        pixels = torch.from_numpy(STORE.images[row])
        assert torch.equal(((image[0] * STD[0] + MEAN[0]) * 255).round().to(torch.uint8), pixels)
        assert torch.equal(image[0][pixels == 7], image[0][pixels == 7][:1].expand((pixels == 7).sum()))


def test_evaluation_resizes_with_antialiasing():
    film = by_film(evaluation_batches(STORE, ROWS, TARGETS, image_size=20, batch_size=9))[10][0]
    whole = torch.from_numpy(STORE.images[10]).double()[None, None] / 255
    expected = F.interpolate(whole, (20, 20), mode="bilinear", antialias=True)[0, 0]
    assert torch.allclose(film[0].double(), (expected - MEAN[0]) / STD[0], atol=1e-5)
    # A triangle filter over two pixels' width: half by hand, away from the border.
    pixels, weights = STORE.images[10].astype(float) / 255, np.array([1, 3, 3, 1]) / 8
    by_hand = weights @ pixels[9:13, 9:13] @ weights
    assert float(film[0, 5, 5]) == pytest.approx((by_hand - MEAN[0]) / STD[0], abs=1e-5)


# ---- the thread ahead


def gatherers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_stopping_early_leaves_no_thread():
    batches = training()
    next(batches)
    assert len(gatherers()) == 1
    batches.close()
    assert not gatherers()
    for _ in training():
        break
    assert not gatherers()
    list(training())
    assert not gatherers()


def test_an_iterator_that_is_never_started_starts_no_thread():
    training()
    assert not gatherers()


def test_exceptions_of_the_thread_arrive(monkeypatch):
    calls = []

    def broken(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return gather_crops(*args)

    monkeypatch.setattr(batches_module, "gather_crops", broken)
    batches = training()
    next(batches), next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert not gatherers()


def test_the_thread_runs_ahead_but_not_far(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return gather_crops(*args)

    monkeypatch.setattr(batches_module, "gather_crops", counted)
    batches = training(batch_size=4)
    next(batches)
    deadline = time.monotonic() + 5
    while len(calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(calls) == 3
    batches.close()


# ---- parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 41}, "image_size 41 exceeds the 40 pixels of the store"),
        ({"image_size": 0}, "image_size"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"batch_size": 9, "world_size": 2}, "multiple of the 2 processes"),
        ({"batch_size": 2, "world_size": 2}, "at least 2 films"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"jitter": 1.0}, "jitter"),
        ({"seed": -1}, "negative"),
        ({"rows": np.array([1])}, "1 training films make no batch"),
        ({"rows": np.array([], int)}, "0 training films make no batch"),
        ({"rows": np.array([1, 50])}, "below the 50 films"),
        ({"rows": np.ones(N, bool)}, "rows are bool; they must be integers"),
        ({"rows": np.array([-1, 5])}, "at least 0"),
    ],
)
def test_parameters_are_checked_at_the_call(changes, message):
    with pytest.raises(ValueError, match=message):
        training(**changes)


def test_targets_of_other_films_and_empty_batches_are_refused():
    with pytest.raises(ValueError, match=r"targets have 44 rows, the store has 50 films.*without\(store\.unreadable\)"):
        training_batches(STORE, ROWS, TARGETS[ROWS], image_size=CROP, batch_size=8, seed=0, epoch=0)
    with pytest.raises(ValueError, match="batch_size"):
        evaluation_batches(STORE, ROWS, TARGETS, image_size=CROP, batch_size=0)

import errno
import json
import multiprocessing
import os
import shutil
import struct
import time
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest

from lib.data import open_data
from lib.data import store as store_module
from lib.data.reading import box_frame
from lib.data.release import Release, problem_frame
from lib.data.store import StoreError, decode_film, open_store


def film(i: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (size, size), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def release_of(root: Path, files: dict[str, bytes]) -> Release:
    """A release of the given files, three quarters 'train', the rest 'test'; files that exist with the same bytes keep
    their time."""
    root.mkdir(exist_ok=True)
    for name, data in files.items():
        if not (root / name).exists() or (root / name).read_bytes() != data:
            (root / name).write_bytes(data)
    names = list(files)
    split = ["train" if i < 0.75 * len(names) else "test" for i in range(len(names))]
    films = pd.DataFrame({"image": names, "split": split, "path": [str(root / name) for name in names]})
    return Release(root, films, box_frame([]), problem_frame([]))


def films_of(n: int, size: int = 64) -> dict[str, bytes]:
    return {f"{i:08d}_000.png": png(film(i, size)) for i in range(n)}


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the films that decode tasks of this process have got, in order."""
    names: list[str] = []
    chunk = store_module._decode_chunk

    def spy(task):
        names.extend(os.path.basename(path) for _, path in task[3])
        return chunk(task)

    monkeypatch.setattr(store_module, "_decode_chunk", spy)
    return names


# ---- pixels


@pytest.mark.parametrize("side", [64, 1024])
def test_films_are_stored_as_they_are(side):
    assert (decode_film(png(film(0, side)), side) == film(0, side)).all()


def mean_blocks(pixels: np.ndarray, factor: int) -> np.ndarray:
    size = len(pixels) // factor
    return pixels.astype(float).reshape(size, factor, size, factor).mean((1, 3))


@pytest.mark.parametrize(("side", "size"), [(1024, 256), (128, 64), (192, 64), (512, 64)])
def test_shrinking_averages_areas(side, size):
    out = decode_film(png(film(1, side)), size)
    assert out.shape == (size, size) and out.dtype == np.uint8
    assert np.abs(out - mean_blocks(film(1, side), side // size)).max() <= 1.5


def test_shrinking_by_an_odd_ratio_and_enlarging():
    ramp = np.tile(np.linspace(0, 255, 320), (320, 1)).astype(np.uint8)
    for size in (224, 256, 100, 512):
        out = decode_film(png(ramp), size)
        expected = (np.arange(size) + 0.5) / size * 320 - 0.5
        assert out.shape == (size, size) and np.abs(out - expected / 319 * 255).max() <= 2.5


def test_sixteen_bits_are_scaled_by_their_full_range():
    deep = np.random.default_rng(0).integers(0, 65536, (64, 64)).astype(np.uint16)
    deep[0, :2] = 0, 65535
    out = decode_film(png(deep), 64)
    assert out[0, 0] == 0 and out[0, 1] == 255 and (out == np.floor(deep / 257 + 0.5)).all()
    assert np.abs(decode_film(png(deep), 32) - mean_blocks(deep, 2) / 257).max() <= 0.51


def test_colour_and_transparency_become_grey():
    grey = film(2)
    alpha = film(3)
    assert (decode_film(png(np.dstack([grey] * 3)), 64) == grey).all()
    assert (decode_film(png(np.dstack([grey, grey, grey, alpha])), 64) == grey).all()
    deep = grey.astype(np.uint16) * 257
    assert (decode_film(png(np.dstack([deep, deep, deep, deep])), 64) == grey).all()
    blue, green, red = film(4), film(5), film(6)
    out = decode_film(png(np.dstack([blue, green, red])), 64)
    assert np.abs(out - (0.114 * blue + 0.587 * green + 0.299 * red)).max() <= 1


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(header: bytes, *middle: bytes) -> bytes:
    """A PNG file of 64 x 64 pixels from its chunks; `header` is the end of IHDR."""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">II", 64, 64) + header)
    return start + b"".join(middle) + chunk(b"IEND", b"")


def test_a_palette_and_one_bit_are_read():
    rows = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes([0b10101010] * 8) for _ in range(64))))
    for header, palette in ((b"\1\0\0\0\0", b""), (b"\1\3\0\0\0", chunk(b"PLTE", bytes([0, 0, 0, 255, 255, 255])))):
        assert (decode_film(png_of(header, palette, rows), 64) == np.tile([255, 0], (64, 32))).all()


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


WHOLE = png(film(7))
UNREADABLE = {
    "empty.png": (b"", "is empty"),
    "text.png": (b"<html>not found</html>", "not a PNG"),
    "jpeg.png": (cv2.imencode(".jpg", film(7))[1].tobytes(), "not a PNG"),
    "half.png": (WHOLE[: len(WHOLE) // 2], "truncated"),
    "noend.png": (WHOLE[:-12], "truncated"),
    "noend1.png": (WHOLE[:-1], "truncated"),
    "signature.png": (WHOLE[:8], "truncated"),
    "damaged.png": (damaged(WHOLE, len(WHOLE) // 2), "checksum"),
    "oblong.png": (png(film(7)[:, :50]), r"not square \(50 x 64\)"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_films_say_why(name):
    data, reason = UNREADABLE[name]
    with pytest.raises(ValueError, match=reason):
        decode_film(data, 64)


@pytest.mark.parametrize("suffix", [".jpg", "", ".png.part"])
def test_the_suffix_says_what_a_film_must_be(suffix):
    assert (decode_film(WHOLE, 64, ".PNG") == film(7)).all()
    with pytest.raises(ValueError, match="films are .png or .dcm"):
        decode_film(WHOLE, 64, suffix)
    with pytest.raises(ValueError, match="not a DICOM file"):
        decode_film(WHOLE, 64, ".dcm")


def test_a_film_whose_pixels_end_early_behind_sound_checksums():
    rows = zlib.compress(b"".join(b"\0" + bytes(64) for _ in range(20)))  # 20 of 64 rows
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_film(png_of(b"\x08\0\0\0\0", chunk(b"IDAT", rows)), 64)


# ---- building and reusing


def test_build_and_reuse(tmp_path, decoded):
    release = release_of(tmp_path / "r", films_of(70))
    store = open_store(release, tmp_path / "s", 32, workers=1)
    assert store.images.shape == (70, 32, 32) and store.images.dtype == np.uint8 and not store.images.flags.writeable
    for i in (0, 31, 32, 69):
        assert (store.images[i] == decode_film(png(film(i)), 32)).all()
    assert store.films.equals(release.films) and store.size == 32 and store.unreadable == []
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["images.npy", "lock", "store.json"]
    assert store.rows("train").tolist() == list(range(53)) and store.rows("test").tolist() == list(range(53, 70))
    assert store.rows("train").dtype == np.int64 and len(store.rows("val")) == 0
    assert store.rows("all").tolist() == list(range(70))
    with pytest.raises(ValueError, match="split is 'validation'"):
        store.rows("validation")

    decoded.clear()
    again = open_store(release, tmp_path / "s", 32, workers=1)
    assert decoded == [] and again.fingerprint == store.fingerprint and (again.images == store.images).all()


def test_the_number_of_workers_changes_no_pixel(tmp_path):
    release = release_of(tmp_path / "r", films_of(70, 96))
    stores = [open_store(release, tmp_path / f"s{workers}", 40, workers=workers) for workers in (1, 2)]
    assert (stores[0].images == stores[1].images).all() and stores[0].fingerprint == stores[1].fingerprint


def test_a_changed_source_is_decoded_again(tmp_path, decoded):
    files = films_of(5)
    stores = [open_store(release_of(tmp_path / "r", files), tmp_path / "s", 32, workers=1)]
    path = tmp_path / "r" / "00000003_000.png"

    path.write_bytes(png(film(99)))  # other pixels
    files[path.name] = path.read_bytes()
    changed = open_store(release_of(tmp_path / "r", files), tmp_path / "s", 32, workers=1)
    assert (changed.images[3] == decode_film(path.read_bytes(), 32)).all()
    assert (changed.images[2] == stores[0].images[2]).all()
    # The store opened before still shows what it was opened on.
    assert (stores[0].images[3] == decode_film(png(film(3)), 32)).all()

    os.utime(path, ns=(0, 5 * 10**9))  # only the time
    touched = open_store(release_of(tmp_path / "r", files), tmp_path / "s", 32, workers=1)
    turned = open_store(release_of(tmp_path / "r", dict(reversed(files.items()))), tmp_path / "s", 32, workers=1)
    assert (turned.images[1] == touched.images[3]).all()
    fewer = open_store(release_of(tmp_path / "r", dict(list(files.items())[:4])), tmp_path / "s", 32, workers=1)
    larger = open_store(release_of(tmp_path / "r", files), tmp_path / "s", 48, workers=1)
    assert len(fewer.images) == 4 and larger.images.shape == (5, 48, 48)
    fingerprints = [store.fingerprint for store in (stores[0], changed, touched, turned, fewer, larger)]
    assert len(set(fingerprints)) == 6 and len(decoded) == 5 * 5 + 4


def test_a_version_of_the_store_is_part_of_its_fingerprint(tmp_path, monkeypatch, decoded):
    release = release_of(tmp_path / "r", films_of(3))
    open_store(release, tmp_path / "s", 32, workers=1)
    monkeypatch.setattr(store_module, "VERSION", store_module.VERSION + 1)
    open_store(release, tmp_path / "s", 32, workers=1)
    assert len(decoded) == 6


@pytest.mark.parametrize("damage", ["no json", "half json", "no images", "short images", "no header", "other size"])
def test_a_damaged_store_is_built_again(tmp_path, damage, decoded):
    release = release_of(tmp_path / "r", films_of(4))
    folder = tmp_path / "s"
    expected = open_store(release, folder, 32, workers=1).images.copy()
    data = (folder / "images.npy").read_bytes()
    if damage == "no json":
        (folder / "store.json").unlink()
    elif damage == "half json":
        (folder / "store.json").write_text((folder / "store.json").read_text()[:20])
    elif damage == "no images":
        (folder / "images.npy").unlink()
    elif damage == "other size":
        np.save(folder / "images.npy", np.zeros((4, 16, 16), np.uint8))
    else:
        (folder / "images.npy").write_bytes(data[: 0 if damage == "no header" else len(data) // 2])
    assert (open_store(release, folder, 32, workers=1).images == expected).all() and len(decoded) == 8


def test_a_read_only_store_can_be_used(tmp_path, monkeypatch):
    release = release_of(tmp_path / "r", films_of(3))
    open_store(release, tmp_path / "s", 32, workers=1)
    (tmp_path / "s" / "lock").unlink()
    monkeypatch.setattr(store_module, "_lock", lambda folder: pytest.fail("a finished store needs no lock"))
    open_store(release, tmp_path / "s", 32, workers=1)


# ---- interruption


class Killed(BaseException):
    pass


def test_a_killed_build_resumes(tmp_path, monkeypatch, decoded):
    release, folder = release_of(tmp_path / "r", films_of(100)), tmp_path / "s"
    spy = store_module._decode_chunk

    def die_at_the_third(task):
        if len(decoded) >= 64:
            raise Killed
        return spy(task)

    monkeypatch.setattr(store_module, "_decode_chunk", die_at_the_third)
    with pytest.raises(Killed):
        open_store(release, folder, 32, workers=1)
    assert not (folder / "store.json").exists() and not (folder / "images.npy").exists()
    monkeypatch.setattr(store_module, "_decode_chunk", spy)
    decoded.clear()
    store = open_store(release, folder, 32, workers=1)
    assert len(decoded) == 36
    assert all((store.images[i] == decode_film(png(film(i)), 32)).all() for i in range(100))


def partial_build(tmp_path: Path, release: Release, done: int) -> Path:
    """A folder as a build leaves it that was killed after `done` films."""
    folder = tmp_path / "s"
    whole = open_store(release, tmp_path / "whole", 32, workers=1)
    (folder / "building").mkdir(parents=True)
    images = whole.images.copy()
    images[done:] = 0
    np.save(folder / "building" / "images.npy", images)
    signatures = store_module._signatures(release.films)
    store_module._write_progress(folder / "building" / "progress.npy", signatures, np.arange(len(images)) < done)
    return folder


def test_resuming_decodes_a_film_again_that_changed_meanwhile(tmp_path, decoded):
    files = films_of(10)
    folder = partial_build(tmp_path, release_of(tmp_path / "r", files), 6)
    files["00000002_000.png"] = png(film(50))
    decoded.clear()
    store = open_store(release_of(tmp_path / "r", files), folder, 32, workers=1)
    assert decoded == [f"{i:08d}_000.png" for i in (2, 6, 7, 8, 9)]
    assert all((store.images[i] == decode_film(data, 32)).all() for i, data in enumerate(files.values()))


@pytest.mark.parametrize("damage", ["progress", "other progress", "images", "no images", "size"])
def test_an_unusable_partial_build_starts_again(tmp_path, damage, decoded):
    release = release_of(tmp_path / "r", films_of(10))
    folder = partial_build(tmp_path, release, 6)
    building = folder / "building"
    if damage == "progress":
        (building / "progress.npy").write_bytes((building / "progress.npy").read_bytes()[:100])
    elif damage == "images":
        (building / "images.npy").write_bytes((building / "images.npy").read_bytes()[:500])
    elif damage == "other progress":
        np.save(building / "progress.npy", np.zeros(10))
    elif damage == "no images":
        (building / "images.npy").unlink()
    decoded.clear()
    store = open_store(release, folder, 40 if damage == "size" else 32, workers=1)
    assert len(decoded) == 10 and (store.images[7] == decode_film(png(film(7)), store.size)).all()


def slow_build(root: str, folder: str, ready) -> None:
    files = {path.name: path.read_bytes() for path in sorted(Path(root).iterdir())}
    chunk = store_module._decode_chunk

    def slow(task):
        if ready.is_set():
            time.sleep(60)
        result = chunk(task)
        ready.set()
        return result

    store_module._decode_chunk = slow
    store_module._CHECKPOINT_SECONDS = 0.0
    open_store(release_of(Path(root), files), folder, 32, workers=1)


def test_kill_9_leaves_nothing_that_looks_finished_and_no_lock(tmp_path, decoded):
    release, folder = release_of(tmp_path / "r", films_of(64)), tmp_path / "s"
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=slow_build, args=(str(tmp_path / "r"), str(folder), ready))
    process.start()
    assert ready.wait(20)
    deadline = time.monotonic() + 20  # the record of the first films follows at once
    while time.monotonic() < deadline and not progress_of(folder).any():
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (folder / "store.json").exists()
    store = open_store(release, folder, 32, workers=1)
    assert len(decoded) == 32 and all((store.images[i] == decode_film(png(film(i)), 32)).all() for i in range(64))


def progress_of(folder: Path) -> np.ndarray:
    try:
        return np.load(folder / "building" / "progress.npy")["done"]
    except FileNotFoundError:
        return np.zeros(1)


def build_and_count(root: str, folder: str, start, queue) -> None:
    files = {path.name: path.read_bytes() for path in sorted(Path(root).iterdir())}
    chunk, count = store_module._decode_chunk, []

    def slow(task):
        time.sleep(0.1)
        count.extend(task[3])
        return chunk(task)

    store_module._decode_chunk = slow
    start.wait()
    store = open_store(release_of(Path(root), files), folder, 32, workers=1)
    queue.put((len(count), int(store.images.sum())))


def test_of_two_at_once_one_builds_and_the_other_waits(tmp_path):
    release = release_of(tmp_path / "r", films_of(70))
    context = multiprocessing.get_context("fork")
    start, queue = context.Barrier(2), context.Queue()
    args = (str(tmp_path / "r"), str(tmp_path / "s"), start, queue)
    processes = [context.Process(target=build_and_count, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in results) == [0, 70]
    expected = int(open_store(release, tmp_path / "s", 32, workers=1).images.sum())
    assert {total for _, total in results} == {expected}


# ---- unreadable films


def test_unreadable_films_are_all_named(tmp_path, decoded):
    files = films_of(40) | {name: data for name, (data, _) in UNREADABLE.items()}
    release, folder = release_of(tmp_path / "r", files), tmp_path / "s"
    with pytest.raises(StoreError, match="9 of 49 films are unreadable") as caught:
        open_store(release, folder, 32, workers=1)
    assert all(name in str(caught.value) for name in UNREADABLE) and "on_unreadable='skip'" in str(caught.value)
    assert not (folder / "store.json").exists()

    decoded.clear()
    store = open_store(release, folder, 32, workers=1, on_unreadable="skip")
    assert sorted(decoded) == sorted(UNREADABLE)  # what was decoded before stays
    assert sorted(store.unreadable) == sorted(UNREADABLE)
    assert store.images.shape == (40, 32, 32) and store.films["image"].tolist() == list(films_of(40))

    decoded.clear()
    again = open_store(release, folder, 32, workers=1, on_unreadable="skip")
    assert again.unreadable == store.unreadable and (again.images == store.images).all()
    with pytest.raises(StoreError, match="9 of 49 films are unreadable: .*truncated"):
        open_store(release, folder, 32, workers=1)
    assert decoded == []


def test_a_replaced_film_completes_the_build(tmp_path, decoded):
    files = films_of(40) | {"half.png": UNREADABLE["half.png"][0]}
    with pytest.raises(StoreError, match=r"half\.png: it is truncated"):
        open_store(release_of(tmp_path / "r", files), tmp_path / "s", 32, workers=1)
    decoded.clear()
    store = open_store(release_of(tmp_path / "r", files | {"half.png": WHOLE}), tmp_path / "s", 32, workers=1)
    assert decoded == ["half.png"] and (store.images[40] == decode_film(WHOLE, 32)).all()


@pytest.mark.parametrize("bad", [[0], [9], [3, 4, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_the_store_closes_the_gaps_of_unreadable_films(tmp_path, bad):
    files = {name: b"" if i in bad else data for i, (name, data) in enumerate(films_of(10).items())}
    release = release_of(tmp_path / "r", files)
    store = open_store(release, tmp_path / "s", 32, workers=1, on_unreadable="skip")
    kept = [i for i in range(10) if i not in bad]
    assert store.films.index.tolist() == list(range(len(kept)))
    assert store.films["image"].tolist() == [list(files)[i] for i in kept]
    assert store.unreadable == [list(files)[i] for i in bad]
    assert all((store.images[row] == decode_film(png(film(i)), 32)).all() for row, i in enumerate(kept))
    assert [kept[row] for row in store.rows("train")] == [i for i in kept if i < 8]
    assert (tmp_path / "s" / "images.npy").stat().st_size == 128 + len(kept) * 32 * 32


def test_not_one_readable_film(tmp_path):
    release = release_of(tmp_path / "r", {"a.png": b"", "b.png": WHOLE[:50]})
    with pytest.raises(StoreError, match=r"not one of the 2 films is readable; the first is .*a\.png: it is empty"):
        open_store(release, tmp_path / "s", 32, workers=1, on_unreadable="skip")


def test_killed_while_the_gaps_are_closed(tmp_path, monkeypatch, decoded):
    release = release_of(tmp_path / "r", {"bad.png": b""} | films_of(10))
    write_header = np.lib.format.write_array_header_1_0

    def die(*_):
        raise Killed

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", die)
    with pytest.raises(Killed):
        open_store(release, tmp_path / "s", 32, workers=1, on_unreadable="skip")
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", write_header)
    assert not (tmp_path / "s" / "store.json").exists()
    store = open_store(release, tmp_path / "s", 32, workers=1, on_unreadable="skip")
    assert all((store.images[i] == decode_film(png(film(i)), 32)).all() for i in range(10)) and len(decoded) == 22


def test_a_film_that_vanished(tmp_path):
    release = release_of(tmp_path / "r", films_of(3))
    os.remove(release.films["path"][1])
    with pytest.raises(StoreError, match=r"1 films cannot be found: .*00000001_000\.png; read the release again"):
        open_store(release, tmp_path / "s", 32, workers=1)


# ---- disk


def test_too_little_room_is_said_before_any_work(tmp_path, monkeypatch, decoded):
    release = release_of(tmp_path / "r", films_of(3))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreError, match="needs 0.00 GiB in .*make room"):
        open_store(release, tmp_path / "s", 32, workers=1)
    assert decoded == [] and not list((tmp_path / "s" / "building").iterdir())


def test_a_quota_is_said_before_any_work(tmp_path, monkeypatch, decoded):
    def full(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(StoreError, match="make room"):
        open_store(release_of(tmp_path / "r", films_of(3)), tmp_path / "s", 32, workers=1)
    assert decoded == []


def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
    release, pwrite, calls = release_of(tmp_path / "r", films_of(40)), os.pwrite, []

    def full(*args):
        calls.append(args)
        if len(calls) > 35:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match="is full; make room and open the store again: it resumes"):
        open_store(release, tmp_path / "s", 32, workers=1)
    assert not (tmp_path / "s" / "store.json").exists()
    monkeypatch.setattr(os, "pwrite", pwrite)
    store = open_store(release, tmp_path / "s", 32, workers=1)
    assert all((store.images[i] == decode_film(png(film(i)), 32)).all() for i in range(40))


def test_a_worker_that_was_killed(tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenProcessPool
        yield

    release = release_of(tmp_path / "r", films_of(3))
    results = store_module._results
    monkeypatch.setattr(store_module, "_results", broken)
    with pytest.raises(StoreError, match="killed .out of memory.*fewer workers"):
        open_store(release, tmp_path / "s", 32, workers=1)
    monkeypatch.setattr(store_module, "_results", results)
    assert len(open_store(release, tmp_path / "s", 32, workers=1).images) == 3


def test_a_folder_that_cannot_be_written(tmp_path):
    release = release_of(tmp_path / "r", films_of(1))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "lock").mkdir()  # opening it for writing fails, whoever runs the test
    with pytest.raises(StoreError, match="cannot be written"):
        open_store(release, tmp_path / "s", 32, workers=1)


@pytest.mark.parametrize(("name", "value"), [("size", 0), ("workers", 0), ("on_unreadable", "maybe")])
def test_parameters_are_checked(tmp_path, name, value):
    parameters = {"size": 32, "workers": 1, "on_unreadable": "error"} | {name: value}
    with pytest.raises(ValueError, match=name):
        open_store(release_of(tmp_path / "r", films_of(1)), tmp_path / "s", **parameters)


def test_the_manifest_can_be_read(tmp_path):
    release = release_of(tmp_path / "r", films_of(2) | {"half.png": UNREADABLE["half.png"][0]})
    store = open_store(release, tmp_path / "s", 32, workers=1, on_unreadable="skip")
    manifest = json.loads((tmp_path / "s" / "store.json").read_text())
    assert manifest["fingerprint"] == store.fingerprint and manifest["films"] == 3
    assert manifest["unreadable"][0]["reason"] == "it is truncated"


def test_open_data_gives_a_release_whose_films_are_those_of_the_store(tmp_path):
    root = tmp_path / "r"
    (root / "images").mkdir(parents=True)
    names = [f"{i:08d}_000.png" for i in range(1, 11)]
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    rows = [f"{name},Mass,0,{i},50,M,PA" for i, name in enumerate(names, 1)]
    (root / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]))
    boxes = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", *(f"{name},Mass,1,1,9,9" for name in names)]
    (root / "BBox_List_2017.csv").write_text("\n".join(boxes))
    (root / "train_val_list.txt").write_text("\n".join(names[:7]))
    (root / "test_list.txt").write_text("\n".join(names[7:]))
    for i, name in enumerate(names):
        if i != 2:
            (root / "images" / name).write_bytes(WHOLE[:100] if i in (0, 8) else png(film(i)))
    parameters = {"release": "nih", "store_size": 32, "validation_fraction": 0.3, "skip_bad_films": True}
    study = SimpleNamespace(**parameters, release_folder=root, store_folder=tmp_path / "s")
    for _ in range(2):  # built, then reused
        release, store = open_data(study)
        assert release.films.equals(store.films) and len(store.images) == len(release.targets) == 7
        assert set(release.boxes["image"]) == set(release.films["image"]) == set(names) - {names[0], names[2], names[8]}
        for pixels, path in zip(store.images, release.films["path"], strict=True):
            assert (pixels == decode_film(Path(path).read_bytes(), 32)).all()
        left_out = release.problems[release.problems["kind"].isin(["film missing", "film left out"])]
        assert left_out["item"].tolist() == [names[2], names[0], names[8]]
        assert left_out["detail"].tolist()[1:] == ["unreadable"] * 2
    study.skip_bad_films = False
    with pytest.raises(ValueError, match="1 of 10 films are missing"):
        open_data(study)


@pytest.mark.skipif("NIH_SAMPLE" not in os.environ, reason="set NIH_SAMPLE to the folder of the real NIH sample")
def test_the_real_sample(tmp_path):
    from lib.data.nih import read_release

    release = read_release(os.environ["NIH_SAMPLE"])
    store = open_store(release, tmp_path / "s", 256, workers=2)
    assert store.images.shape == (529, 256, 256) and store.unreadable == []
    grey = cv2.imread(release.films["path"][17], cv2.IMREAD_GRAYSCALE)
    assert (store.images[17] == cv2.resize(grey, (256, 256), interpolation=cv2.INTER_AREA)).all()

import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import socket
import struct
import time
import zlib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless

from lib.data import decoding, open_data
from lib.data import store as store_module
from lib.data.decoding import decode_film, read_film, read_films
from lib.data.reading import box_frame
from lib.data.release import Release, ReleaseError, problem_frame
from lib.data.store import StoreError, open_store


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


@pytest.mark.parametrize("suffix", [".gif", "", ".png.part"])
def test_the_suffix_says_what_a_film_must_be(suffix):
    assert (decode_film(WHOLE, 64, ".PNG") == film(7)).all()
    with pytest.raises(ValueError, match="films are .png, .jpg, .jpeg or .dcm"):
        decode_film(WHOLE, 64, suffix)
    with pytest.raises(ValueError, match="not a DICOM file"):
        decode_film(WHOLE, 64, ".dcm")


def test_a_film_whose_pixels_end_early_behind_sound_checksums():
    rows = zlib.compress(b"".join(b"\0" + bytes(64) for _ in range(20)))  # 20 of 64 rows
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_film(png_of(b"\x08\0\0\0\0", chunk(b"IDAT", rows)), 64)


def sized(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, behind a sound checksum."""
    return WHOLE[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + b"\x08\0\0\0\0") + WHOLE[33:]


def framed(width: int, height: int, data: bytes) -> bytes:
    """A JPEG whose frame header claims this size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


JPEG = cv2.imencode(".jpg", film(7))[1].tobytes()
PROGRESSIVE = cv2.imencode(".jpg", film(7), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
HOSTILE = {
    "huge.png": (sized(60000, 60000), "60000 x 60000 pixels; films have 16 to 8192"),
    "long.png": (sized(64, 2**31 - 1), "64 x 2147483647 pixels"),
    "none.png": (sized(0, 0), "0 x 0 pixels"),
    "dot.png": (png(film(7, 1)), "1 x 1 pixels"),
    "twice.png": (WHOLE[:33] + sized(60000, 60000)[8:33] + WHOLE[33:], "header is not one chunk"),
    "late.png": (WHOLE[:8] + chunk(b"tEXt", b"a\0b") + WHOLE[8:], "header is not one chunk"),
    "short.png": (WHOLE[:8] + chunk(b"IHDR", b"") + WHOLE[33:], "header is not one chunk"),
    "depth.png": (WHOLE[:8] + chunk(b"IHDR", struct.pack(">II", 64, 64) + b"\x07\0\0\0\0") + WHOLE[33:], "decoded"),
    "empty.jpg": (b"", "is empty"),
    "png.jpg": (WHOLE, "not a JPEG"),
    "begun.jpg": (JPEG[:3], "truncated"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "noend.jpeg": (JPEG[:-2], "truncated"),
    "zeros.jpg": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "truncated"),
    "huge.jpg": (framed(60000, 60000, JPEG), "60000 x 60000 pixels"),
    "flat.jpg": (framed(64, 0, JPEG), "64 x 0 pixels"),
    "oblong.JPG": (cv2.imencode(".jpg", film(7)[:, :50])[1].tobytes(), "not square"),
    "scans.jpg": (PROGRESSIVE[:-2] + PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2] * 101, "more than 100 scans"),
    "headless.jpg": (JPEG[:2] + b"\xff\xfe\0\x07hello\xff\xd9", "cannot be decoded"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_header_claims_is_checked_before_it_is_decoded(name):
    data, reason = HOSTILE[name]
    with pytest.raises(ValueError, match=reason):
        decode_film(data, 64, os.path.splitext(name)[1])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_damage_meets_value_errors_alone(suffix):
    whole, rng = {".png": WHOLE, ".jpg": JPEG}[suffix], np.random.default_rng(0)
    for i in range(100):
        data = bytearray(whole)
        for at in rng.integers(2, len(data), 1 + i % 4):
            data[at] = rng.integers(256)
        try:
            assert decode_film(bytes(data), 16, suffix).shape == (16, 16)
        except ValueError:
            pass


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
@pytest.mark.parametrize("options", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]])
def test_a_jpeg_is_read(suffix, options):
    smooth = cv2.GaussianBlur(film(7), (0, 0), 4)
    grey = cv2.imencode(".jpg", smooth, options)[1].tobytes()
    colour = cv2.imencode(".jpg", np.dstack([smooth] * 3), options)[1].tobytes()
    for data in (grey, colour, grey + b"what cameras append"):
        assert np.abs(decode_film(data, 64, suffix).astype(int) - smooth).max() <= 4


def test_a_jpeg_of_the_sample_is_its_grey_values():
    """Three equal channels keep their value; against Pillow's decoder, which may round otherwise by one."""
    smooth = cv2.GaussianBlur(film(8), (0, 0), 2)
    data = io.BytesIO()
    Image.fromarray(np.dstack([smooth] * 3)).save(data, "jpeg", quality=75)
    other = np.asarray(Image.open(data).convert("L")).astype(int)
    assert np.abs(decode_film(data.getvalue(), 64, ".jpg") - other).max() <= 1


def test_an_orientation_that_a_header_proposes_is_not_applied():
    exif, data = Image.Exif(), io.BytesIO()
    exif[274] = 6
    Image.fromarray(film(7)).save(data, "jpeg", exif=exif, quality=100)
    assert np.abs(decode_film(data.getvalue(), 64, ".jpg").astype(int) - film(7)).mean() < 3


def dicom(syntax: str, pixels: bytes, side: int = 64) -> bytes:
    """A DICOM film whose header claims 64 x 64 pixels of 8 bits, or another side."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = syntax, "1.2", "1.2.3"
    file = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    file.Rows = file.Columns = side
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 8, 8, 7
    file.PixelData = encapsulate([pixels]) if syntax == RLELossless else pixels
    file["PixelData"].VR, file["PixelData"].is_undefined_length = "OB", syntax == RLELossless
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.parametrize("side", [0, 1, 15, 8193, 60000])
def test_the_size_that_a_dicom_header_claims(side):
    with pytest.raises(ValueError, match=f"it has {side} x {side} pixels; films have 16 to 8192 a side"):
        decode_film(dicom(ExplicitVRLittleEndian, film(7).tobytes(), side), 32, ".dcm")


def test_what_a_dicom_stream_may_become(monkeypatch):
    runs = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x07" * 50_000  # 6 MB of one grey
    with pytest.raises(ValueError, match="64 x 64 pixels take 100,0.. bytes, though compressed"):
        decode_film(dicom(RLELossless, runs), 32, ".dcm")
    deflated = dicom(DeflatedExplicitVRLittleEndian, film(7).tobytes())
    assert (decode_film(deflated, 64, ".dcm") == film(7)).all()
    monkeypatch.setattr(decoding, "MAX_BYTES", 64 * 64)
    with pytest.raises(ValueError, match="more than 4,096 bytes when inflated"):
        decode_film(deflated, 64, ".dcm")


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


NO_FILES = {
    "pipe": (os.mkfifo, "it is a pipe, socket or device, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a pipe, socket or device, not a file"),
    "folder": (os.mkdir, "it is a folder, not a file"),
    "socket": (socket_at, "it is a pipe, socket or device, not a file"),
    "dangling link": (lambda path: path.symlink_to("/nowhere/film.png"), "cannot be read .No such file"),
    "looping link": (lambda path: path.symlink_to(path.name), "cannot be read .Too many levels"),
    "vast file": (lambda path: path.open("wb").truncate(2**40), "1,099,511,627,776 bytes; films have at most"),
    "of no size": (lambda path: path.symlink_to("/proc/self/maps"), "it is empty"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_only_regular_files_are_films(tmp_path, monkeypatch, kind):
    make, reason = NO_FILES[kind]
    monkeypatch.chdir(tmp_path)
    release = release_of(Path("r"), films_of(3))
    path = Path(release.films["path"][1])
    path.unlink()
    make(path)
    with pytest.raises(ReleaseError, match=reason):
        read_films([str(path)], 32)
    with pytest.raises(StoreError, match=rf"00000001_000\.png: .*{reason}.*skip_bad_films"):
        open_store(release, tmp_path / "s", 32, workers=1)
    assert open_store(release, tmp_path / "s", 32, workers=1, on_unreadable="skip").unreadable == [path.name]
    path.rmdir() if kind == "folder" else path.unlink()
    path.write_bytes(png(film(1)))
    assert open_store(release, tmp_path / "s", 32, workers=1, on_unreadable="skip").unreadable == []


def test_a_pipe_that_takes_a_films_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="it is a pipe"):
        read_film(tmp_path / "a.png", 32)


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


@pytest.mark.parametrize("damage", [0, 1, 2])
def test_damaged_pixels_are_refused(tmp_path, damage):
    release, folder = release_of(tmp_path / "r", films_of(6)), tmp_path / "s"
    store = open_store(release, folder, 32, workers=1)
    pixels = np.load(folder / "images.npy", mmap_mode="r+")
    if damage == 0:
        pixels[3:] = 0
    elif damage == 1:
        pixels[5, 31, 31] ^= 1
    else:
        pixels[:2] = pixels[1::-1].copy()
    pixels.flush()
    number, first = [(3, 3), (1, 5), (2, 0)][damage]
    message = rf"s is damaged: {number} of 6 films checked .* first is 0000000{first}_000\.png; delete that folder"
    with pytest.raises(StoreError, match=message):
        store.verify()  # of a store that was opened before
    with pytest.raises(StoreError, match=message):
        open_store(release, folder, 32, workers=1)
    shutil.rmtree(folder)
    assert open_store(release, folder, 32, workers=1).digest == store.digest


def test_of_a_large_store_a_sample_is_checked_at_opening_and_all_on_request(tmp_path, monkeypatch):
    release, folder = release_of(tmp_path / "r", films_of(21)), tmp_path / "s"
    open_store(release, folder, 32, workers=1)
    pixels = np.load(folder / "images.npy", mmap_mode="r+")
    monkeypatch.setattr(store_module, "_CHECKED_BYTES", 5 * 32 * 32)  # films 0, 5, 10, 15 and 20
    pixels[7] ^= 1
    with pytest.raises(StoreError, match="1 of 21 films"):
        open_store(release, folder, 32, workers=1).verify()
    pixels[20] ^= 1
    with pytest.raises(StoreError, match="1 of 5 films"):
        open_store(release, folder, 32, workers=1)


def test_the_digest_is_of_the_pixels_and_of_nothing_else(tmp_path):
    files = films_of(5)
    release = release_of(tmp_path / "r", files)
    store = open_store(release, tmp_path / "s", 32, workers=1)
    expected = [hashlib.blake2b(decode_film(data, 32).tobytes(), digest_size=8).digest() for data in files.values()]
    assert store.digests.astype("<u8").tobytes() == b"".join(expected)
    for i, path in enumerate(release.films["path"]):
        os.utime(path, ns=(0, (5 + i) * 10**9))
    touched = open_store(release, tmp_path / "s2", 32, workers=2)
    assert touched.fingerprint != store.fingerprint and touched.digest == store.digest
    turned = release_of(tmp_path / "r", dict(reversed(files.items())))
    other = release_of(tmp_path / "r2", files | {"00000003_000.png": png(film(99))})
    stores = [open_store(turned, tmp_path / "s3", 32), open_store(other, tmp_path / "s4", 32)]
    stores.append(open_store(release, tmp_path / "s5", 40))
    assert len({store.digest, *(each.digest for each in stores)}) == 4


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "3", "[" * 100_000, "\udcff", '{"unreadable": 3}', "of the version before", "a word"]
)
def test_a_damaged_record_of_a_store_is_no_record(tmp_path, content, decoded):
    release = release_of(tmp_path / "r", films_of(4) | {"bad.png": b""})
    path = tmp_path / "s" / "store.json"
    open_store(release, path.parent, 32, workers=1, on_unreadable="skip")
    manifest = json.loads(path.read_text())
    if content == "of the version before":
        content = json.dumps({key: value for key, value in manifest.items() if key not in ("digests", "checksum")})
    elif content == "a word":  # rows would belong to other films
        content = path.read_text().replace('"bad.png"', '"00000000_000.png"')
    path.write_text(content, errors="surrogateescape")
    store = open_store(release, path.parent, 32, workers=1, on_unreadable="skip")
    assert store.unreadable == ["bad.png"] and len(decoded) == 10 and json.loads(path.read_text()) == manifest


@pytest.mark.parametrize("name", ["store.json", "images.npy"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name)])
def test_what_stands_in_a_files_place(tmp_path, name, make, decoded):
    release, path = release_of(tmp_path / "r", films_of(4)), tmp_path / "s" / name
    expected = open_store(release, tmp_path / "s", 32, workers=1).images.copy()
    path.unlink()
    make(path)
    if make is os.mkdir:
        with pytest.raises(StoreError, match=rf"cannot be written \(Is a directory at .*{name}\); delete what is in"):
            open_store(release, tmp_path / "s", 32, workers=1)
        assert len(decoded) == 4  # said before any work
        path.rmdir()
    assert (open_store(release, tmp_path / "s", 32, workers=1).images == expected).all()


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
    monkeypatch.setattr(store_module, "exclusive", lambda *_: pytest.fail("a finished store needs no lock"))
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
    progress = np.empty(len(images), store_module._PROGRESS)
    progress["signature"], _ = store_module._signatures(release.films)
    progress["digest"], progress["done"] = whole.digests, np.arange(len(images)) < done
    np.save(folder / "building" / "progress.npy", progress)
    return folder


def test_resuming_decodes_a_film_again_that_changed_meanwhile(tmp_path, decoded):
    files = films_of(10)
    folder = partial_build(tmp_path, release_of(tmp_path / "r", files), 6)
    files["00000002_000.png"] = png(film(50))
    decoded.clear()
    store = open_store(release_of(tmp_path / "r", files), folder, 32, workers=1)
    assert decoded == [f"{i:08d}_000.png" for i in (2, 6, 7, 8, 9)]
    assert all((store.images[i] == decode_film(data, 32)).all() for i, data in enumerate(files.values()))


def test_resuming_decodes_a_film_again_whose_pixels_were_damaged_meanwhile(tmp_path, decoded):
    release = release_of(tmp_path / "r", films_of(10))
    folder = partial_build(tmp_path, release, 6)
    np.load(folder / "building" / "images.npy", mmap_mode="r+")[4, 0, 0] ^= 1
    decoded.clear()
    store = open_store(release, folder, 32, workers=1)
    assert decoded == [f"{i:08d}_000.png" for i in (4, 6, 7, 8, 9)]
    store.verify()
    assert all((store.images[i] == decode_film(png(film(i)), 32)).all() for i in range(10))


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(2))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"hello", zip_bytes(), "folder", "claim", "version before"])
def test_a_damaged_record_of_progress_starts_again(tmp_path, content, decoded):
    release = release_of(tmp_path / "r", films_of(10))
    folder = partial_build(tmp_path, release, 6)
    path = folder / "building" / "progress.npy"
    progress = np.load(path)
    if content == "folder":
        path.unlink()
        path.mkdir()
    elif content == "version before":
        np.save(path, progress[["signature", "done"]])
    else:
        path.write_bytes(path.read_bytes().replace(b"(10,)", b"(10000000000000,)") if content == "claim" else content)
    decoded.clear()
    store = open_store(release, folder, 32, workers=1)
    assert len(decoded) == 10 and (store.images[7] == decode_film(png(film(7)), 32)).all()


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

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(np.memmap, "flush", die)
        with pytest.raises(Killed):
            open_store(release, tmp_path / "s", 32, workers=1, on_unreadable="skip")
    assert not (tmp_path / "s" / "store.json").exists()
    store = open_store(release, tmp_path / "s", 32, workers=1, on_unreadable="skip")
    assert all((store.images[i] == decode_film(png(film(i)), 32)).all() for i in range(10)) and len(decoded) == 22


def test_a_film_that_vanished(tmp_path):
    release = release_of(tmp_path / "r", films_of(3))
    os.remove(release.films["path"][1])
    with pytest.raises(
        StoreError,
        match=r"1 of 3 films are unreadable: .*00000001_000\.png: it cannot be read .No such file.*skip_bad_films",
    ):
        open_store(release, tmp_path / "s", 32, workers=1)


def test_names_of_films_need_not_be_names_of_files(tmp_path):
    release = release_of(tmp_path / "r", films_of(3) | {"bad.jpg": b""})
    release = replace(release, films=release.films.assign(image=["a", "b", "c", "d"]))
    store = open_store(release, tmp_path / "s", 32, workers=1, on_unreadable="skip")
    assert store.unreadable == ["d"] and store.films["image"].tolist() == ["a", "b", "c"]


def test_a_name_cannot_write_on_the_terminal(tmp_path):
    release = release_of(tmp_path / "r", films_of(3) | {"ä\n\x1b[31m.png": b""})
    with pytest.raises(StoreError, match="1 of 4 films are unreadable") as caught:
        open_store(release, tmp_path / "s", 32, workers=1)
    assert str(caught.value).isprintable() and r"ä\n\x1b[31m.png: it is empty" in str(caught.value)


def test_films_of_one_grey_and_repeated_films_are_remarked(tmp_path):
    black, white = (png(np.full((64, 64), grey, np.uint8)) for grey in (0, 255))
    files = films_of(4) | {"black.png": black, "again.png": png(film(2)), "black2.png": black}
    files |= {"there.png": png(film(1)), "white.png": white}
    store = open_store(release_of(tmp_path / "r", files), tmp_path / "s", 32, workers=1)
    assert store.remarks() == [
        ("film of one grey", "black.png", "every pixel is 0"),
        ("film repeated", "again.png", "the same pixels as 00000002_000.png"),
        ("film of one grey", "black2.png", "every pixel is 0"),
        ("film repeated", "there.png", "the same pixels as 00000001_000.png; that is a train film, this a test film"),
        ("film of one grey", "white.png", "every pixel is 255"),
    ]
    assert open_store(release_of(tmp_path / "r2", films_of(4)), tmp_path / "s2", 32, workers=1).remarks() == []


# ---- disk


def test_too_little_room_is_said_before_any_work(tmp_path, monkeypatch, decoded):
    release = release_of(tmp_path / "r", films_of(3))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreError, match="needs 0.00 GiB in .*, and 64 MiB to spare, .*make room"):
        open_store(release, tmp_path / "s", 32, workers=1)
    assert decoded == [] and not list((tmp_path / "s" / "building").iterdir())


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG, errno.ENOSPC])
def test_a_quota_is_said_before_any_work(tmp_path, monkeypatch, decoded, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(StoreError, match=rf"make room .*\({os.strerror(number)}\)"):
        open_store(release_of(tmp_path / "r", films_of(3)), tmp_path / "s", 32, workers=1)
    assert decoded == []


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_record_of_progress_that_cannot_be_written(tmp_path, monkeypatch, number):
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_module, "write_whole", full)
    said = "cannot be written" if number == errno.EIO else "is full; make room and open the store again: it resumes"
    with pytest.raises(StoreError, match=rf"{said} \({os.strerror(number)}\)"):
        open_store(release_of(tmp_path / "r", films_of(3)), tmp_path / "s", 32, workers=1)


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


def test_a_process_that_runs_out_of_memory(tmp_path, monkeypatch):
    def broken(task):
        raise MemoryError

    monkeypatch.setattr(store_module, "_decode_chunk", broken)
    with pytest.raises(StoreError, match="out of memory"):
        open_store(release_of(tmp_path / "r", films_of(3)), tmp_path / "s", 32, workers=1)


@pytest.mark.parametrize(("place", "folder"), [("s", "s"), ("s", "s/below"), ("s/building", "s")])
def test_a_file_in_a_folders_place(tmp_path, place, folder):
    release = release_of(tmp_path / "r", films_of(1))
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    with pytest.raises(StoreError, match=f"{folder} holds no store of this release and cannot be written"):
        open_store(release, tmp_path / folder, 32, workers=1)
    assert (tmp_path / place).read_text() == "mine"


def test_a_folder_may_be_a_link_but_no_loop(tmp_path):
    release = release_of(tmp_path / "r", films_of(1))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match="loop holds no store of this release and cannot be written"):
        open_store(release, tmp_path / "loop", 32, workers=1)
    (tmp_path / "link").symlink_to(tmp_path / "other" / "disk")
    open_store(release, tmp_path / "link", 32, workers=1)
    assert (tmp_path / "other" / "disk" / "store.json").exists()


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
            (root / "images" / name).write_bytes(WHOLE[:100] if i in (0, 8) else png(film(3 if i == 4 else i)))
    parameters = {"release": "nih", "store_size": 32, "validation_fraction": 0.3, "skip_bad_films": True}
    study = SimpleNamespace(**parameters, release_folder=root, store_folder=tmp_path / "s")
    for _ in range(2):  # built, then reused
        release, store = open_data(study)
        assert release.films.equals(store.films) and len(store.images) == len(release.targets) == 7
        assert set(release.boxes["image"]) == set(release.films["image"]) == set(names) - {names[0], names[2], names[8]}
        for pixels, path in zip(store.images, release.films["path"], strict=True):
            assert (pixels == decode_film(Path(path).read_bytes(), 32)).all()
        assert release.problems.iloc[-1].tolist() == ["film repeated", names[4], f"the same pixels as {names[3]}"]
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

"""One film file, PNG, JPEG or DICOM, as a square grey film."""

import contextlib
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset

# Films of the field have up to about 5,000 pixels a side, the digits 32. What a header claims beyond is not decoded: it
# could take all memory. Smaller ones would be enlarged to a smear.
SIDES = (16, 8192)
MAX_BYTES = 2**28  # of a file: 16-bit films of the largest side, twice
_MAX_SCANS = 100  # of a JPEG; each is a pass over all of its pixels, and real ones have about ten
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # neither a stuffed byte, a restart nor a filler


def decode_film(data: bytes, size: int, suffix: str = ".png") -> np.ndarray:
    """One film file's bytes as a grey film.

    Parameters
    ----------
    data : the whole file
    size : side of the result, pixels
    suffix : end of the file's name, '.png', '.jpg', '.jpeg' or '.dcm' in any case: what the bytes must be

    Returns
    -------
    uint8 (size, size)
        PNG and JPEG: transparency is dropped, colour becomes grey by ITU-R 601 (0.299 R + 0.587 G + 0.114 B; equal
        channels keep their value), an orientation that the header proposes is not applied. DICOM: bright is what
        MONOCHROME2 shows bright, after the rescale. Films of up to 8 stored bits keep their values, whatever window the
        header proposes (the range that the bits can hold is 0 to 255); deeper ones are cut to the header's first
        window, and where there is none the film's darkest and brightest pixel become 0 and 255.

    Raises
    ------
    ValueError
        Saying what is wrong with the file: empty, truncated, damaged, of another kind, not square, of a side beyond
        `SIDES`; a DICOM file in colour, with several frames, with look-up tables, or compressed in a way that cannot be
        decoded here. Damage inside a JPEG stream that has its end goes unseen: unlike PNG it has no checksums.
    """
    readers = {".png": _read_png, ".jpg": _read_jpeg, ".jpeg": _read_jpeg, ".dcm": _read_dicom}
    if suffix.lower() not in readers:
        raise ValueError(f"it is a {suffix or 'nameless'} file; films are .png, .jpg, .jpeg or .dcm")
    if not data:
        raise ValueError("it is empty")
    film = readers[suffix.lower()](data)
    _check_sides(*film.shape[1::-1])
    if film.ndim == 3:
        film = cv2.cvtColor(film, cv2.COLOR_BGRA2GRAY if film.shape[2] == 4 else cv2.COLOR_BGR2GRAY)
    # Halves first where they nest: OpenCV averages 2 x 2 ten times faster than 4 x 4, and rounding twice moves a pixel
    # by one grey level at most.
    while len(film) % (2 * size) == 0:
        film = cv2.resize(film, (len(film) // 2, len(film) // 2), interpolation=cv2.INTER_AREA)
    if len(film) != size:
        film = cv2.resize(film, (size, size), interpolation=cv2.INTER_AREA if len(film) > size else cv2.INTER_LINEAR)
    if film.dtype == np.uint16:
        film = ((film.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return film


def read_film(path: str | Path, size: int) -> np.ndarray:
    """`decode_film` of a file. Raises ValueError also where it cannot be read, or `check_file` refuses it."""
    try:
        check_file(os.stat(path))
        # Should a FIFO have taken its place since, it must not be waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            check_file(status)
            data = file.read(status.st_size)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
    return decode_film(data, size, os.path.splitext(path)[1])


def check_file(status: os.stat_result) -> None:
    """Raise ValueError, saying what it is, where a file is no regular one or has more than `MAX_BYTES`."""
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"it is a {'folder' if stat.S_ISDIR(status.st_mode) else 'pipe, socket or device'}, not a file"
        )
    if status.st_size > MAX_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes; films have at most {MAX_BYTES:,}")


def read_films(paths: Iterable[str], size: int) -> np.ndarray:
    """A few films straight from their files, to look at: uint8 (N, size, size). A film that cannot be read raises
    ReleaseError with its path."""
    films = []
    for path in paths:
        try:
            films.append(read_film(path, size))
        except ValueError as error:
            from lib.data.release import ReleaseError  # here: processes that decode films would start later for it

            raise ReleaseError(f"{path}: {error}; replace this file") from None
    return np.stack(films)


def _check_sides(width: int, height: int) -> None:
    if not SIDES[0] <= min(width, height) <= max(width, height) <= SIDES[1]:
        raise ValueError(f"it has {width} x {height} pixels; films have {SIDES[0]} to {SIDES[1]} a side")
    if height != width:
        shape = f"({width} x {height})"
        raise ValueError(f"it is not square {shape}: boxes and crops assume the square films of the release")


# ---- PNG and JPEG


def _decode(data: bytes) -> np.ndarray:
    try:
        film = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(f"its pixels cannot be decoded ({' '.join(error.err.split())[:150]})") from None
    if film is None:
        raise ValueError("its pixels cannot be decoded")
    return film


def _read_png(data: bytes) -> np.ndarray:
    """Once its chunks were walked to IEND and their sums and its size are right: some versions of OpenCV return a
    truncated PNG as a film whose rest is blank."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("it is not a PNG file")
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            break
        if zlib.crc32(view[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise ValueError("it is damaged (a checksum is wrong)")
        if (kind == b"IHDR") != (at == 8) or (at == 8 and length != 13):
            raise ValueError("it is damaged (its header is not one chunk at the start)")
        if at == 8:
            _check_sides(*struct.unpack_from(">II", data, 16))
        if kind == b"IEND":
            return _decode(data)
        at = end
    raise ValueError("it is truncated")


def _read_jpeg(data: bytes) -> np.ndarray:
    """Once its segments were walked to the end of the image and its size is right: OpenCV returns a truncated JPEG as a
    film whose rest is grey."""
    if not data.startswith(b"\xff\xd8\xff"):
        raise ValueError("it is not a JPEG file")
    at, scans = 2, 0
    while marker := _MARKER.search(data, at):
        kind, at = data[marker.end() - 1], marker.end()
        if kind == 0xD9:
            return _decode(data)
        if at + 7 > len(data):
            break
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame
            height, width = struct.unpack_from(">HH", data, at + 3)
            _check_sides(width, height)
        scans += kind == 0xDA
        if scans > _MAX_SCANS:
            raise ValueError(f"it is damaged (it has more than {_MAX_SCANS} scans)")
        at += struct.unpack_from(">H", data, at)[0]
    raise ValueError("it is truncated")


# ---- DICOM


def _read_dicom(data: bytes) -> np.ndarray:
    """Grey values of a DICOM file: uint8 up to 8 stored bits, else uint16 over its full range."""
    import pydicom  # here: processes that decode PNG films would start later for it
    from pydicom.filereader import read_dataset
    from pydicom.pixels import get_decoder

    if data[128:132] != b"DICM":
        raise ValueError("it is not a DICOM file")
    with _faults_of_the_file():
        stream = io.BytesIO(data[132:])
        meta = read_dataset(
            stream, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 > 2
        )
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            inflated = zlib.decompressobj(-zlib.MAX_WBITS)
            inflated.decompress(data[132 + stream.tell() :], MAX_BYTES)
            if inflated.unconsumed_tail:
                raise ValueError(f"more than {MAX_BYTES:,} bytes when inflated")
        header = pydicom.dcmread(io.BytesIO(data))
        kind = str(header.get("PhotometricInterpretation") or "")[:20]
        width, height = int(header.get("Columns") or 0), int(header.get("Rows") or 0)
        samples, frames = int(header.get("SamplesPerPixel") or 1), int(header.get("NumberOfFrames") or 1)
        syntax = pydicom.uid.UID(str(header.file_meta.TransferSyntaxUID))
        slope, intercept = _number(header, "RescaleSlope", 1.0), _number(header, "RescaleIntercept", 0.0)
        window = _number(header, "WindowCenter"), _number(header, "WindowWidth")
        function = str(header.get("VOILUTFunction") or "LINEAR")[:20]
        absent = not header.get("PixelData")
    if absent:
        raise ValueError("it is truncated, or has no pixels")
    if samples != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(
            f"its pixels are {kind or 'of no stated kind'}, {samples} values each; films are MONOCHROME1 or "
            "MONOCHROME2, one value each"
        )
    if frames != 1:
        raise ValueError(f"it has {frames} frames; films have one")
    _check_sides(width, height)
    try:
        decodable = get_decoder(syntax).is_available
    except NotImplementedError:
        decodable = False
    if not decodable:
        raise ValueError(
            f"its pixels are compressed as {syntax.name}, which cannot be decoded here; decompress it first "
            "(dcmdjpeg, gdcmconv --raw)"
        )
    if syntax.is_encapsulated and len(header.PixelData) > 4 * width * height + 2**16:
        # Each two bytes of run lengths may become 128.
        raise ValueError(f"its {width} x {height} pixels take {len(header.PixelData):,} bytes, though compressed")
    with _faults_of_the_file():
        stored = header.pixel_array
        bits, signed = int(header.BitsStored), bool(header.PixelRepresentation)
    if not 1 <= bits <= 16 or slope == 0 or not np.isfinite(2.0**16 * abs(slope) + abs(intercept)):
        raise ValueError(
            f"its grey values have {bits} bits and are rescaled by {slope:g} x + {intercept:g}; films have 1 to 16 "
            "bits, and a finite slope but 0"
        )
    windowed = bits > 8 and None not in window
    if "ModalityLUTSequence" in header or ("VOILUTSequence" in header and bits > 8 and not windowed):
        raise ValueError(
            "its grey values go through a look-up table, which is not supported; convert it to plain MONOCHROME2"
        )

    first = -(2 ** (bits - 1)) if signed else 0
    # Of every value that a pixel may hold: the whole mapping is one table. Clipped below: bits above the stored ones
    # may hold anything.
    values = slope * np.arange(first, first + 2**bits) + intercept
    if windowed:
        dark, bright = _window(*window, function)
    else:
        ends = [first, first + len(values) - 1] if bits <= 8 else [int(stored.min()), int(stored.max())]
        dark, bright = sorted(values[np.clip(np.subtract(ends, first), 0, len(values) - 1)])
    shades = np.clip((values - dark) / (bright - dark), 0, 1) if bright > dark else np.zeros(len(values))
    if kind == "MONOCHROME1":
        shades = 1 - shades
    dtype = np.uint8 if bits <= 8 else np.uint16
    table = np.floor(shades * np.iinfo(dtype).max + 0.5).astype(dtype)
    return table.take(stored.astype(np.int64) - first, mode="clip")


def _number(header: "Dataset", name: str, absent: float | None = None) -> float | None:
    """The number of a header element, the first one where it holds several."""
    value = header.get(name)
    if hasattr(value, "__getitem__") and not isinstance(value, str):
        value = value[0] if len(value) else None
    return absent if value is None or value == "" else float(value)


def _window(centre: float, width: float, function: str) -> tuple[float, float]:
    """Rescaled values that a window shows as black and as white (DICOM PS3.3, C.11.2.1)."""
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise ValueError(f"its window is {function}; LINEAR and LINEAR_EXACT are supported")
    if function == "LINEAR":
        # The standard counts whole values: the centre lies half a step lower, and the width spans one step less.
        centre, width = centre - 0.5, width - 1
    if not (np.isfinite([centre, width]).all() and width > 0):
        raise ValueError("its window has no width")
    return centre - width / 2, centre + width / 2


@contextlib.contextmanager
def _faults_of_the_file() -> Iterator[None]:
    try:
        yield
    # Damaged headers and streams make pydicom raise nearly anything (AttributeError, struct.error, KeyError,
    # RuntimeError, ...); such a film must be named, and must not end the decoding of all others.
    except Exception as error:
        text = " ".join(str(error).split())[:150]
        raise ValueError(f"it is truncated or damaged ({type(error).__name__}: {text})") from error
